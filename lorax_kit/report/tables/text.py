"""Numbers as people read them."""

from __future__ import annotations

import math


def p_text(p: float) -> str:
    """Three decimals, a bound below 0.001, a dash for nan."""
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def count_text(value: float) -> str:
    """Three digits: 83714 -> "83.7k"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def bytes_text(size: float) -> str:
    """Binary units: 294912 -> "288 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def plural(count: int, noun: str) -> str:
    """1 -> "1 trial", 2 -> "2 trials"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
