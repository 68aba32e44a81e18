"""One table, and page, of what several exports measured: size, quality and latency by format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorax_kit.errors import ExportError
from lorax_kit.files.staging import refuse_existing, staged
from lorax_kit.json_text import read_json
from lorax_kit.report.pages.html import render

DOCUMENT = "export.json"
COLUMNS = ("export", "format", "bytes", "metric", "jax", "exported", "same", "latency_jax_ms", "latency_ms")


def export_rows(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """What each folder of `lorax-kit export` measured, a row each.

    Returns:
      `export` (the folder's name), `format`, `bytes`, `params_bytes`, `metric`, `jax` and `exported` (its values),
      `same` (share of prompts with the same tokens, or of places with the same largest output), `latency_jax_ms`,
      `latency_ms` (of a token, or of a batch).

    Raises:
      ExportError: a folder that is no export.
    """
    out = []
    for folder in folders:
        try:
            row = read_json(Path(folder) / DOCUMENT)["measured"]
            metric = row.get("metric", "perplexity")
            form = row["format"] + ", int8" * bool(row["int8"]) + ", adapters apart" * bool(row.get("separate"))
            shrunk = row.get("method")
            values = {"jax": row[f"{metric}_jax"], "exported": row[metric]}
            same = row["tokens_equal"] if "tokens_equal" in row else row["agreement"]
            sizes = {name: row[name] for name in ("bytes", "params_bytes", "latency_jax_ms", "latency_ms")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise ExportError(f"{str(folder)!r} is no folder of `lorax-kit export`: {type(e).__name__} {e}.") from None
        form += f", {shrunk} {row['keep']:g}" if shrunk else ""
        out.append(
            {"export": Path(folder).resolve().name, "format": form, "metric": metric, "same": same, **values, **sizes}
        )
    return out


def exports_page(folders: Sequence[str | Path], out: str | Path, *, overwrite: bool = False) -> list[dict[str, Any]]:
    """Write the rows of several exports as an HTML page that stands alone.

    Returns:
      The rows.

    Raises:
      ExportError: a folder that is no export.
      AdapterError: the file exists.
    """
    rows, path = export_rows(folders), Path(out).absolute()
    refuse_existing(path, overwrite, None, "file")
    with staged(path, overwrite) as new:
        new.write_text(render("exports.html", rows=[_shown(row) for row in rows]), encoding="utf-8")
    return rows


def _shown(row: dict[str, Any]) -> dict[str, str]:
    def number(x: Any, form: str) -> str:
        return "–" if x is None else format(x, form)

    return {
        **{name: row[name] for name in ("export", "format", "metric")},
        "size": f"{row['bytes'] / 1e6:,.1f} MB",
        "jax": number(row["jax"], ".4g"),
        "exported": number(row["exported"], ".4g"),
        "change": number(row["exported"] / row["jax"] - 1 if row["jax"] else None, "+.2%"),
        "same": number(row["same"], ".1%"),
        "latency_jax": number(row["latency_jax_ms"], ".3g"),
        "latency": number(row["latency_ms"], ".3g"),
    }
