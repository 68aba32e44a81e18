"""What must hold of a problem's parts, checked when it is made: nothing is computed, shapes alone are traced."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.core.paths import Params, arrays_only, flatten, is_array, is_state
from lorax_kit.core.plan import matched
from lorax_kit.core.specs.setting import shown
from lorax_kit.errors import LoraxError, StudyError
from lorax_kit.problem.evaluate import score_of
from lorax_kit.problem.metric import Metric, standard
from lorax_kit.problem.sums import Score, sums_of
from lorax_kit.training.objective import Weighted

if TYPE_CHECKING:
    from lorax_kit.problem.problem import Problem


def check_problem(problem: Problem) -> bool:
    """Check the parts of a problem against each other.

    Returns:
      Whether its score is an `lk.Score`, of a classifier.

    Raises:
      StudyError: a part that breaks its contract, named.
      PlanError: a pattern that matches nothing.
    """
    who = f"problem {problem.name!r}"
    check_batches(problem)
    batch = check_stream(problem)
    params = problem.params(jax.random.key(0))
    names = [path for path, x in flatten(params)[0].items() if is_array(x)]
    paths_by_part: dict[str, set[str]] = {"head": set(), "state": set()}
    for part, paths in paths_by_part.items():
        for pattern in getattr(problem, part):
            paths.update(matched(f"{part} {pattern!r} of {who}", pattern, names))
    for path in sorted(paths_by_part["state"]):
        dtype = flatten(params)[0][path].dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise StudyError(f"{path!r} of {who} is {dtype}; state holds float arrays.\n  keep counters out of it")
    check_base(problem, params, paths_by_part["head"] | paths_by_part["state"], jax.random.key(1))
    classifies, means = _check_score(problem, params)
    for metric in problem.metrics or ():
        _check_metric(standard(metric), means)
    _check_loss(problem, params, batch, paths_by_part["state"])
    return classifies


@contextlib.contextmanager
def told_in_words(what: str) -> Iterator[None]:
    """Raise what a user's own functions raise, which may be anything, as one line that begins with `what`."""
    try:
        yield
    except LoraxError:
        raise
    except Exception as e:
        text = str(e).splitlines()[0] if str(e) else ""
        raise StudyError(f"{what}: {type(e).__name__}: {text}") from e


def check_batches(problem: Problem) -> None:
    """Raise `StudyError` unless the validation and test batches are there, and can be read many times."""
    for name in ("val", "test"):
        batches = getattr(problem, name)
        if not isinstance(batches, Sequence) or isinstance(batches, str):
            raise StudyError(
                f"{name} of problem {problem.name!r} is a {type(batches).__name__}; it is read many times.\n"
                "  give a list of batches"
            )
    if not len(problem.val) or not len(problem.test):
        raise StudyError(f"problem {problem.name!r} has no validation or test examples.")


def check_stream(problem: Problem) -> Any:
    """The first training batch, of a stream that begins where it is told to.

    Raises:
      StudyError: no batches, a stream that ends after one, or one that does not begin at `start`.
    """
    with told_in_words(f"train(seed, start) of problem {problem.name!r} fails"):
        stream = problem.train(0, 0)
    if not hasattr(stream, "__iter__"):
        raise StudyError(
            f"train(seed, start) of problem {problem.name!r} gives a {type(stream).__name__}; it must give an "
            "iterator over batches."
        )
    stream = iter(stream)
    first = next(stream, None)
    if first is None:
        raise StudyError(f"problem {problem.name!r} has no training batches: the data set is empty.")
    second, again = next(stream, None), next(iter(problem.train(0, 1)), None)
    if second is None:
        raise StudyError(
            f"the training batches of problem {problem.name!r} end after the first.\n"
            "  its train(seed, start) must be endless: begin the data anew"
        )
    if again is None or not _same(second, again):
        raise StudyError(
            f"train(seed, start) of problem {problem.name!r} does not begin at `start`: the second batch of "
            "train(0, 0) is not the first of train(0, 1).\n"
            "  an interrupted training goes on from there: skip `start` batches, and fix the order by the seed"
        )
    return first


def _same(x: Any, y: Any) -> bool:
    ours, theirs = jax.tree.leaves(x), jax.tree.leaves(y)
    if str(jax.tree.structure(x)) != str(jax.tree.structure(y)):
        return False
    return all(np.shape(a) == np.shape(b) and _bytes(a) == _bytes(b) for a, b in zip(ours, theirs, strict=True))


