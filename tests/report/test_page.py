"""The page stands alone, agrees with an independent computation, and tells the truth about unfinished runs."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import product

import numpy as np
import pytest

from lorax_kit.report import write_report
from lorax_kit.report.figures import FIGURES
from tests.report import fake_run

NAMES = [maker.__name__ for maker in FIGURES]
ANALYSED = ("overlap_by_rank", "intruders_by_rank", "forgetting_by_rank")
OF_ONE_METHOD = [name for name in NAMES if name not in ("methods", *ANALYSED)]


class Page(HTMLParser):
    """Elements, attributes, texts and tables of a page."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.tables, self.inside, self.scripts, self.styles = [], "", [], [], "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self.inside:
            self.scripts += data
        elif "style" in self.inside:
            self.styles += data
        else:
            self.text += data
            if "td" in self.inside or "th" in self.inside:
                self.tables[-1][-1][-1] += data

    def table(self, *heads):
        """The rows of the table whose first headings these are."""
        return next(t[1:] for t in self.tables if tuple(t[0][: len(heads)]) == heads)


@pytest.fixture(scope="module")
def page(grid):
    return Page(grid / "report.html")


def expected_limits(x):
    """Where Hall's cubic of T, with half of the skewness, crosses the quantiles of five values, on a fine grid."""
    error, a = x.std(ddof=1) / np.sqrt(5), 0.5 * np.mean((x - x.mean()) ** 3) / x.std() ** 3 / np.sqrt(5)
    big_t = np.linspace(-15, 15, 3_000_001)
    g = big_t + a * big_t**2 / 3 + a**2 * big_t**3 / 27 + a / 6
    quantile = 2.9373782  # t quantile .97875 at 4 degrees of freedom
    return [x.mean() - error * big_t[np.searchsorted(g, u)] for u in (quantile, -quantile)]


def expected_rows(run):
    """The summary by its definition, with numpy alone: rank -> (rate, seeds, mean, low, high, val, difference, p)."""
    trials = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    cells = {}
    for t in trials:
        cells.setdefault((t["rank"], t["lr"]), []).append(t)
    done = {key: {t["seed"]: t for t in ts if t["status"] == "done"} for key, ts in cells.items()}
    most = {rank: max(len(v) for (r, _), v in done.items() if r == rank) for rank, _ in done}

    def val(key):
        return np.mean([t["val_accuracy"] for t in done[key].values()])

    chosen = {
        rank: max((k for k in done if k[0] == rank and len(done[k]) == most[rank]), key=val) for rank in sorted(most)
    }
    best = max((rank for rank in chosen if rank), key=lambda rank: val(chosen[rank]))
    rows, p = {}, {}
    for rank, key in chosen.items():
        test = np.array([t["test_accuracy"] for _, t in sorted(done[key].items())])
        low, high = expected_limits(test)
        gap = np.array([done[key][s]["test_accuracy"] - done[chosen[best]][s]["test_accuracy"] for s in range(5)])
        flips = [abs(np.dot(signs, gap)) for signs in product((1, -1), repeat=5)]
        p[rank] = np.mean(np.array(flips) >= abs(gap.sum()) - 1e-12)
        rows[rank] = (key[1], len(test), test.mean(), low, high, val(key), gap.mean())
    others = sorted((rank for rank in p if rank != best), key=lambda rank: p[rank])
    adjusted = np.maximum.accumulate([min(1, (len(others) - i) * p[rank]) for i, rank in enumerate(others)])
    return best, rows, dict(zip(others, adjusted, strict=True))


def test_every_number_of_the_summary_agrees_with_an_independent_computation(grid, page):
    best, rows, p = expected_rows(grid)
    table = page.table("rank", "learning rate")
    assert [row[0] for row in table] == ["probe", "1", "4", "8"]
    for cells, (rank, (rate, seeds, mean, low, high, val, gap)) in zip(table, rows.items(), strict=True):
        params = 770 + 2 * 384 * 16 * rank
        assert cells[1:4] == [f"{rate:g}", str(seeds), f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]
        assert cells[4] == f"{100 * val:.1f}"
        assert cells[6] == f"{params:,}"
        size = (4 * params + 3000) / 1024
        assert cells[7] == (f"{size:.0f} KiB" if size >= 100 else f"{size:.1f} KiB")
        wanted = ["chosen", ""] if rank == best else [f"{100 * gap:+.2f}".replace("-", "−"), f"{p[rank]:.3f}"]
        # The interval of the difference behind it is checked in test_tables.
        assert [cells[8].split(" [")[0], cells[9]] == wanted
    assert f"Rank {best} (learning rate {rows[best][0]:g}) has the best mean validation accuracy." in page.text
    assert f"Its test accuracy is {100 * rows[best][2]:.1f} %" in page.text


