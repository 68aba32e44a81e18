"""`lorax-kit analyse`: records of a study's adapters, and the sections of its report that show them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.analysis import adapter_intruders, count_intruders, delta_directions, subspace_overlap
from lorax_kit.cli import main
from lorax_kit.commands import analyse_run
from lorax_kit.core.paths import flatten
from lorax_kit.errors import StudyError
from lorax_kit.problem import Evaluator
from lorax_kit.report import read_run
from tests import tiny


def squares(p, batch):
    return jnp.tanh(batch.x @ p["first"]["kernel"]) @ p["up"]["kernel"]


@lk.problem_builder
def before():
    """What the base could do: its own hidden states, without the head."""

    def loss(outputs, batch):
        errors = jnp.sum(jnp.square(outputs - squares(tiny.params(jax.random.key(0)), batch)))
        return lk.Weighted(errors, jnp.float32(outputs.size))

    def params(key):
        return {name: tiny.params(key)[name] for name in ("first", "up")}

    return lk.Problem(
        name="hidden", params=params, apply=squares, loss=loss, train=tiny.stream, val=[tiny.points(1, 8)],
        test=[tiny.points(4, 32)],
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis") / "run"
    study = tiny.study(rank=[1, 2], seed=[0, 1, 2], steps=3)
    lk.run(study, lk.problem_at("tests.tiny:built"), out=folder, progress=False)
    return folder


def test_records_are_those_of_the_public_functions_and_the_report_draws_them(run, capsys):
    held_out = "tests.commands.test_analysis:before"
    main(["analyse", str(run), "--held-out", held_out, "--json"])
    found = json.loads(capsys.readouterr().out)
    # Sites, times two seeds of two ranks; pairs: of two ranks two seeds, of each rank one pair of seeds.
    assert (found["overlaps"], found["intruders"], found["forgetting"]) == (2 * 4, 2 * 4, 4)
    folder, base = read_run(run), tiny.params(jax.random.key(0))
    rows = {row["trial"]: row for row in folder.trials}
    pairs = {
        (rows[r["trial_i"]]["seed"], r["rank_i"], rows[r["trial_j"]]["seed"], r["rank_j"]) for r in folder.overlaps
    }
    assert pairs == {(0, 1, 0, 2), (1, 1, 1, 2), (0, 1, 1, 1), (0, 2, 1, 2)}
    record = next(r for r in folder.overlaps if r["site"] == "up/kernel" and (r["rank_i"], r["rank_j"]) == (1, 2))
    adapters = [lk.load_adapter(run / rows[record[key]]["adapter"], base=base) for key in ("trial_i", "trial_j")]
    w = flatten(base)[0]["up/kernel"]
    one, other = (delta_directions(a.plan.site("up/kernel"), w, a.factors["up/kernel"]).inputs for a in adapters)
    np.testing.assert_allclose(record["phi"], subspace_overlap(one, other), atol=1e-4)
    counted = next(r for r in folder.intruders if (r["trial"], r["site"]) == (record["trial_i"], "up/kernel"))
    (ours,) = [x for x in adapter_intruders(adapters[0].plan, base, adapters[0].factors) if x.path == "up/kernel"]
    assert counted["adapter"] == count_intruders(ours.adapter)
    assert all(r["before"] == 0 < r["after"] and (r["adapted"], r["of"]) == (1, 2) for r in folder.forgetting)
    page = (run / "report.html").read_text()
    for name in ("overlap_by_rank", "intruders_by_rank", "forgetting_by_rank"):
        assert f'<figure id="{name}">' in page
        assert (run / "plots" / f"{name}.png").stat().st_size > 0
    assert f"loss on the held-out task {held_out}" in page
    assert [row["before"] for row in found["by_rank"]] == [0, 0]
    assert [row["after"] for row in found["by_rank"]] == pytest.approx(
        [np.mean([r["after"] for r in folder.forgetting if f"r{rank}_" in r["trial"]]) for rank in (1, 2)]
    )


def test_what_is_not_finite_is_left_out_and_heads_are_not_the_studys(tmp_path):
    problem = tiny.problem()
    lk.run(tiny.study(rank=[1], seed=[0], steps=2, probe_lr=()), problem, out=tmp_path / "run", progress=False)

    def other(key):
        return tiny.params(jax.random.key(7))

    metric = lk.Metric("ppl", better="lower", of=lambda mean: np.exp(1e4 * mean["loss"]))
    lost = tiny.problem(name="lost", params=other, metrics=[metric])
    with np.errstate(over="ignore"):
        found = analyse_run(tmp_path / "run", problem=problem, held_out=lost, intruders=False, progress=False)
    assert found["by_rank"] == [{"rank": 1, "seeds": 1, "before": None, "after": None}]
    assert "nothing was measured" in (tmp_path / "run" / "report.html").read_text()
    own = tiny.problem(name="own", params=other)
    analyse_run(tmp_path / "run", problem=problem, held_out=own, intruders=False, progress=False)
    (record,) = read_run(tmp_path / "run").forgetting
    params = other(None)
    assert record["before"] == pytest.approx(Evaluator(own, params, ("up/kernel",), own.test)(params)["accuracy"])


def test_a_report_that_fails_leaves_the_earlier_records(run, monkeypatch):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    monkeypatch.setattr("lorax_kit.commands.analysis.write_report", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        analyse_run(run, seeds=1, problem=tiny.problem(), progress=False)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_bad_calls_change_nothing(run, tmp_path, capsys):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    other = tiny.problem(name="other", params=lambda key: {"w": jnp.ones((tiny.WIDTH, 2))},
                         apply=lambda p, batch: batch.x @ p["w"], head=())  # fmt: skip
    with pytest.raises(StudyError, match="'other' has no parameter that the study adapts, such as 'down/kernel'"):
        analyse_run(run, held_out=other, progress=False)
    for argv, message in (
        (["--held-out", "tests.tiny:nothing"], "cannot be imported"),
        (["--held-out", "cats"], "must be 'module:object'"),
        (["--seeds", "0"], "Invalid value for '--seeds'"),
    ):
        with pytest.raises(SystemExit) as e:
            main(["analyse", str(run), *argv])
        assert e.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["analyse", str(tmp_path)])
    assert "is not a run folder" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_damaged_records_are_named(run, tmp_path):
    for name, line in (("intruders", '{"trial": "a"}'), ("forgetting", '{"trial": 1}')):
        file = run / f"{name}.jsonl"
        kept = file.read_bytes() if file.exists() else None
        file.write_text(line + "\n")
        with pytest.raises(ValueError, match=f"{name}.jsonl', line 1: lacks"):
            read_run(run)
        file.unlink() if kept is None else file.write_bytes(kept)
