"""`predict`: the answers of a saved adapter to new texts or rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorax_kit.checkpoint.adapter import load_adapter, read_meta
from lorax_kit.data import Row, read_rows
from lorax_kit.errors import AdapterError, DataError
from lorax_kit.problem import version
from lorax_kit.problems.load import base_of, remembered_facts, settings_of
from lorax_kit.problems.packaged.sentiment import adapter_folder
from lorax_kit.problems.parts.asked import Asked
from lorax_kit.problems.parts.rows import TextSettings
from lorax_kit.problems.settings import Settings
from lorax_kit.transform import adapt


def predict(
    adapter: str | Path,
    texts: Sequence[str] = (),
    *,
    data: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
) -> dict[str, Any]:
    """Answer texts or rows as `evaluate_adapter` would measure them; the data of training are not read.

    Args:
      adapter: a folder of `lorax-kit train` or of a study, of a task that gives an answer to each row.
      texts: of a task that reads one text alone.
      data: instead, a file of rows, with the adapter's columns but for that of the answers.
      columns: role -> column, where the file has others.
      encoding: of the file; None: the adapter's.

    Returns:
      {"adapter", "problem", "answers": what was asked and the answer to it, for each row, "cut": how many were longer
      than the adapter's texts, and were cut}. An answer is {"label", "probability", "probabilities"}, of several
      classes {"labels", "probabilities"}, of a number {"value"}, of a passage {"answer", "score"} (its logits less
      those of no answer), of choices {"answer", "probability", "probabilities"}.

    Raises:
      AdapterError: no adapter, or one whose task writes, or of a problem of one's own.
      DataError: nothing to answer, rows of another form, texts for a task that reads more than one column.
    """
    path = adapter_folder(adapter)
    settings, name = settings_of(path), str(read_meta(path)["problem"])
    if settings.writes:
        raise AdapterError(
            f"the adapter at {str(path)!r} is of {name!r}, which writes.\n  lorax-kit generate {adapter} --prompt TEXT"
        )
    rows = _rows_of(settings, name, texts, data, columns or {}, encoding)
    if isinstance(settings, TextSettings):  # whose errors name the file
        settings = replace(settings, data=str(data or "the texts"))
    asked = settings.to_answer(rows, remembered_facts(path))
    answers = asked.answers(_outputs(asked, path))
    told = [{**row.cells, **answer} for row, answer in zip(rows, answers, strict=True)]
    return {"adapter": str(path), "problem": name, "answers": told, "cut": asked.cut}


def _rows_of(
    settings: Settings,
    name: str,
    texts: Sequence[str],
    data: str | Path | None,
    columns: Mapping[str, str],
    encoding: str | None,
) -> list[Row]:
    """What is asked, as rows with the cells that the task reads."""
    roles = settings.asked_columns
    if unknown := [role for role in columns if role not in roles]:
        raise DataError(f"{name!r} reads no column {unknown[0]!r}; it reads {', '.join(roles)}.")
    if data is not None:
        if texts:
            raise DataError("texts are given, and a file of rows, too: give one of the two.")
        used = encoding or (settings.encoding if isinstance(settings, TextSettings) else "utf-8")
        return list(read_rows(data, {**roles, **columns}, encoding=used))
    if not texts:
        raise DataError("there is nothing to answer.\n  give texts, or data=FILE, a file of rows")
    if len(roles) > 1:
        raise DataError(
            f"{name!r} reads {' and '.join(roles)}, which a text alone does not give.\n"
            f"  give data=FILE, a file of rows with the columns {', '.join({**roles, **columns}.values())}"
        )
    if empty := [number for number, text in enumerate(texts, 1) if not text.strip()]:
        raise DataError(f"text {empty[0]} is empty.")
    (role,) = roles
    return [Row(number, {role: text}) for number, text in enumerate(texts, 1)]


def _outputs(asked: Asked, path: Path) -> list[np.ndarray]:
    """The outputs of every example, in order."""
    base = base_of(asked, path)
    adapter = load_adapter(path, base=base)
    params, _, plan = version(base, adapter.factors, adapter.plan)
    run = jax.jit(asked.apply if plan is None else adapt(asked.apply, plan))
    by_index: dict[int, np.ndarray] = {}
    for index, batch in asked.batches:
        outputs = run(params, batch) if plan is None else run(*params, batch)
        by_index |= zip(index.tolist(), np.asarray(outputs)[: len(index)], strict=True)
    return [by_index[i] for i in range(len(by_index))]
