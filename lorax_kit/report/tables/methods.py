"""One row per method, or other setting, at its own best rank and rate."""

from __future__ import annotations

import math

from lorax_kit.report.claims import methods_compared
from lorax_kit.report.conditions import Summary
from lorax_kit.report.tables.summary import seeds_text
from lorax_kit.report.tables.text import bytes_text, p_text

REFERENCE = "reference"


def method_rows(summary: Summary) -> list[dict[str, str]]:
    """Formatted cells per method, the best on validation data first; empty where the run has one setting only.

    Keys: setting, tried, rank, rate, seeds, metric, validation, difference, p, params, size, seconds. `difference` is
    the mean paired difference to the reference; `p` is Holm-corrected over these rows.
    """
    compared = methods_compared(summary)
    if compared is None:
        return []
    measure, rows = summary.measure, []
    for condition in compared.conditions:
        comparison = next((c for c in compared.comparisons if c.condition == condition.key), None)
        params, size = condition.first("params"), condition.first("adapter_bytes")
        seconds = condition.mean("train_seconds")
        difference = REFERENCE if condition is compared.reference else ""
        if comparison is not None and comparison.pairs:
            difference = measure.signed(comparison.difference)
            if not math.isnan(comparison.low):
                difference += f" [{measure.signed(comparison.low)}, {measure.signed(comparison.high)}]"
        rows.append(
            {
                "setting": str(condition.family),
                "tried": str(sum(c.family == condition.family for c in summary.conditions)),
                "rank": str(condition.rank),
                "rate": f"{condition.lr:g}",
                "seeds": seeds_text(condition),
                "metric": measure.interval(condition.interval(summary.metric), short=True),
                "validation": measure.short(condition.mean(summary.choice)),
                "difference": difference,
                "p": "" if comparison is None else p_text(comparison.p_holm),
                "params": "" if params is None else f"{params:,.0f}",
                "size": "" if size is None else bytes_text(size),
                "seconds": "" if math.isnan(seconds) else f"{seconds:.1f}",
            }
        )
    return rows
