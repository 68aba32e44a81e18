"""Runs side by side: what differs is named, seeds are paired only where problem, base and data are the same."""

import re

import numpy as np
import pytest

from lorax_kit.analysis.statistics.conditions import holm, interval, paired_test, unpaired
from lorax_kit.report import RunFolderError, write_side_by_side
from lorax_kit.report.tables.together import together_rows, together_table
from lorax_kit.report.together import read_together
from tests.report import fake_run


def identity(base="ab" * 32):
    return {"problem": "sentiment", "base": base, "data": "d0" * 32}


def run(folder, scores, name, **study):
    return fake_run.from_scores(folder / name, scores, **({"name": name, "identity": identity()} | study))


def scores(shift, ranks=(1, 4), seeds=6):
    rng = np.random.default_rng(3)
    luck, gain = rng.normal(0, 0.01, (len(ranks), seeds)), rng.normal(1, 0.2, (len(ranks), seeds))
    tests = 0.8 + luck + shift * gain
    return {(rank, 1e-3): [(0.8 + 0.01 * k, float(x)) for x in tests[k]] for k, rank in enumerate(ranks)}


def test_common_conditions_are_paired_by_seed(tmp_path):
    a, b = scores(0.0), scores(0.01, ranks=(1, 4, 8))
    together = read_together([run(tmp_path, a, "a"), run(tmp_path, b, "b")])
    assert (together.names, together.same, together.by_rank) == (("a", "b"), (True, True), False)
    assert [row.rank for row in together.rows] == [1, 4]
    p = []
    for row in together.rows:
        x, y = (np.array([test for _, test in found[row.rank, 1e-3]]) for found in (a, b))
        cell = row.cells[1]
        assert (cell.pairs, cell.difference[:3]) == (6, pytest.approx(interval(y - x)[:3]))
        p.append(paired_test(y, x))
    assert [row.cells[1].p_holm for row in together.rows] == pytest.approx(holm(p).tolist())
    assert together.best.cells[1].condition.rank == 8


OTHERS = {
    "another base": {"identity": identity("cd" * 32)},
    "no identity": {"identity": None},
}


@pytest.mark.parametrize("study", OTHERS.values(), ids=OTHERS)
def test_other_runs_are_compared_unpaired_and_it_is_said(tmp_path, study):
    a, b = scores(0.0), scores(0.01)
    runs = [run(tmp_path, a, "a"), run(tmp_path, b, "b", **study)]
    together = read_together(runs)
    for row in together.rows:
        x, y = (np.array([test for _, test in found[row.rank, 1e-3]]) for found in (a, b))
        assert row.cells[1].difference[:3] == pytest.approx(unpaired(y, x)[:3])
        assert (row.cells[1].pairs, np.isnan(row.cells[1].p_holm)) == (0, True)
    page = " ".join(write_side_by_side(runs, tmp_path / "page.html").read_text().split())
    assert "b differs from a in problem, base or data, or a run did not record them: differences are unpaired" in page
    assert "differences are paired" not in page


def test_what_differs_is_named(tmp_path):
    task = {"name": "sentiment", "settings": {"length": 48, "source": "imdb"}}
    other = {"name": "sentiment", "settings": {"length": 64, "source": "imdb"}}
    own, longer = {"steps": 100, "stream": "seed"}, {"steps": 200, "stream": "seed"}
    one = run(tmp_path, scores(0.0), "a", task=task, design=own)
    two = run(tmp_path, scores(0.0), "b", task=other, design=longer, identity=identity("cd" * 32))
    together = read_together([one, two])
    assert together.differing == (
        ("design", "steps", ("100", "200")),
        ("problem", "settings.length", ("48", "64")),
        ("base", "base", ("ab" * 6, "cd" * 6)),
    )


