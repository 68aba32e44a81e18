"""What an attack on studies found: wrong numbers in silence, lost work, raw errors. Each stands for a kind."""

import json
from functools import partial
from types import SimpleNamespace

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.cli import main
from lorax_kit.study.design.trial import Trial
from lorax_kit.study.programs.groups import Group
from lorax_kit.study.programs.progress import Progress
from lorax_kit.study.programs.slices import Layout
from lorax_kit.study.running.race import Race
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")


def study(**changes):
    return tiny.study(**{"probe_lr": (), "rank": [1, 2], "seed": [0, 1], "steps": 12} | changes)


def run(out, one, problem=None, **options):
    return lk.run(one, problem or tiny.problem(), out=out, progress=False, **options)


def breaking(after, error):
    taken = []

    def stream(seed, start):
        for batch in tiny.stream(seed, start):
            taken.append(1)
            if len(taken) == 3 + after:
                raise error
            yield batch

    return stream


def test_a_race_of_several_programs_decides_alike_after_a_kill(tmp_path):
    """All trials of one program are stopped at the first rung; a resumed race must still count them."""
    one = study(rank=[1, 2], optimizer=["sgd", "adamw"], lr=[1e-2, 3e-2], stop=lk.Halving(first=3), steps=18)
    whole = run(tmp_path / "whole", one)
    for after in (6, 8, 9, 12, 15):
        out = tmp_path / str(after)
        with pytest.raises(SystemError):
            run(out, one, tiny.problem(train=breaking(after, SystemError)))
        again = run(out, one)
        assert [(r["status"], r["steps"]) for r in again.rows] == [(r["status"], r["steps"]) for r in whole.rows]
        assert [r["test_loss"] for r in again.rows] == [r["test_loss"] for r in whole.rows]


def test_a_race_does_not_grow(tmp_path):
    one = study(stop=lk.Halving(first=3))
    first = run(tmp_path / "run", one)
    assert run(tmp_path / "run", one).rows == first.rows
    with pytest.raises(lk.StudyError, match="it does not grow"):
        run(tmp_path / "run", study(stop=lk.Halving(first=3), seed=range(3)))


def test_a_condition_with_a_diverged_seed_is_judged_with_it():
    """Rank 4 has the best seed and loses the other: by its survivor alone it would be the best condition."""
    trials = [Trial(rank=r, alpha=1, lr=1e-3, seed=s, targets="t") for r in (1, 2, 4) for s in (0, 1)]
    accuracy = {1: 0.6, 2: 0.5, 4: 0.9}
    stopped = []
    session = SimpleNamespace(
        problem=tiny.problem(),
        store=None,
        outcomes=SimpleNamespace(keep_stopped=lambda group, trial, slot: stopped.append((trial.rank, trial.seed))),
    )
    race = Race(session, session, lk.Halving(first=2), [[Group(trials, Layout(6, 6), None, None, 0)]])
    for trial in trials:
        failed = int(trial.rank == 4 and trial.seed == 1)
        evaluations = [(2, [{"accuracy": accuracy[trial.rank]}])]
        race.slots[trial.name] = Progress([], np.zeros((2, 1)), np.array([failed]), evaluations, 0.0)
    race._decide(trials, 2)
    assert {trial.rank for group in race.groups[0] for trial in group.trials} == {1}
    assert sorted(stopped) == [(2, 0), (2, 1), (4, 0), (4, 1)]


def staged(learning_rate, weight_decay=0.0):
    """An optimiser that compares its decay in Python, so that it cannot be traced."""
    return optax.adamw(learning_rate, weight_decay=weight_decay) if weight_decay > 0 else optax.adam(learning_rate)


def test_scalars_that_cannot_be_traced_are_each_trials_own(tmp_path):
    one = study(optimizer=staged, weight_decay=[0.1, 5.0], rank=[2], seed=[0])
    together = {row["weight_decay"]: row["test_loss"] for row in run(tmp_path / "both", one).rows}
    alone = run(tmp_path / "one", study(optimizer=staged, weight_decay=5.0, rank=[2], seed=[0])).rows[0]
    assert together[5.0] == pytest.approx(alone["test_loss"], abs=1e-6)
    assert together[0.1] != together[5.0]


