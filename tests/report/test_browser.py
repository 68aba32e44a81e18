"""The pages in a real browser: a phone's width does not overflow, nothing fails, tables sort and filter."""

import json

import pytest

from lorax_kit.report import write_side_by_side
from lorax_kit.report.pages.parameters import write_parameters
from tests.report import fake_run
from tests.report.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The page of two runs whose names are long."""
    folder = tmp_path_factory.mktemp("together")
    runs = [
        fake_run.build(folder / name, ranks=(1, 4), seeds=3, steps=2, spectra=False, study={"name": name * 6})
        for name in ("first_run", "second_run")
    ]
    return write_side_by_side(runs)


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    """A deep tree of parameters."""
    rows = [
        {"path": f"encoder/layer_{k}/attention/self/query/kernel", "shape": [3840, 3840], "dtype": "float32"}
        for k in range(3)
    ]
    sites = [{"path": rows[0]["path"], "params": 9000, "rank": 4, "how": "merged", "reason": "many tokens at once"}]
    found = {"model": "a model", "parameters": rows, "sites": sites, "full": [], "bytes": 9, "full_bytes": 90}
    return write_parameters(tmp_path_factory.mktemp("parameters") / "p.html", found | {"flops_ratio": 0.6})


@pytest.fixture(scope="module")
def browser():
    found = Browser()
    yield found
    found.close()


def column(browser, head):
    """The visible cells of a column of the table of trials, and all headings."""
    return browser.run(
        f"""(() => {{
          const table = document.querySelector("#trials table");
          const place = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === {json.dumps(head)});
          const shown = [...table.tBodies[0].rows].filter(row => row.offsetHeight > 0);
          return shown.map(row => row.cells[place].textContent);
        }})()"""
    )


def click(browser, head):
    browser.run(
        f"""[...document.querySelectorAll("#trials th")].find(c => c.textContent === {json.dumps(head)}).click()"""
    )


def fill(browser, selector, value):
    browser.run(
        f"""(() => {{
          const input = document.querySelector({json.dumps(selector)});
          if (input.tagName === "SELECT")
            input.value = [...input.options].find(option => option.textContent === {json.dumps(value)}).value;
          else input.value = {json.dumps(value)};
          input.dispatchEvent(new Event(input.tagName === "SELECT" ? "change" : "input"));
        }})()"""
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", ["grid", "hostile", "together", "parameters"])
def test_the_page_fits_its_window_and_nothing_fails(browser, page, width, request):
    browser.errors.clear()
    found = request.getfixturevalue(page)
    browser.open(found / "report.html" if page == "grid" else found, width)
    assert browser.errors == []
    assert browser.run("window.innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") == width
    wider = browser.run(
        """[...document.querySelectorAll("body *")].filter(element => !element.closest(".wide") &&
          element.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert wider == []
    assert browser.run("""document.querySelectorAll("svg, .bar").length""") >= 3


def test_wide_tables_scroll_within_their_box_on_a_phone(browser, grid):
    browser.open(grid / "report.html", 390)
    box = """(b => [b.scrollWidth > b.clientWidth, b.getBoundingClientRect().right <= innerWidth])"""
    assert browser.run(f"""{box}(document.querySelector("#trials"))""") == [True, True]
    fonts = browser.run("""[...document.querySelectorAll("p, input, td")].map(e => getComputedStyle(e).fontSize)""")
    assert min(float(size[:-2]) for size in fonts) >= 12


@pytest.mark.parametrize("width", WIDTHS)
def test_a_click_on_a_heading_sorts_by_number(browser, grid, width):
    trials = [json.loads(line) for line in (grid / "trials.jsonl").read_text().splitlines()]
    browser.open(grid / "report.html", width)
    click(browser, "rank")
    assert [int(x) for x in column(browser, "rank")] == sorted(t["rank"] for t in trials)
    click(browser, "rank")
    assert [int(x) for x in column(browser, "rank")] == sorted((t["rank"] for t in trials), reverse=True)
    click(browser, "test accuracy")
    shown = column(browser, "test accuracy")
    known = sorted(t["test_accuracy"] for t in trials if t["test_accuracy"] is not None)
    assert shown == [f"{100 * x:.2f}" for x in known] + [""] * (len(trials) - len(known)), "missing ones last"
    click(browser, "trial")
    names = json.dumps([t["trial"] for t in trials])
    assert column(browser, "trial") == browser.run(f"{names}.sort((a, b) => a.localeCompare(b, 'en'))")


@pytest.mark.parametrize("width", WIDTHS)
def test_words_and_ranges_filter_the_trials(browser, grid, width):
    trials = [json.loads(line) for line in (grid / "trials.jsonl").read_text().splitlines()]
    browser.errors.clear()
    browser.open(grid / "report.html", width)
    count = """document.querySelector(".filter output").textContent"""
    assert browser.run(count) == f"{len(trials)} of {len(trials)}"
    fill(browser, ".filter input[type=search]", "Diverged")
    assert column(browser, "status") == ["diverged"] * 2
    fill(browser, ".filter input[type=search]", "")
    fill(browser, ".filter select", "rank")
    fill(browser, ".filter input[placeholder=from]", "4")
    wanted = [t for t in trials if t["rank"] >= 4]
    assert sorted(column(browser, "trial")) == sorted(t["trial"] for t in wanted)
    fill(browser, ".filter select", "test accuracy")
    assert browser.run("""document.querySelector(".filter input[placeholder=from]").value""") == ""
    fill(browser, ".filter input[placeholder=to]", "84,5")
    wanted = [t for t in wanted if t["test_accuracy"] is not None and t["test_accuracy"] <= 0.845]
    assert wanted
    assert sorted(column(browser, "trial")) == sorted(t["trial"] for t in wanted), "in percent, as shown"
    assert browser.run(count) == f"{len(wanted)} of {len(trials)}"
    assert browser.run("""document.querySelector(".filter p").textContent""") == "rank from 4; test accuracy to 84.5"
    click(browser, "rank")
    assert len(column(browser, "rank")) == len(wanted), "sorting keeps what is filtered"
    browser.run("""document.querySelector(".filter button").click()""")
    assert len(column(browser, "rank")) == len(trials)
    assert browser.errors == []
