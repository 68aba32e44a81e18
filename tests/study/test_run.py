"""The run folder: what is written, what survives an interruption, and that going on equals never stopping."""

import csv
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.report import write_report
from lorax_kit.study.programs.forms import Stack, kinds, union_plan
from lorax_kit.study.programs.groups import grouped, step_bytes
from lorax_kit.study.programs.packing import pack
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Small enough for three groups of the tiny study's eight trials, whose slices hold one trial.
THREE_GROUPS = 12_000


def run(out, study=None, problem=None, **options):
    return lk.run(study or tiny.study(), problem or tiny.problem(), out=out, progress=False, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    with jax.numpy_dtype_promotion("standard"):
        return run(out, memory_bytes=THREE_GROUPS)


def rows_of(results):
    """What must not depend on when a run was interrupted."""
    skip = ("train_seconds", "compiles", "adapter_bytes")
    return [{k: v for k, v in row.items() if k not in skip} for row in results.rows]


def test_groups_share_one_program_and_every_trial_has_a_row(finished):
    info = json.loads((finished.path / "study.json").read_text())
    assert [g["trials"] for g in info["groups"]] == [3, 3, 2]
    assert finished.compiles == info["compiles"] == 1
    names = [trial.name for trial in tiny.study().trials()]
    assert [row["trial"] for row in finished.rows] == names
    assert all(row["status"] == "done" for row in finished.rows)
    assert info["trials"] == names


def test_groups_do_not_change_the_results(finished, tmp_path):
    whole = run(tmp_path / "one")
    assert [g["trials"] for g in json.loads((whole.path / "study.json").read_text())["groups"]] == [8]
    for ours, theirs in zip(finished.rows, whole.rows, strict=True):
        assert ours["test_loss"] == pytest.approx(theirs["test_loss"], abs=1e-5)


def test_csv_has_the_contract_columns_and_the_same_numbers(finished):
    write_report(finished.path)
    with open(finished.path / "results.csv", newline="") as file:
        table = {row["trial"]: row for row in csv.DictReader(file)}
    wanted = "rank alpha lr seed targets params adapter_bytes steps val_accuracy test_accuracy train_seconds compiles"
    for row in finished.rows:
        for column in wanted.split():
            assert str(row[column]) == table[row["trial"]][column]


def test_adapters_reproduce_their_rows_exactly(finished):
    problem = tiny.problem()
    base = problem.params(jax.random.key(0))
    for row in finished.rows:
        adapter = lk.load_adapter(finished.path / row["adapter"], base=base)
        merged = lk.merge(base, adapter.factors, adapter.plan)
        scores = [problem.score(problem.apply(merged, batch), batch) for batch in problem.test]
        assert sum(float(s.correct) for s in scores) / 74 == row["test_accuracy"]
        assert sum(float(s.loss) for s in scores) / 74 == pytest.approx(row["test_loss"], rel=1e-6)
        assert row["params"] == sum(x.size for x in jax.tree.leaves(adapter.factors))


class Stop(Exception):
    pass


class Killed(BaseException):
    """As if by kill -9: nothing is saved on the way out."""


CHECKED = 3
"""Batches that are read when a problem is made."""


def breaking(after, error):
    """A stream that raises at its batch number `after`, counted over all groups."""
    taken = []

    def stream(seed, start):
        for batch in tiny.stream(seed, start):
            taken.append(1)
            if len(taken) == CHECKED + after:
                raise error
            yield batch

    return stream


def check_same(resumed, finished):
    assert rows_of(resumed) == rows_of(finished)
    for row in resumed.rows:
        ours, theirs = (
            lk.load_adapter(r.path / row["adapter"], base=tiny.params(jax.random.key(0))).factors
            for r in (resumed, finished)
        )
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    ours, theirs = ((r.path / "curves.jsonl").read_text() for r in (resumed, finished))
    assert ours == theirs
    assert not (resumed.path / "training.npz").exists()


@pytest.mark.parametrize("after", [10, 30, 45], ids=["in the first group", "in the second", "in the third"])
def test_going_on_equals_no_interruption(finished, tmp_path, after):
    """20 steps a group; at batch `after` Ctrl-C, and half a line is left as by a kill."""
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(out, problem=tiny.problem(train=breaking(after, KeyboardInterrupt)), memory_bytes=THREE_GROUPS)
    done = (out / "trials.jsonl").read_text().splitlines() if (out / "trials.jsonl").exists() else []
    assert len(done) == 3 * ((after - 2) // 20)
    if done:
        assert f"{len(done)} of 8" in write_report(out).read_text()
    with open(out / "trials.jsonl", "a") as file:
        file.write('{"trial": "r1_a8')
    taken = []

    def counted(seed, start):
        for batch in tiny.stream(seed, start):
            taken.append(1)
            yield batch

    check_same(run(out, problem=tiny.problem(train=counted), memory_bytes=THREE_GROUPS), finished)
    # One batch is looked at before the run; the steps taken before the interruption are not taken again.
    assert len(taken) == CHECKED + 1 + 60 - (after - 2)


def test_going_on_after_a_kill_starts_at_the_last_save(finished, tmp_path, monkeypatch):
    from lorax_kit.study.programs import engine

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(engine, "SAVE_SECONDS", 0.0)
        stop = breaking(11, Killed)
        with pytest.raises(Killed):
            run(out, problem=tiny.problem(train=stop), memory_bytes=THREE_GROUPS)
    saved = (out / "training.npz").read_bytes()
    check_same(run(out, memory_bytes=THREE_GROUPS), finished)
    (out / "trials.jsonl").unlink()
    (out / "training.npz").write_bytes(saved[: len(saved) // 2])
    with pytest.raises(lk.StudyError, match=r"training.npz' is damaged"):
        run(out, memory_bytes=THREE_GROUPS)


def test_a_group_interrupted_while_it_was_saved_is_not_trained_again(finished, tmp_path, monkeypatch):
    from lorax_kit.study.running import outcomes

    saved = []

    def save(path, *args, **kwargs):
        if len(saved) == 4:
            raise Stop
        saved.append(path)
        return lk.save_adapter(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(outcomes, "save_adapter", save)
        with pytest.raises(Stop):
            run(tmp_path / "run", memory_bytes=THREE_GROUPS)
    # More memory the second time: the groups stay as they were.
    resumed = run(tmp_path / "run", memory_bytes=10 * THREE_GROUPS)
    check_same(resumed, finished)


def test_a_finished_run_trains_nothing(finished):
    def never(seed, start):
        yield from itertools.islice(tiny.stream(seed, start), 2)
        raise AssertionError("a finished run must not train")

    again = run(finished.path, problem=tiny.problem(train=never))
    assert again.rows == finished.rows


def test_a_diverged_trial_is_kept_apart_and_says_its_step(tmp_path):
    # Adam's steps have the size of the rate: 1e30 overflows the second loss, whatever the data.
    results = run(tmp_path / "run", tiny.study(rank=[1], lr=[1e-2, 1e30], clip=None, schedule="constant"))
    by_rate = {(row["lr"], row["seed"]): row for row in results.rows if row["rank"]}
    for seed in (0, 1):
        bad, good = by_rate[1e30, seed], by_rate[1e-2, seed]
        assert bad["status"] == "diverged"
        assert bad["failed_step"] == bad["steps"] == 2
        assert bad["adapter"] is bad["test_accuracy"] is None
        assert good["status"] == "done"
    assert results.best()["lr"] < 1
    page = write_report(results.path).read_text()
    assert "Trials that did not finish" in page
    assert "diverged" in page


def test_the_best_trial_is_best_in_the_direction_of_its_metric():
    shared = {"status": "done", "params": 10, "seconds": 1.0}
    low = shared | {"trial": "low", "val_loss": 0.1, "test_loss": 0.1, "train_loss": 0.1, "val_accuracy": 0.9}
    high = shared | {"trial": "high", "val_loss": 2.0, "test_loss": 2.0, "train_loss": 2.0, "val_accuracy": 0.5}
    bad = shared | {"trial": "nan", "val_loss": float("nan"), "test_loss": None, "val_accuracy": float("nan")}
    directions = {"train_loss": "lower", "val_loss": "lower", "test_loss": "lower", "val_accuracy": "higher"}
    results = lk.Results([high, bad, low], Path(), 1, "accuracy", directions)
    assert results.best()["trial"] == "low"
    for metric in ("val_loss", "test_loss", "train_loss", "val_accuracy"):
        assert results.best(metric)["trial"] == "low"
    assert results.best("seconds", better="lower")["trial"] in ("low", "high")
    perfect = [{**low, "trial": "lost", "val_loss": 0.5}, {**low, "trial": "perfect", "val_loss": 0.0}]
    assert lk.Results(perfect, Path(), 1, "accuracy", directions).best()["trial"] == "perfect"
    with pytest.raises(lk.LoraxError, match="whether 'seconds' is better when higher or lower is not known"):
        results.best("seconds")
    with pytest.raises(lk.LoraxError, match="'val_loss' is better when lower, and better is 'higher'"):
        results.best("val_loss", better="higher")


def test_validations_along_the_way_are_in_the_curves_and_end_at_the_rows_numbers(tmp_path):
    results = run(tmp_path / "run", tiny.study(rank=[1, 2], eval_every=8))
    curves = [json.loads(line) for line in (results.path / "curves.jsonl").read_text().splitlines()]
    for row in results.rows:
        own = [c for c in curves if c["trial"] == row["trial"]]
        assert [c["step"] for c in own] == list(range(1, 21))
        assert [c["step"] for c in own if "val_loss" in c] == [8, 16, 20]
        assert own[-1]["val_loss"] == pytest.approx(row["val_loss"], abs=1e-6)
        assert own[-1]["val_accuracy"] == row["val_accuracy"]
        assert row["train_loss"] == pytest.approx(np.mean([c["loss"] for c in own[-2:]]), rel=1e-6)


def test_two_runs_at_once_are_refused(tmp_path):
    """The second comes while the first trains: it says so, and the first ends as if alone."""
    refused = []

    def train(seed, start):
        for i, batch in enumerate(tiny.stream(seed, start)):
            if i == 5 and start == 0 and not refused:
                refused.append(1)
                with pytest.raises(lk.StudyError, match="another process is writing"):
                    run(tmp_path / "run", tiny.study(rank=[1], probe_lr=()))
            yield batch

    results = run(tmp_path / "run", tiny.study(rank=[1], probe_lr=()), tiny.problem(train=train))
    assert refused
    assert [row["status"] for row in results.rows] == ["done", "done"]


def snapshot(path):
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} if path.exists() else None


def empty_stream(seed, start):
    return iter(())


BAD_RUNS = [
    ({"targets": {"upper": ["zzz/kernel"]}}, {}, {}, "matches no parameter"),
    ({"rank": 9}, {}, {}, "above min(in, out) = 8"),
    ({"variant": "lorra"}, {}, {}, "variant 'lorra' is unknown"),
    ({"settings": {"lora": {"dropout": 0.5}}}, {}, {}, "hold dropout, for which the study has its own key"),
    ({"settings": {"lora": {"variant": "dora"}}}, {}, {}, "hold variant, for which the study has its own key"),
    ({"settings": {"lora": {"start": "eva"}}}, {}, {}, "hold start, for which the study has its own key"),
    ({"settings": {"lora": {"freezea": True}}}, {}, {}, "has the unknown key 'freezea'"),
    ({"settings": {"lora": 3}}, {}, {}, "they must be an object"),
    ({}, {"train": empty_stream}, {}, "the data set is empty"),
    ({}, {"test": []}, {}, "no validation or test examples"),
    ({}, {}, {"memory_bytes": 10}, "one trial needs about"),
]


@pytest.mark.parametrize(("study", "problem", "options", "says"), BAD_RUNS)
def test_bad_runs_say_so_and_write_nothing(tmp_path, study, problem, options, says):
    with pytest.raises(lk.LoraxError) as e:
        run(tmp_path / "run", tiny.study(**study), tiny.problem(**problem), **options)
    assert says in str(e.value)
    assert len(str(e.value).splitlines()) <= 4
    assert not (tmp_path / "run").exists()


def keyed(fixed):
    """Params whose layer `up` is drawn from the key, or from one of its own."""

    def params(key):
        own = jax.random.key(5) if fixed else key
        return tiny.params(key) | {"up": {"kernel": jax.random.normal(own, (8, 9))}}

    return params


def reshaped(key):
    return tiny.params(key) | {"other": jnp.zeros(3 if (key == jax.random.key(0)).all() else 4)}


def ending(seed, start):
    return iter([tiny.points(step, 16) for step in range(start, 12)])


CONTRACTS = [
    ({"params": keyed(False)}, "'up/kernel' of problem 'points' depends on the key, and is not in its head."),
    ({"params": reshaped}, "'other' of problem 'points' has another shape or dtype for another key."),
    ({"val": iter([tiny.points(1, 32)])}, "val of problem 'points' is a list_iterator; it is read many times."),
    ({"score": tiny.losses}, "score of problem 'points' is an array of shape (32,)"),
]


@pytest.mark.parametrize(("changes", "says"), CONTRACTS)
def test_a_problem_that_breaks_its_contract_is_refused_before_anything_is_written(tmp_path, changes, says):
    with pytest.raises(lk.StudyError) as e:
        run(tmp_path / "run", tiny.study(rank=[1], probe_lr=()), tiny.problem(**changes))
    assert says in str(e.value)
    assert not (tmp_path / "run").exists()


def test_a_mesh_without_an_axis_of_trials_is_named(tmp_path):
    with pytest.raises(lk.StudyError, match=r"axes 'data'; .* over 'trial'.\n  mesh=lk.device_mesh\('trial'\)"):
        run(tmp_path / "run", mesh=lk.device_mesh())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stream", ["shared", "seed"])
def test_training_batches_that_end_are_named(tmp_path, stream):
    with pytest.raises(lk.StudyError, match="batches of problem 'points' end before step 13 of 20"):
        run(tmp_path / "run", tiny.study(rank=[1], probe_lr=(), stream=stream), tiny.problem(train=ending))


def test_a_base_of_other_buffers_but_the_same_values_is_studied(tmp_path):
    study = tiny.study(rank=[1], seed=[0, 1], probe_lr=(), steps=1, variant="dora", lr=1e-9)
    found = run(tmp_path / "run", study, tiny.problem(params=keyed(True)))
    base = keyed(True)(jax.random.key(0))
    adapter = lk.load_adapter(found.path / "adapters" / found.rows[1]["trial"], base=base)
    merged = lk.merge(base, adapter.factors, adapter.plan)["up"]["kernel"]
    np.testing.assert_allclose(merged, base["up"]["kernel"], atol=1e-6)


def test_another_study_in_the_folder_is_refused_and_kept(finished):
    before = snapshot(finished.path)
    for study, problem in (
        (tiny.study(steps=21), tiny.problem()),
        (tiny.study(), tiny.problem(facts={"settings": {"width": 7}})),
    ):
        with pytest.raises(lk.StudyError, match="holds another study"):
            run(finished.path, study, problem)
    other = tiny.problem(params=lambda key: tiny.params(key) | {"first": {"kernel": jnp.zeros((6, 8))}})
    with pytest.raises(lk.StudyError, match=r"in base\).\n  'first/kernel', float32 of shape \(6, 8\), holds"):
        run(finished.path, tiny.study(), other)
    with pytest.raises(lk.PlanError):
        run(finished.path, tiny.study(targets={"upper": ["zzz"]}), overwrite=True)
    assert snapshot(finished.path) == before


def test_a_folder_of_other_things_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(lk.StudyError, match="holds no study"):
            run(tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(lk.StudyError, match="is a file"):
        run(tmp_path / "thesis.tex")


def test_overwrite_starts_anew(tmp_path):
    one = run(tmp_path / "run", tiny.study(rank=[1], probe_lr=()))
    two = run(tmp_path / "run", tiny.study(rank=[2], probe_lr=()), overwrite=True)
    assert {p.name for p in (tmp_path / "run" / "adapters").iterdir()} == {row["trial"] for row in two.rows}
    assert one.rows[0]["trial"] not in (tmp_path / "run" / "trials.jsonl").read_text()


def test_a_damaged_results_file_names_its_line(tmp_path):
    results = run(tmp_path / "run", tiny.study(rank=[1], probe_lr=()))
    file = results.path / "trials.jsonl"
    file.write_text("{broken\n" + file.read_text())
    with pytest.raises(lk.StudyError, match="line 1 is not the JSON of a trial"):
        run(results.path, tiny.study(rank=[1], probe_lr=()))


def test_group_sizes_follow_the_budget_and_divide_over_devices():
    study, problem = tiny.study(seed=range(4)), tiny.problem()
    ((trials, form),) = kinds(study, problem, study.trials())
    params = problem.params(jax.random.key(0))
    batch = next(problem.train(0, 0))
    plan = union_plan(study, problem, trials, params, batch)
    for budget, devices in ((20_000, 1), (40_000, 1), (10**9, 1), (20_000, 4), (10**9, 3)):
        groups = grouped(study, problem, Stack(trials, plan, form), params, batch, budget=budget, devices=devices)
        assert [t for g in groups for t in g.trials] == list(trials)
        assert all(g.size % devices == 0 and len(g.trials) <= g.size for g in groups)
        assert len({g.size for g in groups}) == 1
        assert groups[0].estimated_bytes <= budget


def test_the_memory_estimate_is_near_what_xla_allocates():
    """Wide layers, where workspace and alignment no longer matter; DESIGN asks for an estimate, not a bound."""

    def params(key):
        rng = np.random.default_rng(0)
        sizes = {"first": (6, 256), "up": (256, 512), "down": (512, 256)}
        p = {k: {"kernel": np.asarray(rng.normal(size=s) / 16, np.float32)} for k, s in sizes.items()}
        return p | {"head": {"kernel": np.zeros((256, 2), np.float32), "bias": np.zeros(2, np.float32)}}

    def train(seed, start):
        while True:
            yield tiny.points(seed, 512)

    study, problem = tiny.study(seed=range(2)), tiny.problem(params=params, train=train)
    trials = study.trials()
    base, batch = params(None), next(train(0, 0))
    plan = union_plan(study, problem, trials, base, batch)
    stacked = pack(study, problem, trials, plan, base)
    adapted = lk.adapt(problem.apply, plan, trials=len(trials))

    def losses(factors):
        return jax.vmap(lambda f: problem.loss(adapted(base, f, batch), batch))(factors)

    from lorax_kit.study.programs.engine import Engine
    from lorax_kit.study.programs.slices import Layout

    engine = Engine(study, problem, plan, base, Layout(len(trials), len(trials)))
    compiled = engine.compile(*engine.begin(stacked), batch).memory_analysis()
    actual = compiled.temp_size_in_bytes + compiled.output_size_in_bytes
    assert 0.6 < step_bytes(losses, stacked.factors) / actual < 1.6


def test_params_with_keys_counters_and_settings_are_studied(tmp_path):
    """Leaves that are no weights: JAX cannot turn a key into numpy's array, nor `jit` take a string."""

    def params(key):
        return tiny.params(key) | {
            "rng": jax.random.key(3),
            "count": jnp.uint32(0),
            "act": "tanh",
            "on": True,
            "none": None,
        }

    def apply(p, batch):
        assert (p["act"], p["on"], p["none"]) == ("tanh", True, None)
        noise = jax.random.normal(jax.random.fold_in(p["rng"], p["count"]), batch.x.shape)
        return tiny.apply(p, batch._replace(x=batch.x + 0 * noise))

    study = tiny.study(rank=[1, 2], seed=[0], probe_lr=(), steps=3)
    odd = run(tmp_path / "odd", study, tiny.problem(params=params, apply=apply))
    plain = run(tmp_path / "plain", study)
    assert [r["test_loss"] for r in odd.rows] == pytest.approx([r["test_loss"] for r in plain.rows], abs=1e-6)
    adapter = odd.path / "adapters" / odd.rows[0]["trial"]
    lk.load_adapter(adapter, base=params(jax.random.key(9)) | {"count": jnp.uint32(5)})
