"""Writes the page of runs side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorax_kit.files.staging import replace_file
from lorax_kit.report.answer import answer
from lorax_kit.report.claims import not_inferior_text
from lorax_kit.report.figures.together import draw_together
from lorax_kit.report.measure import Measure
from lorax_kit.report.pages.html import inline_svg, render
from lorax_kit.report.tables.together import together_rows
from lorax_kit.report.together import Together, read_together

PAGE = "side_by_side.html"


def write_side_by_side(
    run_dirs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    margin: float | None = None,
) -> Path:
    """Write one self-contained page on two or more runs, and its plots beside it in a folder of the page's name.

    Conditions that the runs have in common are compared with the first run's, paired by seed where problem, base and
    data are the same, as independent samples otherwise.

    Args:
      run_dirs: Run folders, see `read_run`.
      out: The page; None: `side_by_side.html` in the first folder.
      margin: As for `write_report`.

    Returns:
      The path of the page.

    Raises:
      RunFolderError: Folders that are no runs, or have no metric in common; nothing is written then.

    Example:
      >>> write_side_by_side(["runs/lora", "runs/dora"])  # doctest: +SKIP
      PosixPath('runs/lora/side_by_side.html')
    """
    together = read_together(run_dirs, margin=margin)
    plots, left_out = draw_together(together)
    target = Path(run_dirs[0]) / PAGE if out is None else Path(out)
    page = render(
        "together.html",
        **_context(together),
        figures=[{"name": plot.name, "caption": plot.caption, "svg": inline_svg(plot)} for plot in plots],
        left_out=left_out,
        folder=target.stem,
    )
    for plot in plots:
        plot.write(target.with_suffix(""))
    replace_file(target, page.encode())
    return target


def _context(together: Together) -> dict[str, Any]:
    first = together.sides[0]
    sections: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for section, name, texts in together.differing:
        sections.setdefault(section, []).append((name, texts))
    answers = []
    for name, side in zip(together.names, together.sides, strict=True):
        answers.append((name, [text for text in (answer(side)[0], not_inferior_text(side)) if text]))
    return {
        "names": together.names,
        "answers": answers,
        "sections": sections,
        "pairing": _pairing(together),
        "rows": together_rows(together),
        "metric": first.label,
        "unit": ", %" if first.measure.share else "",
    }


def _pairing(together: Together) -> list[str]:
    """What the reader must know of how rows were matched and compared."""
    names, first = together.names, together.sides[0]
    texts = []
    if not together.rows:
        texts.append("No condition is in both: only the best of each run is compared.")
    elif together.by_rank:
        texts.append("No setting is the same in two runs: rows compare equal ranks of the settings that differ.")
    alike = [name for name, same in zip(names[1:], together.same[1:], strict=True) if same]
    apart = [name for name, same in zip(names[1:], together.same[1:], strict=True) if not same]
    if alike:
        texts.append(
            f"{_listed(alike)} {'has' if len(alike) == 1 else 'have'} the problem, base and data of {names[0]}: "
            "differences are paired by seed where seeds are shared, p-values are from the sign-flip test, corrected by "
            "Holm's method over the common conditions."
        )
    if apart:
        texts.append(
            f"{_listed(apart)} differ{'s' if len(apart) == 1 else ''} from {names[0]} in problem, base or data, or a "
            "run did not record them: differences are unpaired, between means of independent samples (Welch's "
            "interval), and no p-value is given. They are no test of the setting alone."
        )
    if any(Measure.of(side.run.study).name != first.measure.name for side in together.sides):
        word = first.measure.word
        texts.append(f"The runs choose by different metrics; here all is chosen and compared by the {word}.")
    return texts


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