def test_runs_of_different_methods_are_compared_by_rank(tmp_path):
    common = {"ranks": (1, 4), "seeds": 3, "steps": 1, "spectra": False}
    folders = [
        fake_run.build(tmp_path / name, variants=(name,), study={"name": name}, **common) for name in ("lora", "dora")
    ]
    together = read_together(folders)
    assert together.by_rank
    assert [row.rank for row in together.rows] == [1, 4]
    assert "No setting is the same in two runs" in write_side_by_side(folders).read_text()
    table = together_table(together).splitlines()
    assert table[0] == "lora beside dora"
    assert len(table) == 2 + 2 * 2 + 1 + 2
    assert table[-3] == "the best of each run:"


def test_settings_that_differ_between_runs_tell_conditions_apart(tmp_path):
    """Dropout is constant within each run, and no condition is in both."""
    both = {}
    for name, dropout in (("a", 0.0), ("b", 0.1)):
        both[name] = fake_run.build(
            tmp_path / name,
            ranks=(1, 4),
            seeds=2,
            steps=1,
            targets=("attention", "all"),
            spectra=False,
            change=lambda t, dropout=dropout: {"dropout": dropout},
        )
    together = read_together(list(both.values()))
    assert together.rows == ()
    assert {family.rest for family in together.sides[1].ladders} == {"dropout 0.1"}
    assert "No condition is in both" in write_side_by_side(list(both.values())).read_text()


def test_the_page_stands_alone_with_its_plots_beside_it(tmp_path):
    runs = [run(tmp_path, scores(0.0), "a"), run(tmp_path, scores(0.01), "<b>&")]
    page = write_side_by_side(runs)
    assert page == runs[0] / "side_by_side.html"
    text = page.read_text()
    assert "<b>" not in text.replace("<b>Figure", "")
    assert not re.search(r"""(src|href)="(?!#|data:image/png)""", text)
    names = ["differences", "metric_by_rank", "quality_by_parameters"]
    files = sorted(p.name for p in (runs[0] / "side_by_side").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in names for kind in ("png", "svg", "pdf"))
    elsewhere = write_side_by_side(runs, tmp_path / "deep" / "page.html")
    assert (elsewhere.parent / "page" / "differences.pdf").exists()


def test_three_runs_are_each_compared_with_the_first(tmp_path):
    folders = [run(tmp_path, scores(shift), name) for shift, name in ((0.0, "a"), (0.01, "b"), (0.02, "c"))]
    rows = together_rows(read_together(folders))
    assert [row["run"] for row in rows] == ["a", "b", "c"] * 3
    assert [row["paired"] for row in rows[:3]] == ["", "6 pairs", "6 pairs"]


def test_runs_that_have_no_metric_in_common_are_refused_in_one_line(tmp_path):
    lower = {"metric": "ppl", "metrics": [{"name": "ppl", "better": "lower", "format": ".4g"}]}
    higher = {"metric": "ppl", "metrics": [{"name": "ppl", "better": "higher", "format": ".4g"}]}
    change = {"change": lambda t: {"val_ppl": 3.0, "test_ppl": 3.0}, "seeds": 1, "steps": 1, "spectra": False}
    one, two = (fake_run.build(tmp_path / f"{k}", study=study, **change) for k, study in enumerate((lower, higher)))
    accuracy = run(tmp_path, scores(0.0), "a")
    before = sorted(tmp_path.rglob("*"))
    for pair in ([one, two], [one, accuracy]):
        with pytest.raises(RunFolderError, match="no metric of one name and direction in common") as error:
            write_side_by_side(pair)
        assert "\n" not in str(error.value)
    for wrong in ([one], [one, one]):
        with pytest.raises(RunFolderError, match="two or more different run folders"):
            write_side_by_side(wrong)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_metric_of_one_run_that_both_have_is_compared(tmp_path):
    loss = {"metric": "loss", "metrics": [{"name": "loss", "better": "lower", "format": ".4f"}]}
    two = fake_run.build(tmp_path / "b", ranks=(1, 4), seeds=2, steps=1, spectra=False, study=loss)
    together = read_together([fake_run.build(tmp_path / "a", ranks=(1, 4), seeds=2, steps=1, spectra=False), two])
    assert [side.metric for side in together.sides] == ["test_loss"] * 2
    assert "all is chosen and compared by the loss" in write_side_by_side([tmp_path / "a", two]).read_text()