@pytest.mark.parametrize("first", [0, 1])
def test_a_scalar_of_the_loss_in_one_grid_alone_is_read_there(tmp_path, first):
    def loss(logits, batch, weight=1.0):
        return weight * jnp.mean(tiny.losses(logits, batch))

    grids = [{"rank": 1}, {"rank": 2, "hyper": {"weight": 6.0}}]
    one = study(grids=grids if first else grids[::-1], seed=[0], steps=2)
    rows = {row["rank"]: row["train_loss"] for row in run(tmp_path / "run", one, tiny.problem(loss=loss)).rows}
    assert rows[2] > 4 * rows[1]


def test_trials_that_differ_have_names_that_differ():
    rates = [1e-3, 1.0000001e-3, 1.000002e-3]
    assert len({t.name for t in study(lr=rates, rank=1, seed=0).trials()}) == 3
    assert len(study(hyper={"b2": [0.9999990, 0.9999991]}, rank=1, seed=0).trials()) == 2
    with pytest.raises(lk.StudyError, match="two trials of the study have the same name"):
        study(targets={"u": ["up/kernel"], "u_b8": ["up/kernel"]}, batch_size=[None, 8])


CHANGED = [
    {"apply": lambda p, b: 2.0 * tiny.apply(p, b)},
    {"metrics": [lk.Metric("accuracy", better="lower", of="correct")]},
]


@pytest.mark.parametrize("changes", CHANGED, ids=["apply", "direction"])
def test_a_folder_refuses_another_model_or_metric(tmp_path, changes):
    run(tmp_path / "run", study(rank=[1], seed=[0], steps=2))
    with pytest.raises(lk.StudyError, match=r"differs in metrics|the untrained model measures"):
        run(tmp_path / "run", study(rank=[1, 2], seed=[0], steps=2), tiny.problem(**changes))


def test_intervals_draw_whole_numbers_on_axes_of_whole_numbers_alone():
    ranges = {"weight_decay": {"low": 0, "high": 1}, "rank": {"low": 1, "high": 8, "log": True}}
    points = lk.Sample(conditions=16, ranges=ranges).points()
    assert all(isinstance(p["rank"], int) and 1 <= p["rank"] <= 8 for p in points)
    assert len({p["weight_decay"] for p in points}) > 8
    with pytest.raises(lk.StudyError, match="of that axis give a list"):
        lk.Sample(conditions=2, ranges={"rank": {"low": 1.5, "high": 4}})


def test_a_metric_that_cannot_be_computed_does_not_end_a_study(tmp_path):
    def risky(predictions, batches):
        value = float(np.abs(np.concatenate(predictions)).max())
        if value > 1:
            raise ValueError("no such value")
        return value

    problem = tiny.problem(metrics=["accuracy", lk.Metric("largest", better="lower", of_outputs=risky)])
    with pytest.warns(UserWarning, match="metric 'largest' of 'points' cannot be computed"):
        rows = run(tmp_path / "run", study(lr=[1e-3, 1.0], rank=[1], seed=[0], clip=None), problem).rows
    assert len(rows) == 2
    assert all(row["test_accuracy"] is not None for row in rows)
    assert json.loads((tmp_path / "run" / "trials.jsonl").read_text().splitlines()[1])["test_largest"] is None


EARLY = [
    (study(variant="dora", optimizer="schedule_free_adamw"), "do not average the gains of dora"),
    (study(lr_ratio=4.0, optimizer="schedule_free_adamw"), "lr_ratio scales updates"),
    (study(accumulate=5), "does not divide into accumulate=5"),
    (study(hyper={"nothing": 1.0}), "is read by nothing"),
]


@pytest.mark.parametrize(("one", "says"), EARLY, ids=[says[:20] for _, says in EARLY])
def test_what_a_step_cannot_do_is_known_before_anything_is_written(tmp_path, one, says):
    with pytest.raises(lk.LoraxError, match=says):
        run(tmp_path / "run", one)
    assert not (tmp_path / "run").exists()