def test_the_trials_table_holds_every_trial(grid, page):
    trials = [json.loads(line) for line in (grid / "trials.jsonl").read_text().splitlines()]
    rows = {row[0]: row for row in page.table("trial", "rank", "alpha")}
    assert set(rows) == {t["trial"] for t in trials}
    for t in trials:
        wanted = "" if t["test_accuracy"] is None else f"{100 * t['test_accuracy']:.2f}"
        assert rows[t["trial"]][1:5] == [str(t["rank"]), f"{t['alpha']:g}", f"{t['lr']:g}", str(t["seed"])]
        assert (rows[t["trial"]][11], rows[t["trial"]][13]) == (wanted, t["status"])


def test_diverged_trials_are_listed_with_their_step(page):
    found = page.table("trial", "rank", "learning rate")
    assert found == [[f"r8_a16_lr0.003_attention_s{s}", "8", "0.003", str(s), "diverged", "16"] for s in (0, 1)]
    assert "Diverged: 2 of 50 trials." in page.text


def test_the_page_shows_what_was_compiled_and_what_memory_it_took(page):
    assert "The training step was compiled once for 2 groups of stacked trials." in page.text
    rows = page.table("group", "trials", "size")
    assert rows == [
        ["1", "25", "25", "296 MiB", "315 MiB", "290.1", "11.3"],  # 310e6 / 2^20, 330e6 / 2^20
        ["2", "25", "25", "296 MiB", "315 MiB", "290.1", "0.0"],
    ]


def test_the_limits_of_the_intervals_are_said(grid, page):
    _, rows, _ = expected_rows(grid)
    share = max(rows.values(), key=lambda row: row[5])[2]
    z = 1.959964
    centre, half = (share + z**2 / 2000) / (1 + z**2 / 1000), z * np.sqrt(share * (1 - share) / 1000 + z**2 / 4e6)
    low, high = 100 * (centre - half / (1 + z**2 / 1000)), 100 * (centre + half / (1 + z**2 / 1000))
    wilson = f"an accuracy of {100 * share:.1f} % (95 % interval {low:.1f} to {high:.1f}, Wilson, 1,000 examples)"
    assert f"over all examples that they were drawn from, {wilson}" in " ".join(page.text.split())
    assert "All trials saw the same batches in the same order" in " ".join(page.text.split())


