"""LaTeX tables hold the cells of the page's tables, every character of a name standing for itself."""

import re
import shutil
import subprocess

import pytest

from lorax_kit.report import read_run, write_report
from lorax_kit.report.conditions import summarise
from lorax_kit.report.tables.latex import escaped
from lorax_kit.report.tables.methods import method_rows
from lorax_kit.report.tables.summary import summary_rows
from tests.report import fake_run

NASTY = 'a_b\\c{d}%&#$~^<e>|"f" α −'


def cells(text):
    """The body of a table by its definition: between the rules, cells split at &."""
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0]
    return [[cell.strip() for cell in line.removesuffix(r"\\").split(" & ")] for line in body.strip().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    found = fake_run.build(
        tmp_path_factory.mktemp("latex") / "run",
        ranks=(1, 4),
        seeds=3,
        steps=1,
        variants=("lora", "dora"),
        spectra=False,
        change=lambda t: {"targets": NASTY} if t["rank"] else {},
    )
    write_report(found)
    return found


def test_the_tables_hold_the_cells_of_the_page(run):
    summary = summarise(read_run(run))
    keys = ("setting", "rank", "rate", "seeds", "metric", "params", "size", "difference", "p")
    for name, rows, more in (("summary", summary_rows(summary), ()), ("methods", method_rows(summary), ("seconds",))):
        text = (run / "tables" / f"{name}.tex").read_text()
        assert cells(text) == [[escaped(row[key]).strip() for key in (*keys, *more)] for row in rows]
        assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
        assert r"\begin{tabular}{l" + "r" * (len(keys) - 1 + len(more)) + "}" in text


def test_special_characters_are_escaped():
    assert escaped("50 % & more_or $less$ #1 {x}~^") == (
        r"50 \% \& more\_or \$less\$ \#1 \{x\}\textasciitilde{}\textasciicircum{}"
    )
    assert escaped("a\\b\nc") == r"a\textbackslash{}b c"
    assert escaped("α = 16, −1 – ×2") == r"$\alpha$ = 16, $-$1 -- $\times$2"


def test_a_run_of_one_method_keeps_no_old_table(tmp_path):
    one = fake_run.build(tmp_path, ranks=(1, 4), seeds=2, steps=1, spectra=False)
    (one / "tables").mkdir()
    (one / "tables" / "methods.tex").write_text("old")
    write_report(one)
    assert [file.name for file in (one / "tables").iterdir()] == ["summary.tex"]
    assert not re.search("setting|targets", (one / "tables" / "summary.tex").read_text())


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex: apt-get install texlive-latex-recommended")
def test_latex_sets_them(run, tmp_path):
    body = "\n\n".join(rf"\input{{{run / 'tables' / name}.tex}}" for name in ("summary", "methods"))
    (tmp_path / "t.tex").write_text(
        "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs}\\begin{document}\n"
        f"{body}\n\\end{{document}}\n"
    )
    argv = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    found = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout[-2000:]
    assert "Missing character" not in found.stdout