def test_an_optimiser_with_a_random_state_goes_on_to_the_same_bits(tmp_path):
    one = study(optimizer="noisy_sgd", lr=1e-2, rank=[1], seed=[0], schedule="constant")
    whole = run(tmp_path / "whole", one)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", one, tiny.problem(train=breaking(7, KeyboardInterrupt)))
    assert run(tmp_path / "run", one).rows[0]["test_loss"] == whole.rows[0]["test_loss"]


def test_functions_in_grids_have_names_and_two_of_one_name_are_refused(tmp_path):
    one = study(grids=[{"optimizer": staged, "rank": 1}], seed=[0], steps=2)
    assert run(tmp_path / "run", one).rows[0]["optimizer"].endswith(":staged")
    with pytest.raises(lk.StudyError, match="two optimisers of the study are named"):
        study(optimizer=[partial(optax.sgd, momentum=0.1), partial(optax.sgd, momentum=0.9)])


def test_what_a_sample_draws_is_checked():
    for ranges, says in (
        ({"variant": ["lora", "nope"]}, "variant 'nope' is unknown"),
        ({"targets": ["upper", "nope"]}, "targets 'nope' of a grid are unknown"),
    ):
        with pytest.raises(lk.StudyError, match=says):
            study(sample={"conditions": 4, "ranges": ranges})


def test_a_seed_stream_grows_by_a_smaller_seed(tmp_path):
    run(tmp_path / "run", study(rank=[1], seed=[2], stream="seed", steps=3))
    assert len(run(tmp_path / "run", study(rank=[1], seed=[0, 2], stream="seed", steps=3)).rows) == 2


def test_an_adapters_own_folder_is_not_searched_for_its_problem(tmp_path, monkeypatch, capsys):
    params = tiny.params(jax.random.key(0))
    plan = lk.resolve(lk.Spec({"up/kernel": lk.LoRA(rank=1)}), params, tiny.apply, tiny.points(0, 4))
    base, factors = lk.split(params, plan, jax.random.key(0))
    meta = {"problem": "x", "settings": {}, "address": "evil_module_of_adapter:x"}
    lk.save_adapter(tmp_path / "a", plan, factors, base=base, meta=meta)
    (tmp_path / "a" / "evil_module_of_adapter.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(SystemExit) as e:
        main(["evaluate", "."])
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert "the working directory is not searched" in said
    assert "--problem evil_module_of_adapter:x" in said
    monkeypatch.setenv("PYTHONPATH", ".")  # which says that it is trusted
    with pytest.raises(SystemExit, match="ran"):
        main(["evaluate", "."])


def test_an_adapter_of_a_quantised_study_is_compressed(tmp_path):
    from lorax_kit.commands import adapter_subject

    found = run(tmp_path / "run", study(quantise="int8", rank=[2], seed=[0], steps=2))
    subject = adapter_subject(found.path / found.rows[0]["adapter"], tiny.problem())
    quality = subject.quality(subject.apply, subject.params)
    assert quality.value("accuracy") == pytest.approx(found.rows[0]["test_accuracy"])


def test_a_step_that_only_the_compiler_refuses_is_named(tmp_path):
    odd = jex.Primitive("odd")
    odd.def_abstract_eval(lambda x: x)

    def loss(logits, batch):
        return jnp.mean(tiny.losses(logits, batch)) + odd.bind(jnp.float32(0))

    with pytest.raises(
        lk.StudyError, match="the training step of problem 'points' does not compile: NotImplementedError"
    ):
        run(tmp_path / "run", study(), tiny.problem(loss=loss))


def test_a_dry_run_over_a_damaged_folder_names_the_line(tmp_path, capsys):
    design = {"rank": [1], "alpha": 8, "lr": 1e-2, "seed": [0], "targets": tiny.TARGETS, "steps": 4}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"problem": {"address": "tests.tiny:built", "rows": 48}, "study": design}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trials.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit):
        main(["study", "--config", str(config), "--out", str(tmp_path / "run"), "--dry-run"])
    assert "line 1 is not the JSON of a trial" in capsys.readouterr().err