@pytest.mark.parametrize("which", ["grid", "hostile"])
def test_the_page_loads_nothing_from_anywhere(which, grid, hostile):
    page = Page(grid / "report.html" if which == "grid" else hostile)
    tags = Counter(tag for tag, _ in page.elements)
    assert tags["svg"] == (count := len(OF_ONE_METHOD) + (which == "hostile"))
    assert not {"link", "iframe", "img", "object", "embed", "base", "form", "audio", "video", "a"} & set(tags)
    assert (tags["script"], tags["style"]) == (1, 1 + count)  # matplotlib puts a rule into each figure
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset", "action", "data"), (tag, name)
            if name.endswith("href"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
            if "url(" in (value or ""):
                assert re.findall(r"url\((.)", value) == ["#"] * value.count("url("), value
    assert "max-width" in page.styles
    assert not re.search(r"url\(|@import|http", page.styles)
    assert "addEventListener" in page.scripts
    assert not re.search(r"fetch|XMLHttp|import|http", page.scripts)


@pytest.mark.parametrize("which", ["grid", "hostile"])
def test_ids_are_unique_and_every_reference_resolves(which, grid, hostile):
    page = Page(grid / "report.html" if which == "grid" else hostile)
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert {name: count for name, count in ids.items() if count > 1} == {}
    used = set()
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name.endswith("href") and value.startswith("#"):
                used.add(value[1:])
            used |= set(re.findall(r"url\(#([^)]*)\)", value or ""))
        used |= set(attributes.get("aria-labelledby", "").split())
    assert len(used) > 20
    assert used <= set(ids)


def test_hostile_names_stay_text(hostile):
    page = Page(hostile)
    name = "<script>alert(1)</script>\"'&]]>--> $x_1$"
    assert "alert" not in page.scripts
    assert page.text.count(name) > 20
    assert Counter(tag for tag, _ in page.elements)["script"] == 1
    assert page.table("targets, variant, alpha", "rank")[-1][0].startswith(name)


def test_every_figure_is_on_the_page_and_in_files(grid, page):
    figures = [attributes["id"] for tag, attributes in page.elements if tag == "figure"]
    assert figures == OF_ONE_METHOD
    assert sorted(file.name for file in (grid / "plots").iterdir()) == sorted(
        f"{name}.{kind}" for name in OF_ONE_METHOD for kind in ("png", "svg", "pdf")
    )
    for name in OF_ONE_METHOD:
        png = (grid / "plots" / f"{name}.png").read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(png[16:20]) == 1440  # 7.2 inches at 200 dots
        pdf = (grid / "plots" / f"{name}.pdf").read_bytes()
        assert pdf[:5] == b"%PDF-"
        assert b"/Type3" not in pdf
        assert "</svg>" in (grid / "plots" / f"{name}.svg").read_text()[-20:]
    assert "Left out." not in page.text


def test_writing_again_gives_the_same_bytes_and_no_stray_files(grid, tmp_path):
    files = sorted(p.relative_to(grid) for p in grid.rglob("*") if p.is_file())
    before = {name: (grid / name).read_bytes() for name in files}
    assert len(files) == 4 + 3 + 3 * len(OF_ONE_METHOD)
    assert write_report(grid) == grid / "report.html"
    assert {p.relative_to(grid): p.read_bytes() for p in grid.rglob("*") if p.is_file()} == before


def test_a_run_interrupted_in_the_middle_says_so_on_its_page(tmp_path):
    run = fake_run.build(tmp_path, ranks=(1, 2, 4, 8, 16), seeds=3, steps=4, spectra=False, keep=8)
    for name in ("trials.jsonl", "curves.jsonl"):  # killed inside a line
        with open(run / name, "a") as file:
            file.write('{"trial": "r4_a16')
    page = Page(write_report(run))
    assert "8 of 18" in page.text
    assert "Partial run: 8 of 18 trials." in page.text
    assert "The last line of trials.jsonl was cut off by an interruption and is left out." in page.text
    assert "Not considered, having fewer finished seeds: rank 4 with 2." in page.text
    assert "Singular values: no spectra were recorded" in page.text
    assert len(page.table("trial", "rank", "alpha")) == 8


def test_one_rank_and_one_seed_make_a_page_without_empty_figures(tmp_path):
    run = fake_run.build(tmp_path, ranks=(4,), seeds=1, steps=4, probe=False, sites=fake_run.SITES[:1])
    page = Page(write_report(run))
    figures = [attributes["id"] for tag, attributes in page.elements if tag == "figure"]
    assert figures == ["metric_by_rank", "loss_curves", "singular_values", "effective_rank_by_site"]
    assert page.table("rank", "learning rate")[0][:3] == ["4", "0.001", "1"]
    assert "Rate by rank: only one learning rate was tried." in page.text
    assert "Cost by rank: it takes two conditions" in page.text


def test_a_run_where_everything_diverged_still_has_a_page(tmp_path):
    run = fake_run.build(tmp_path, ranks=(1, 4), seeds=2, steps=9, probe=False, diverged=lambda t: True)
    page = Page(write_report(run))
    assert "No rank can be recommended: all 4 trials diverged." in page.text
    assert [row[2:4] for row in page.table("rank", "learning rate")] == [["0 (+2 failed)", "–"]] * 2
    assert "Validation accuracy by rank: no adapted trial finished with it." in page.text
    assert not (run / "plots" / "metric_by_rank.png").exists()


def test_a_figure_that_no_longer_applies_leaves_no_old_file(tmp_path):
    run = fake_run.build(tmp_path, ranks=(1, 4), seeds=1, steps=4, probe=False, sites=fake_run.SITES[:1])
    write_report(run)
    (run / "spectra.jsonl").unlink()
    (run / "curves.jsonl").unlink()
    write_report(run)
    assert sorted(p.stem for p in (run / "plots").glob("*.png")) == [
        "cost_by_rank",
        "metric_by_rank",
        "quality_by_cost",
    ]
