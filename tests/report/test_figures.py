"""What a figure draws is what the run holds: data and labels are read back from matplotlib's own objects."""

import json

import numpy as np
import pytest

from lorax_kit.report import RunFolderError, read_run
from lorax_kit.report import figures as drawn
from lorax_kit.report.conditions import summarise
from lorax_kit.report.figures.series import (
    BINS,
    binned_curves,
    effective_ranks,
    mean_overlaps,
    mean_spectra,
    rate_map,
    short_names,
)
from tests.report import fake_run


@pytest.fixture(scope="module")
def summary(grid):
    return summarise(read_run(grid))


def trials(grid, **where):
    rows = map(json.loads, (grid / "trials.jsonl").read_text().splitlines())
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def ends(axes):
    """The lowest and highest y of every vertical bar."""
    return [sorted(line.get_ydata()) for line in axes.lines if line.get_solid_capstyle() == "butt"]


def test_metric_by_rank_draws_every_seed_mean_and_interval(grid, summary):
    figure, caption = drawn.metric_by_rank(summary)
    (axes,) = figure.axes
    dots = [line for line in axes.lines if line.get_marker() == "o" and line.get_alpha() == 0.5]
    for condition, line in zip(summary.ladder, dots, strict=True):
        wanted = [100 * t["test_accuracy"] for t in trials(grid, rank=condition.rank, lr=condition.lr)]
        assert line.get_ydata() == pytest.approx(wanted)
        assert len(wanted) == 5
    bars = [ends(axes)[k] for k in range(len(summary.ladder))]
    intervals = [c.interval("test_accuracy") for c in summary.ladder]
    assert np.array(bars) == pytest.approx(np.array([[100 * i.low, 100 * i.high] for i in intervals]))
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "4", "8"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rank", "test accuracy (%)")
    assert "bars their 95 % intervals (t corrected for skewness, n = 5)" in caption


def test_diverged_seeds_are_written_into_the_figure(tmp_path):
    scores = {(1, 1e-3): [(0.8, 0.8)] * 3, (2, 1e-3): [(0.8, 0.8), None, None]}
    figure, caption = drawn.metric_by_rank(summarise(read_run(fake_run.from_scores(tmp_path, scores))))
    assert [text.get_text() for text in figure.axes[0].texts] == ["×2"]
    assert "×n: n seeds diverged and are not in the mean" in caption


def test_cost_by_rank_draws_parameters_and_adapter_bytes(grid, summary):
    figure, _ = drawn.cost_by_rank(summary)
    params, size = figure.axes
    for axes, key in ((params, "params"), (size, "adapter_bytes")):
        (line,) = axes.lines
        wanted = [next(t[key] for t in trials(grid, rank=rank) if t[key]) for rank in (1, 4, 8)]
        assert list(line.get_ydata()) == wanted
        assert axes.get_yscale() == "log"
    figure.canvas.draw()
    assert [t.get_text() for t in params.get_yticklabels()] == ["13.1k", "49.9k", "99.1k"]
    assert [t.get_text() for t in size.get_yticklabels()] == ["53.9 KiB", "198 KiB", "390 KiB"]
    assert (params.get_ylabel(), size.get_ylabel()) == (
        "trained parameters (log scale)",
        "adapter on disk (log scale)",
    )


def test_the_rate_map_holds_validation_means_and_lost_seeds(grid, summary):
    values, lost = rate_map(summary, summary.best.family)
    for i, lr in enumerate((3e-4, 1e-3, 3e-3)):
        for j, rank in enumerate((1, 4, 8)):
            done = [t["val_accuracy"] for t in trials(grid, rank=rank, lr=lr, status="done")]
            assert values[i, j] == pytest.approx(100 * np.mean(done))
            assert lost[i, j] == 5 - len(done)
    assert lost.sum() == 2
    figure, _ = drawn.rate_by_rank(summary)
    axes, _ = figure.axes
    assert sorted(t.get_text() for t in axes.texts) == sorted(
        f"{v:.1f}" + (f" ×{n}" if n else "") for v, n in zip(values.flat, lost.flat, strict=True)
    )
    framed = [tuple(round(x + 0.46) for x in patch.get_xy()) for patch in axes.patches]
    assert framed == [(j, summary.rates.index(c.lr)) for j, c in enumerate(summary.ladder)]
    bottom, top = axes.get_ylim()
    assert bottom < top, "higher rates are drawn higher"


