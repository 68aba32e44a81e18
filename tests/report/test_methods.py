"""Methods side by side, and quality against cost: each number from an independent computation."""

import json

import numpy as np
import pytest

from lorax_kit.analysis.statistics.conditions import holm, interval, paired_test
from lorax_kit.report import figures as drawn
from lorax_kit.report import read_run, write_report
from lorax_kit.report.claims import methods_compared
from lorax_kit.report.conditions import summarise
from lorax_kit.report.figures.pareto import cost_of, pareto_front
from lorax_kit.report.tables.methods import method_rows
from tests.report import fake_run


def name_trials_of_groups(run):
    """One group per variant, as a writer that names its trials leaves it; DoRA takes more time and memory."""
    rows = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    info = json.loads((run / "study.json").read_text())
    info["groups"] = []
    for variant, size in (("lora", 2e6), ("dora", 3e6)):
        names = [r["trial"] for r in rows if r["variant"] == variant]
        info["groups"].append({"trials": len(names), "size": 20, "names": names, "temp_bytes": 20 * size})
    (run / "study.json").write_text(json.dumps(info))
    slower = {"lora": 2.0, "dora": 3.0}
    fake_run.write_lines(run / "trials.jsonl", [r | {"train_seconds": slower[r["variant"]]} for r in rows])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = fake_run.build(
        tmp_path_factory.mktemp("methods") / "run",
        ranks=(1, 4),
        rates=(1e-3, 3e-3),
        seeds=6,
        steps=2,
        variants=("lora", "dora", "vera"),
        spectra=False,
        change=lambda t: {"val_accuracy": t["val_accuracy"] - 0.1 * (t["variant"] == "vera")},
    )
    return folder


def test_every_method_is_shown_at_its_own_best_rank_and_rate(run):
    trials = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    cells = {}
    for t in trials:
        if t["rank"]:
            cells.setdefault((t["variant"], t["rank"], t["lr"]), []).append(t)

    def val(key):
        return np.mean([t["val_accuracy"] for t in cells[key]])

    best = {v: max((k for k in cells if k[0] == v), key=val) for v in ("lora", "dora", "vera")}
    order = sorted(best, key=lambda v: -val(best[v]))
    assert order[-1] == "vera"
    rows = method_rows(summarise(read_run(run)))
    assert [r["setting"] for r in rows] == [f"attention, {v}, α = 16" for v in order]
    test = {v: np.array([t["test_accuracy"] for t in sorted(cells[best[v]], key=lambda t: t["seed"])]) for v in best}
    p = {v: paired_test(test[v], test["lora"]) for v in ("dora", "vera")}
    adjusted = dict(zip(p, holm(list(p.values())), strict=True))
    for v, row in zip(order, rows, strict=True):
        _, rank, lr = best[v]
        assert (row["rank"], row["rate"], row["tried"], row["seeds"]) == (str(rank), f"{lr:g}", "4", "6")
        assert row["metric"].startswith(f"{100 * test[v].mean():.1f} [")
        if v == "lora":
            assert (row["difference"], row["p"]) == ("reference", "")
            continue
        gap = interval(test[v] - test["lora"])
        shown = [f"{100 * x:+.2f}".replace("-", "−") for x in gap[:3]]
        assert row["difference"] == f"{shown[0]} [{shown[1]}, {shown[2]}]"
        assert row["p"] == f"{adjusted[v]:.3f}"


def test_the_figure_of_methods_draws_every_seed(run):
    summary = summarise(read_run(run))
    figure, caption = drawn.methods(summary)
    (axes,) = figure.axes
    dots = [line.get_xdata() for line in axes.lines if line.get_alpha() == 0.5]
    compared = methods_compared(summary)
    for condition, seeds in zip(compared.conditions, dots, strict=True):
        assert seeds == pytest.approx(100 * condition.values("test_accuracy"))
    assert [t.get_text().split("\n")[0] for t in axes.get_yticklabels()] == [str(c.family) for c in compared.conditions]
    assert "the mean of the reference, attention, lora, α = 16" in caption


def test_a_run_of_one_method_has_no_such_table(tmp_path):
    one = fake_run.build(tmp_path, ranks=(1, 4), seeds=2, steps=1, spectra=False)
    assert method_rows(summarise(read_run(one))) == []
    assert 'id="methods-heading"' not in write_report(one).read_text()


FRONTS = {
    "higher": ([3, 1, 2, 2], [0.9, 0.7, 0.6, 0.8], [1, 3, 0]),
    "lower": ([3, 1, 2, 2], [0.9, 0.7, 0.6, 0.8], [1, 2]),
    "equal": ([1, 1, 2], [0.5, 0.5, 0.5], [0]),
    "missing": ([float("nan"), 1, 2], [0.9, float("nan"), 0.1], [2]),
}


@pytest.mark.parametrize(("costs", "values", "front"), FRONTS.values(), ids=FRONTS)
def test_the_front_knows_the_direction(costs, values, front, request):
    better = "lower" if "lower" in request.node.name else "higher"
    assert pareto_front(costs, values, better) == front


def test_quality_is_drawn_against_every_cost_that_differs(tmp_path):
    run = fake_run.build(
        tmp_path, ranks=(1, 4), seeds=3, steps=1, variants=("lora", "dora"), spectra=False, probe=False
    )
    figure, _ = drawn.quality_by_cost(summarise(read_run(run)))
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["trained parameters (log scale)", "adapter on disk (log scale)"], "the seconds are all equal"
    name_trials_of_groups(run)
    summary = summarise(read_run(run))
    figure, caption = drawn.quality_by_cost(summary)
    assert [axes.get_xlabel() for axes in figure.axes][2:] == [
        "training time of a trial, s",
        "memory of a stacked trial",
    ]
    memory = {c.family.variant: cost_of(summary.run, c, "memory") for c in summary.conditions}
    assert memory == {"lora": 2e6, "dora": 3e6}
    assert "Memory is a trial's share" in caption
    chosen = [c for ladder in summary.ladders.values() for c in ladder]
    for axes, cost in zip(figure.axes, ("params", "adapter_bytes", "train_seconds", "memory"), strict=True):
        costs = [cost_of(summary.run, c, cost) for c in chosen]
        means = [c.mean("test_accuracy") for c in chosen]
        wanted = pareto_front(costs, means, "higher")
        front = axes.lines[0]
        assert list(front.get_xdata()) == [costs[i] for i in wanted]
        assert front.get_ydata() == pytest.approx([100 * means[i] for i in wanted])
