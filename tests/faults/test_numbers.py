"""NaN and infinity in data, gradients, factors and parameters: an error or a row says which step, site or leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.cli import main
from lorax_kit.commands import Recipe, compress_subject, subject_of
from lorax_kit.compress import CompressError
from lorax_kit.training import fit
from tests import tiny
from tests.faults import made

ODD = [float("nan"), float("inf"), -float("inf")]


def odd_stream(value, step):
    def stream(seed, start):
        for number, batch in enumerate(tiny.stream(seed, start), start):
            x = np.array(batch.x)
            if number == step:
                x[3, 2:4] = value, -value  # tanh would make 1 of one infinity
            yield batch._replace(x=x)

    return stream


@lk.problem_builder
def odd(value="nan", step=0):
    """A problem whose batch of one step holds one odd value."""
    return tiny.problem(train=odd_stream(float(value), step))


def spoilt(tree, leaf, value):
    leaves, treedef = jax.tree.flatten(tree)
    leaves[leaf] = leaves[leaf].at[(0,) * leaves[leaf].ndim].set(value)
    return jax.tree.unflatten(treedef, leaves)


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("step", [0, 3])
def test_odd_data_end_a_training_at_their_step(value, step, injected):
    injected("NaN or infinity in data")
    init, step_of = lk.make_step(
        lambda base, f, batch: jnp.mean(tiny.losses(lk.adapt(tiny.apply, made.PLAN)(base, f, batch), batch)),
        optax.adam(1e-2),
    )
    batches = [b for b, _ in zip(odd_stream(value, step)(0, 0), range(6), strict=False)]
    found = fit(step_of, init(made._FRESH), made.BASE, [batches], progress=False)
    assert found.stopped == f"loss is not finite at step {step + 1}"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.state.factors))


@pytest.mark.parametrize(("loss", "says"), [(lambda s: jnp.sqrt(s * 0), "gradient"), (lambda s: s / 0, "loss")])
def test_odd_gradients_are_told_from_odd_losses(loss, says, injected):
    injected("NaN or infinity in gradients")
    init, step = lk.make_step(
        lambda base, f, batch: loss(jnp.sum(lk.adapt(tiny.apply, made.PLAN)(base, f, batch) ** 2)), optax.sgd(1e-2)
    )
    found = fit(step, init(made._FRESH), made.BASE, [[tiny.points(0, 8)]], progress=False)
    assert found.stopped == f"{says} is not finite at step 1"


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("leaf", range(len(jax.tree.leaves(made.FACTORS))))
def test_odd_factors_are_named_by_their_leaf(value, leaf, tmp_path, injected):
    factors = spoilt(made.FACTORS, leaf, value)
    name, _ = jax.tree_util.tree_leaves_with_path(factors)[leaf]
    adaptation = lk.algebra.Adaptation(made.PLAN, factors)
    for call in (
        lambda: made.save_adapter(tmp_path / "a", factors),
        lambda: made.save_peft(tmp_path / "p", factors),
        lambda: lk.merge(made.BASE, factors, made.PLAN),
        lambda: lk.algebra.combine([adaptation], "svd", rank=2, base=made.BASE),
    ):
        injected("NaN or infinity in factors")
        with pytest.raises(lk.LoraxError, match="not finite") as e:
            call()
        assert name[0].key in str(e.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ODD)
def test_a_diverged_trial_has_its_row_and_the_others_stay(value, tmp_path, injected):
    injected("NaN or infinity in a study")
    study = tiny.study(rank=[1], probe_lr=(), steps=6, stream="seed")
    good = tiny.stream

    def stream(seed, start):
        return odd_stream(value, 2)(seed, start) if seed == 1 else good(seed, start)

    found = lk.run(study, tiny.problem(train=stream), out=tmp_path / "run", progress=False)
    assert [(row["status"], row["failed_step"]) for row in found.rows] == [("done", None), ("diverged", 3)]
    assert found.rows[1]["adapter"] is None


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_train_says_at_which_step_and_leaves_no_adapter(value, tmp_path, injected, capsys):
    injected("NaN or infinity in `train`")
    (tmp_path / "t").mkdir()
    config = ["--problem", f"tests.faults.test_numbers:odd_{value}", *made.TRAIN[3:-2], "--out", str(tmp_path / "t")]
    with pytest.raises(SystemExit) as e:
        main(["train", *config])
    assert e.value.code == 2
    assert "is not finite at step 1" in capsys.readouterr().err
    assert not (tmp_path / "t" / "adapter").exists()


@lk.problem_builder
def odd_nan():
    return odd("nan")


@lk.problem_builder
def odd_inf():
    return odd("inf")


@pytest.mark.parametrize("method", ["svd", "whitened", "wanda"])
@pytest.mark.parametrize("value", ODD)
def test_odd_parameters_are_not_compressed(things, method, value, injected):
    from dataclasses import replace

    injected("NaN or infinity in parameters")
    subject = subject_of(things["trained"])
    params = subject.params | {"up": {"kernel": subject.params["up"]["kernel"].at[0, 0].set(value)}}
    recipe = Recipe(method=method, keep=0.6, batches=2)
    with pytest.raises(CompressError, match="not finite"):
        compress_subject(replace(subject, params=params), recipe, **made.QUIET)