def test_equal_cells_of_the_rate_map_do_not_look_like_structure(tmp_path):
    scores = {(r, lr): [(0.8 + lr, 0.8)] for r in (1, 2) for lr in (1e-3, 2e-3)}
    figure, _ = drawn.rate_by_rank(summarise(read_run(fake_run.from_scores(tmp_path, scores))))
    low, high = figure.axes[0].images[0].get_clim()
    assert high == pytest.approx(80.2)
    assert high - low == pytest.approx(1.0)


def test_curves_are_averaged_within_equal_stretches_of_steps(grid, summary):
    condition = summary.ladder[0]
    curves = binned_curves(summary.run, condition, "loss")
    assert len(curves) == 5
    for trial, (steps, losses) in zip(condition.trials, curves, strict=True):
        lines = map(json.loads, (grid / "curves.jsonl").read_text().splitlines())
        raw = np.array([line["loss"] for line in lines if line["trial"] == trial["trial"]])
        assert len(steps) == BINS == 25
        # 50 steps in 25 stretches of two; a stretch ends before its upper limit, the last one holds it.
        place = np.minimum(np.arange(1, 51) // 2, 24)
        assert losses == pytest.approx([raw[place == p].mean() for p in range(25)])
    figure, caption = drawn.loss_curves(summary)
    assert [axes.get_ylabel() for axes in figure.axes] == ["training loss", "validation loss"]
    assert "The vertical axes differ." in caption


def test_a_diverged_curve_ends_before_its_loss_is_lost(grid, summary):
    condition = next(c for c in summary.conditions if (c.rank, c.lr) == (8, 3e-3))
    assert [t["status"] for t in condition.trials[:2]] == ["diverged"] * 2
    curves = binned_curves(summary.run, condition, "loss")
    lengths = [len(steps) for steps, _ in curves]
    assert lengths == [8, 8, 25, 25, 25]  # steps 1 to 15 of 50 lie in the first eight stretches
    assert all(np.isfinite(losses).all() for _, losses in curves)


def test_spectra_are_means_over_seeds(grid, summary):
    condition = summary.ladder[1]
    records = [json.loads(line) for line in (grid / "spectra.jsonl").read_text().splitlines()]
    names = {t["trial"] for t in condition.trials}
    for site, values in mean_spectra(summary.run, condition).items():
        own = [r["singular_values"] for r in records if r["trial"] in names and r["site"] == site]
        assert len(own) == 5
        assert values == pytest.approx(np.mean(own, axis=0))
    figure, _ = drawn.singular_values(summary)
    thick = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in thick] == [1, 4, 8]
    assert figure.axes[0].get_xticks()[0] == 1


def test_effective_rank_is_the_mean_over_seeds_and_computed_where_it_was_not_recorded(tmp_path):
    run = fake_run.build(tmp_path, ranks=(2, 4), seeds=2, steps=1, probe=False, sites=fake_run.SITES[:2])
    records = [json.loads(line) for line in (run / "spectra.jsonl").read_text().splitlines()]
    wanted = effective_ranks(summarise(read_run(run)))
    for rank, column in ((2, 0), (4, 1)):
        for k, site in enumerate(fake_run.SITES[:2]):
            own = [r["effective_rank"] for r in records if (r["rank"], r["site"]) == (rank, site)]
            assert wanted[2][k, column] == pytest.approx(np.mean(own))
    for record in records:
        del record["effective_rank"]
    fake_run.write_lines(run / "spectra.jsonl", records)
    again = effective_ranks(summarise(read_run(run)))
    assert again[:2] == wanted[:2]
    np.testing.assert_allclose(again[2], wanted[2], rtol=1e-5)


