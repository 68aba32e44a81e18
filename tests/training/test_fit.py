"""The fit loop: epochs, validation, early stop, a log a program can read, and failures that say where."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.files.lines import read_lines
from tests import tiny


def setup(lr=1e-2):
    problem = tiny.problem()
    batch = next(tiny.stream(0, 0))
    spec = lk.Spec({"head/{kernel,bias}": lk.Full(), "{up,down}/kernel": lk.LoRA(rank=2)})
    plan = lk.resolve(spec, tiny.params(jax.random.key(0)), tiny.apply, batch)
    base, factors = lk.split(tiny.params(jax.random.key(0)), plan, jax.random.key(1))
    adapted = lk.adapt(tiny.apply, plan)

    def loss(base, f, b):
        logits = adapted(base, f, b)
        return problem.loss(logits, b), {"accuracy": problem.score(logits, b).correct / 16}

    init, step = lk.make_step(loss, lk.partition(optax.adamw(lr), plan))
    return step, init(factors), base


def epochs(n, steps=4):
    return [[tiny.points(100 * e + s, 16) for s in range(steps)] for e in range(n)]


def test_history_log_and_bar_agree(tmp_path, capsys):
    step, state, base = setup()
    seen = iter([{"loss": 0.9, "accuracy": 0.5}, {"loss": 0.8, "accuracy": 0.6}])
    fitted = lk.fit(step, state, base, epochs(2), evaluate=lambda _: next(seen), log=tmp_path / "log.jsonl")
    lines = read_lines(tmp_path / "log.jsonl")
    assert lines == fitted.history
    damaged = (tmp_path / "log.jsonl").read_text().replace("0.8", "0.9")
    (tmp_path / "log.jsonl").write_text(damaged)
    with pytest.raises(lk.LoraxError, match=r"log.jsonl', line 2: .*\n  mend or delete that line"):
        read_lines(tmp_path / "log.jsonl")
    assert [row["steps"] for row in lines] == [4, 8]
    assert [row["val_accuracy"] for row in lines] == [0.5, 0.6]
    out = capsys.readouterr()
    assert "Epoch 2/2" in out.out + out.err
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert f"{name}: {lines[1][name]:.4f}" in out.out + out.err
    assert fitted.stopped == "epochs"


def test_epochs_of_a_longer_training_count_on(capsys):
    step, state, base = setup()
    fitted = lk.fit(step, state, base, epochs(2), around=(3, 1))
    assert [row["epoch"] for row in fitted.history] == [4, 5]
    assert "Epoch 5/6" in capsys.readouterr().err


def test_an_epochs_loss_is_the_mean_over_its_steps():
    step, state, base = setup()
    singles = setup()
    losses, single = [], singles[1]
    for batch in epochs(1)[0]:
        single, info = singles[0](single, base, batch)
        losses.append(float(info.loss))
    fitted = lk.fit(step, state, base, epochs(1), progress=False)
    assert fitted.history[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_early_stop_returns_the_best_epochs_factors():
    step, state, base = setup()
    kept = []
    losses = iter([0.5, 0.3, 0.4, 0.35, 0.1])

    def evaluate(factors):
        kept.append([np.asarray(x).copy() for x in jax.tree.leaves(factors)])
        return {"loss": next(losses)}

    fitted = lk.fit(step, state, base, epochs(5), evaluate=evaluate, patience=2, progress=False)
    assert fitted.stopped == "early stop"
    assert len(fitted.history) == 4
    for x, y in zip(jax.tree.leaves(fitted.state.factors), kept[1], strict=True):
        np.testing.assert_array_equal(x, y)


def test_accuracy_is_better_when_higher():
    step, state, base = setup()
    values = iter([0.5, 0.6, 0.6])
    fitted = lk.fit(
        step, state, base, epochs(3), evaluate=lambda _: {"accuracy": next(values)}, patience=1,
        monitor="val_accuracy", better="higher", progress=False,
    )  # fmt: skip
    assert len(fitted.history) == 3
    assert fitted.stopped == "early stop"


@pytest.mark.parametrize(
    ("metric", "values", "better"),
    [
        ("loss", [9.0, 5.0, 7.0], None),
        ("perplexity", [9.0, 5.0, 7.0], "lower"),
        ("lossless_accuracy", [0.5, 0.9, 0.7], "higher"),
    ],
)
def test_the_best_epoch_is_best_in_the_direction_that_was_said(metric, values, better):
    step, state, base = setup()
    kept, measured = [], iter(values)

    def evaluate(factors):
        kept.append(np.asarray(factors["up/kernel"].b).copy())
        return {metric: next(measured)}

    rounds = epochs(3, steps=1)
    fitted = lk.fit(
        step, state, base, rounds, evaluate=evaluate, monitor=f"val_{metric}", better=better, patience=1, progress=False
    )
    np.testing.assert_array_equal(fitted.state.factors["up/kernel"].b, kept[1])
    assert fitted.stopped == "early stop"


@pytest.mark.parametrize(
    ("accuracies", "losses", "best"),
    [
        ([0.8, 0.9, 0.9, 0.9], [0.1, 0.5, 0.3, 0.4], 2),  # of equal ones the lower loss
        ([0.8, 0.9, 0.9, 0.9], [0.1, 0.3, 0.3, 0.4], 1),  # then the earlier
        ([0.9, 0.9, 0.8, 0.9], [float("nan"), 0.3, 0.1, 0.4], 1),
        ([float("nan"), 0.5, 0.6, 0.5], [0.1, 0.3, 0.4, 0.2], 2),
    ],
)
def test_of_equal_epochs_the_lower_loss_is_kept_then_the_earlier(accuracies, losses, best, tmp_path):
    step, state, base = setup()
    kept, measured = [], iter(zip(accuracies, losses, strict=True))

    def evaluate(factors):
        kept.append(np.asarray(factors["up/kernel"].b).copy())
        return dict(zip(("accuracy", "loss"), next(measured), strict=True))

    rounds = epochs(4, steps=1)
    fitted = lk.fit(
        step, state, base, rounds, evaluate=evaluate, monitor="val_accuracy", better="higher", progress=False
    )
    assert fitted.best == best
    np.testing.assert_array_equal(fitted.state.factors["up/kernel"].b, kept[best])


def test_a_nan_ends_training_and_names_its_step():
    step, state, base = setup()
    batches = epochs(2)
    batches[1][1] = batches[1][1]._replace(x=batches[1][1].x * np.nan)
    fitted = lk.fit(step, state, base, batches, progress=False)
    assert fitted.stopped == "loss is not finite at step 6"
    assert len(fitted.history) == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(fitted.state.factors))


@pytest.mark.parametrize(
    ("rounds", "options", "says"),
    [
        ([], {}, "no epochs"),
        ([[]], {}, "epoch 1 has no batches"),
        (epochs(1), {"patience": 1}, "no `evaluate`"),
        (
            epochs(1),
            {"evaluate": lambda _: {"loss": 1.0}, "monitor": "val_f1", "better": "higher"},
            "monitor 'val_f1' is not measured",
        ),
        (
            epochs(1),
            {"evaluate": lambda _: {}, "monitor": "val_wer"},
            "'val_wer' is better when higher or lower",
        ),
        (epochs(1), {"evaluate": lambda _: {}, "better": "min"}, "better is 'min'; it must be 'higher' or 'lower'"),
        (epochs(1), {"evaluate": lambda _: {}, "better": "higher"}, "'val_loss' is better when lower, and better is"),
    ],
)
def test_bad_calls_say(rounds, options, says):
    step, state, base = setup()
    with pytest.raises(lk.LoraxError, match=says):
        lk.fit(step, state, base, rounds, progress=False, **options)


def test_scalars_of_aux_are_shown_by_name_and_other_leaves_left_out():
    _, state, base = setup()
    aux = {"count": jnp.int32(3), "group": {"a": jnp.float32(0.5)}, "per_class": jnp.ones(3), "nothing": None}
    init, step = lk.make_step(lambda base, f, b: (jnp.float32(1) * jnp.mean(b.x), aux), optax.sgd(0.0))
    fitted = lk.fit(step, init(state.factors), base, epochs(1), progress=False)
    assert set(fitted.history[0]) == {"epoch", "steps", "loss", "count", "group/a", "seconds"}
    assert (fitted.history[0]["count"], fitted.history[0]["group/a"]) == (3.0, 0.5)


def test_the_best_factors_lie_where_the_step_left_them():
    _, _, base = setup()
    init, step = lk.sharded_step(lambda base, f, b: jnp.mean(b.x) + f["w"], optax.sgd(0.1), lk.device_mesh())
    values = iter([0.5, 0.6])
    fitted = lk.fit(
        step, init({"w": jnp.zeros(())}), base, epochs(2), evaluate=lambda _: {"loss": next(values)}, progress=False
    )
    assert len(fitted.state.factors["w"].sharding.device_set) == 4
    assert float(fitted.state.factors["w"]) == pytest.approx(-0.4)  # of the first epoch's four steps
    step(fitted.state, base, epochs(1)[0][0])
