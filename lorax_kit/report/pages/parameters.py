"""A picture of a model's parameters as one self-contained HTML page: what is frozen, what is trained, how it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from typing import Any

from lorax_kit.files.staging import replace_file
from lorax_kit.report.pages.html import render
from lorax_kit.report.tables.text import bytes_text


@dataclass
class Node:
    """One name in the tree: a module with children, or a parameter.

    Attributes:
      name: last part of the path.
      size, trained: entries of the parameters below, and those trained.
      shape, dtype: of a parameter; None for a module.
      state: "frozen", "low-rank", "full" or "materialised", of a parameter.
      notes: how each use of a parameter runs.
    """

    name: str
    size: int = 0
    trained: int = 0
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    state: str = "frozen"
    notes: list[str] = field(default_factory=list)
    children: dict[str, Node] = field(default_factory=dict)

    def width(self, largest: int) -> float:
        """Of the bar, in percent: areas grow like sizes, so lengths like their roots."""
        return 100 * sqrt(self.size / max(largest, 1))


def tree(parameters: Sequence[Mapping[str, Any]], sites: Sequence[Mapping[str, Any]], full: Sequence[str]) -> Node:
    """Nest parameters by the parts of their paths.

    Args:
      parameters: rows with `path`, `shape`, `dtype`.
      sites: rows of `lk.explain`; a site used more than once has several.
      full: paths trained in full.
    """
    root = Node("")
    for row in parameters:
        parts, size = row["path"].split("/"), prod(row["shape"])
        uses = [site for site in sites if site["path"] == row["path"]]
        trained = sum(use["params"] for use in uses) + (size if row["path"] in full else 0)
        branch = [root]
        for part in parts:
            branch.append(branch[-1].children.setdefault(part, Node(part)))
        for node in branch:
            node.size += size
            node.trained += trained
        node.shape, node.dtype = tuple(row["shape"]), row["dtype"]
        if row["path"] in full:
            node.state = "full"
        elif uses:
            node.state = "materialised" if any(use["how"] == "materialised" for use in uses) else "low-rank"
            node.notes = [f"rank {use['rank']}, {use['how']}: {use['reason']}" for use in uses]
    return root


def write_parameters(path: str | Path, found: Mapping[str, Any]) -> Path:
    """Write the page.

    Args:
      path: of the HTML file; replaced atomically.
      found: what `lorax-kit inspect --json` prints: `model`, `parameters`, and with a spec `sites`, `full` and totals.

    Returns:
      `path`.

    Example:
      >>> write_parameters("minilm.html", found)  # doctest: +SKIP
      PosixPath('minilm.html')
    """
    sites, full = found.get("sites", ()), found.get("full", ())
    root = tree(found["parameters"], sites, full)
    ratio = found.get("flops_ratio")
    facts = [("parameters", f"{root.size:,}"), ("trained", f"{root.trained:,} ({root.trained / root.size:.2%})")]
    if sites:
        facts += [
            ("sites", f"{len({site['path'] for site in sites})}"),
            ("adapter", bytes_text(found["bytes"])),
            ("gradients and Adam of these sites in full", bytes_text(3 * found["full_bytes"])),
            ("of their factors", bytes_text(3 * found["bytes"])),
        ]
        facts += [("FLOPs of the sites' products, of full fine-tuning", f"{ratio:.2f}x")] if ratio else []
    largest = max(prod(row["shape"]) for row in found["parameters"])
    text = render("parameters.html", model=found["model"], facts=facts, root=root, largest=largest)
    replace_file(Path(path), text.encode())
    return Path(path)