def _bytes(x: Any) -> bytes:
    if is_array(x) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def check_base(problem: Problem, params: Params, own: Collection[str], key: Any) -> None:
    """Raise `StudyError` unless `problem.params` gives another key the same parameters outside of `own`.

    Trials share one base: what a key decides beyond the head would train over, and be saved for, another one.

    Args:
      params: those of the shared base.
      own: paths of the parameters that every trial has for itself.
      key: any other key.
    """
    ours, theirs = flatten(params)[0], flatten(problem.params(key))[0]
    if odd := sorted(set(ours) ^ set(theirs)):
        raise StudyError(f"params of problem {problem.name!r} has {odd[0]!r} for one key, and lacks it for another.")
    for path, x in ours.items():
        y = theirs[path]
        if y is x or not is_array(x) or is_state(x):
            continue
        ours_parts, theirs_parts = jax.tree.leaves(x), jax.tree.leaves(y)
        pairs = list(zip(ours_parts, theirs_parts, strict=False))
        if len(ours_parts) != len(theirs_parts) or any((a.shape, a.dtype) != (b.shape, b.dtype) for a, b in pairs):
            raise StudyError(f"{path!r} of problem {problem.name!r} has another shape or dtype for another key.")
        if path not in own and not all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs):
            raise StudyError(
                f"{path!r} of problem {problem.name!r} depends on the key, and is not in its head.\n"
                f"  all trials share one base: draw {path!r} from a key of its own, or name it in Problem(head=...)"
            )


def _check_score(problem: Problem, params: Params) -> tuple[bool, Mapping[str, Any]]:
    """Whether the score is a classifier's, and ones in the shapes of its mean scores."""
    arrays, whole = arrays_only(params)
    classifies, shapes = False, {}

    def score(arrays: Mapping[str, Any], batch: Any) -> Any:
        nonlocal classifies
        outputs = problem.apply(whole(arrays), batch)
        scores = score_of(problem, outputs, batch)
        classifies = isinstance(scores, Score)
        if problem.predict is not None:
            problem.predict(outputs, batch)
        return sums_of(scores, f"problem {problem.name!r}")

    for part in ("val", "test"):
        batch = getattr(problem, part)[0]
        with told_in_words(f"apply or score of problem {problem.name!r} fails on the first batch of {part}"):
            shapes = jax.eval_shape(score, arrays, batch)
    return classifies, {name: np.ones(x.total.shape) for name, x in shapes.items()}


def _check_metric(metric: Metric, means: Mapping[str, Any]) -> None:
    """Raise `StudyError` where a metric reads scores that are not there."""
    if metric.of_outputs is not None:
        return
    with contextlib.suppress(ArithmeticError):  # of ones it need not be possible
        metric.computed(means)


def _check_loss(problem: Problem, params: Params, batch: Any, state: Collection[str]) -> None:
    """Raise `StudyError` unless the loss is a float scalar or `lk.Weighted`."""
    arrays, whole = arrays_only(params)
    key = jax.random.key(0)

    def loss(arrays: Mapping[str, Any], batch: Any) -> Any:
        params = whole(arrays)
        if problem.train_apply is None:
            outputs = problem.apply(params, batch)
        else:
            outputs = problem.train_apply(params, batch, key)
            if problem.state:
                outputs, new = outputs_and_state(problem, outputs)
                named_state(problem, new, state)
        return problem.loss(outputs, batch)

    with told_in_words(f"apply or loss of problem {problem.name!r} fails on the first training batch"):
        value = jax.eval_shape(loss, arrays, batch)
    total = value.total if isinstance(value, Weighted) else value
    if not is_array(total) or total.shape != () or not jnp.issubdtype(total.dtype, jnp.floating):
        what = f"shape {total.shape} and dtype {total.dtype}" if is_array(total) else f"type {type(total).__name__}"
        raise StudyError(
            f"the loss of problem {problem.name!r} has {what}; it must be a float scalar.\n"
            "  return the mean over the batch, or lk.Weighted(sum, weight)"
        )


def outputs_and_state(problem: Problem, returned: Any) -> tuple[Any, Any]:
    """What a `train_apply` of a problem with state returned, taken apart.

    Raises:
      StudyError: no pair of outputs and state.
    """
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise StudyError(
            f"train_apply of problem {problem.name!r} gives {'one array' if is_array(returned) else shown(returned)}; "
            "with state it must give (outputs, new state)."
        )
    return returned


def named_state(problem: Problem, given: Any, state: Collection[str]) -> dict[str, Any]:
    """The state that a training pass gave, path -> array.

    Args:
      state: the paths that it must have.

    Raises:
      StudyError: other paths.
    """
    named = flatten(given)[0]
    if odd := sorted(set(named) ^ set(state)):
        word = "does not give" if odd[0] in state else "gives, and Problem(state=...) does not name,"
        raise StudyError(
            f"train_apply of problem {problem.name!r} {word} {odd[0]!r}.\n"
            f"  its state has the paths {', '.join(sorted(state)[:3])}"
        )
    return named