def test_short_names_keep_what_tells_sites_apart():
    assert short_names(["a/x/0/k", "a/y/0/k"]) == ["x", "y"]
    assert short_names(["a/b", "a/b/c"]) == ["b", "c"]
    assert short_names(["only/one"]) == ["only/one"]
    assert short_names([]) == []


def test_figures_of_several_settings_name_the_one_they_show(tmp_path):
    run = fake_run.build(
        tmp_path, ranks=(1, 2), seeds=2, steps=2, probe=False, variants=("lora", "dora"), sites=fake_run.SITES[:2]
    )
    summary = summarise(read_run(run))
    for maker in (drawn.loss_curves, drawn.singular_values, drawn.effective_rank_by_site):
        assert f"({summary.best.family})" in maker(summary)[1]


def overlap(i, j, phi, site="a", ranks=(1, 2)):
    names = [f"r{rank}_a16_lr0.001_attention_s{seed}" for rank, seed in zip(ranks, (i, j), strict=True)]
    return {"site": site, "rank_i": ranks[0], "rank_j": ranks[1], "trial_i": names[0], "trial_j": names[1], "phi": phi}


def test_overlaps_are_means_over_sites_and_pairs_of_seeds(tmp_path):
    run = fake_run.build(tmp_path, ranks=(1, 2), seeds=2, steps=1, probe=False, spectra=False)
    records = [
        overlap(0, 0, [[0.2, 0.4]]),
        overlap(1, 1, [[0.4, None]], site="b"),
        overlap(0, 1, [[0.6], [0.8]], ranks=(2, 1)),  # the other way round
        overlap(0, 1, [[1.0, 0.5], [0.5, 0.25]], ranks=(2, 2)),
        overlap(0, 7, [[9.0, 9.0]]),  # of no trial
    ]
    fake_run.write_lines(run / "overlaps.jsonl", records)
    summary = summarise(read_run(run))
    maps = mean_overlaps(summary)
    assert list(maps) == [(1, 2), (2, 2)]
    assert maps[1, 2] == pytest.approx(np.array([[(0.2 + 0.4 + 0.6) / 3, (0.4 + 0.8) / 2]]))
    assert maps[2, 2] == pytest.approx(np.array([[1.0, 0.5], [0.5, 0.25]]))
    figure, caption = drawn.overlap_by_rank(summary)
    first, second = figure.axes[:2]
    assert (first.get_xlabel(), first.get_ylabel()) == ("directions of rank 2", "directions of rank 1")
    assert first.images[0].get_array().filled() == pytest.approx(maps[1, 2])
    assert [t.get_text() for t in second.get_yticklabels()] == ["1", "2"]
    assert "(of one rank: of two seeds)" in caption
    run_without = fake_run.build(tmp_path / "none", ranks=(1, 2), seeds=1, steps=1, spectra=False)
    assert drawn.overlap_by_rank(summarise(read_run(run_without))) == ""


@pytest.mark.parametrize("phi", [0.5, [], [[]], [[1.0], [1.0, 2.0]], [["x"]], [[True]]])
def test_a_damaged_overlap_is_named(tmp_path, phi):
    run = fake_run.build(tmp_path, ranks=(1, 2), seeds=1, steps=1, probe=False, spectra=False)
    fake_run.write_lines(run / "overlaps.jsonl", [overlap(0, 0, [[1.0]]), overlap(0, 0, phi), overlap(0, 0, [[1.0]])])
    with pytest.raises(RunFolderError, match=r"overlaps.jsonl', line 2: 'phi' is no grid of numbers"):
        read_run(run)
