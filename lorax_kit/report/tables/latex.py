r"""Tables as LaTeX: `tabular` environments with booktabs rules, to be read by \input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lorax_kit.files.staging import replace_file
from lorax_kit.report.conditions import Summary
from lorax_kit.report.tables.methods import method_rows
from lorax_kit.report.tables.summary import setting_head, summary_rows

SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "−": "$-$",
    "–": "--",
    "α": r"$\alpha$",
    "×": r"$\times$",
    "\n": " ",
    "\r": " ",
}


def escaped(text: str) -> str:
    r"""Text in which every character stands for itself.

    Example:
      >>> print(escaped("a_b, α = 16: 50 % & −1"))
      a\_b, $\alpha$ = 16: 50 \% \& $-$1
    """
    return "".join(SPECIAL.get(character, character) for character in text)


def write_tables(summary: Summary, folder: str | Path) -> list[Path]:
    """Write `summary.tex`, and `methods.tex` where the run has several; one of an earlier report is removed.

    Returns:
      The paths written.
    """
    unit = r", \%" if summary.measure.share else ""
    points = ", points" if summary.measure.share else ""
    heads = {
        "setting": escaped(setting_head(summary)),
        "rank": "rank",
        "rate": "learning rate",
        "seeds": "seeds",
        "metric": escaped(summary.label) + unit,
        "params": "parameters",
        "size": "adapter",
        "difference": f"vs chosen{points}",
        "p": "$p$ (Holm)",
    }
    if len(summary.ladders) <= 1:
        del heads["setting"]
    tables = {"summary.tex": (heads, summary_rows(summary))}
    methods = method_rows(summary)
    if methods:
        beside = heads | {"difference": f"vs reference{points}", "seconds": "time, s"}
        tables["methods.tex"] = (beside, methods)
    folder, written = Path(folder), []
    for name in ("summary.tex", "methods.tex"):
        if name in tables:
            replace_file(folder / name, _tabular(*tables[name]).encode())
            written.append(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    return written


def _tabular(heads: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """Words to the left, numbers to the right."""
    kinds = "".join("l" if key == "setting" else "r" for key in heads)
    lines = [
        r"% Needs \usepackage{booktabs} and \usepackage[T1]{fontenc}; \input it within a table.",
        rf"\begin{{tabular}}{{{kinds}}}",
        r"\toprule",
        " & ".join(heads.values()) + r" \\",
        r"\midrule",
        *(" & ".join(escaped(row[key]) for key in heads) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"
