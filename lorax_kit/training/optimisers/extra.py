"""What optimisers may ask for beside the gradient: the loss, and functions of the factors that measure it again.

optax passes them to `update` by keyword: line searches (L-BFGS) want `value`, `grad` and `value_fn`, Polyak steps and
plateau schedules `value`, Sophia `obj_fn`, sharpness-aware steps `grad_fn`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from lorax_kit.core.specs.setting import shown
from lorax_kit.errors import LoraxError

Measure = Callable[..., Any]


def extra_arguments(value: Any, grads: Any, value_of: Measure, gradient_of: Measure) -> dict[str, Any]:
    """All that a step has: `value_of` and `gradient_of` are functions of the factors."""

    def value_fn(params: Any, obj_fn: Any = None, grad_fn: Any = None) -> Any:
        """The loss; optax's line searches insist that it consumes all extra arguments that they do not."""
        return value_of(params)

    def grad_fn(params: Any, _: Any = None) -> Any:
        return gradient_of(params)

    return {"value": value, "grad": grads, "value_fn": value_fn, "obj_fn": value_of, "grad_fn": grad_fn}


def updated(tx: Any, grads: Any, state: Any, factors: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
    """`tx.update` with what it accepts of `extra`.

    Under standard promotion: optax's bias correction mixes a float with an int32 count.

    Raises:
      LoraxError: it needs what `extra` lacks.
    """
    given = dict(extra)
    while True:
        try:
            with jax.numpy_dtype_promotion("standard"):
                return tx.update(grads, state, factors, **given)  # type: ignore[no-any-return]
        except TypeError as e:
            refused = re.search(r"unexpected keyword argument '(\w+)'", str(e))
            if refused and refused[1] in given:  # a signature tells only about the outermost of chained ones
                del given[refused[1]]
                continue
            missing = re.search(r"missing \d+ required (?:keyword-only|positional) arguments?: (.*)", str(e))
            if missing is None:
                raise
            raise LoraxError(
                f"the optimiser's update needs {missing[1]}, which a step does not have.\n"
                f"  a step passes by keyword: {', '.join(extra)}"
            ) from e
        except AttributeError as e:
            if (words := _in_words(e)) is None:
                raise
            raise LoraxError(words) from e


def started(tx: Any, factors: Any) -> Any:
    """`tx.init`, under standard promotion, too."""
    try:
        with jax.numpy_dtype_promotion("standard"):
            return tx.init(factors)
    except AttributeError as e:
        if (words := _in_words(e)) is None:
            raise
        raise LoraxError(words) from e


def _in_words(e: AttributeError) -> str | None:
    """What an optimiser cannot do with factors, where the error tells it."""
    if e.name == "fast":  # of LookaheadParams
        return (
            "optax.lookahead wants params of its own (optax.LookaheadParams, fast and slow), and factors are none.\n"
            "  choose another optimiser"
        )
    if e.name is not None and e.obj is None:
        return (
            f"the optimiser takes no tree with None in it ({e}), and leaves that a method does without are None.\n"
            "  lk.partition(tx, plan) hides them from it"
        )
    return None


def check_transformation(who: str, tx: Any) -> None:
    """Raise `LoraxError` unless `tx` has what an optax transformation has."""
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise LoraxError(f"{who} is {shown(tx)}; it must be an optax transformation, such as optax.adamw(1e-3).")


def accepting(tx: Any) -> optax.GradientTransformationExtraArgs:
    """A transformation that takes any extra argument, within `optax.partition`, and uses those it knows.

    The leaves that a method does without, None, are masked nodes to it, as those of other labels are: some optimisers
    (GaLore) mean something by None.
    """

    def init(params: Any) -> Any:
        return started(tx, _present(params))

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        extra |= {"grad": _present(extra["grad"])} if "grad" in extra else {}
        params = None if params is None else _present(params)
        updates, state = updated(tx, _present(grads), state, params, extra)
        return jax.tree.map(lambda g, u: None if g is None else u, grads, updates, is_leaf=_absent), state

    return optax.GradientTransformationExtraArgs(init, update)


def _present(tree: Any) -> Any:
    return jax.tree.map(lambda x: optax.MaskedNode() if x is None else x, tree, is_leaf=_absent)


def _absent(x: Any) -> bool:
    return x is None


def completing(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Lets the parts of an `optax.partition`, which see masked nodes for the leaves of others, measure the loss.

    The functions among the extra arguments are given the other leaves as they are.
    """

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        def whole(part: Any) -> Any:
            return jax.tree.map(lambda x, whole: whole if _masked(x) else x, part, params, is_leaf=_masked)

        def masked(tree: Any, part: Any) -> Any:
            return jax.tree.map(lambda x, whole: x if _masked(x) else whole, part, tree, is_leaf=_masked)

        if "value_fn" in extra:
            value_of, gradient_of = extra["value_fn"], extra["grad_fn"]
            extra = extra_arguments(
                extra["value"],
                extra["grad"],
                lambda part: value_of(whole(part)),
                lambda part: masked(gradient_of(whole(part)), part),
            )
        return tx.update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
