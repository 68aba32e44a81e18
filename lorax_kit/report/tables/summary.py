"""The summary by condition, as cells and as text for a terminal."""

from __future__ import annotations

import math
from dataclasses import replace

from lorax_kit.analysis.statistics.conditions import seeds_needed
from lorax_kit.report.claims import more_seeds, rates_text, seeds_of, tests_of
from lorax_kit.report.conditions import STOPPED, Condition, Summary, at_every_rate, summarise
from lorax_kit.report.run_folder import RunFolder
from lorax_kit.report.tables.text import bytes_text, p_text, plural

CHOSEN = "chosen"


def setting_head(summary: Summary) -> str:
    """The heading of the column that tells families apart."""
    further = any(family.rest for family in summary.ladders)
    return "targets, variant, alpha" + ", further settings" * further


def summary_rows(summary: Summary) -> list[dict[str, str]]:
    """One row of formatted cells per condition at its chosen rate, the probe first.

    Keys: setting, rank, rate, seeds, metric, validation, loss, params, size, difference, p.
    `difference` is the mean paired difference to the condition with the best mean validation metric (its own cell says
    "chosen"), in percentage points of a share; `p` is Holm-corrected.
    """
    chosen = [condition for ladder in summary.ladders.values() for condition in ladder]
    return [_row(summary, condition) for condition in [*([summary.probe] if summary.probe else []), *chosen]]


def summary_table(run: RunFolder) -> str:
    """The summary by condition as aligned plain text, for a terminal.

    Example:
      >>> print(summary_table(read_run("runs/demo")))  # doctest: +SKIP
      demo: 18 of 18 trials
       rank     lr  seeds  test accuracy (95 %)   params   adapter  vs chosen  p (Holm)
      ...
    """
    summary = summarise(run)
    heads = {
        "setting": setting_head(summary),
        "rank": "rank",
        "rate": "lr",
        "seeds": "seeds",
        "metric": f"{summary.label} (95 %)",
        "params": "params",
        "size": "adapter",
        "difference": "vs chosen (95 %)",
        "p": "p (Holm)",
    }
    rows = summary_rows(summary)
    if len(summary.ladders) <= 1:
        del heads["setting"]
    widths = {key: max(len(head), *(len(row[key]) for row in rows)) for key, head in heads.items()}

    def line(cells: dict[str, str]) -> str:
        return "  ".join(
            cells[key].ljust(width) if key == "setting" else cells[key].rjust(width) for key, width in widths.items()
        ).rstrip()

    name = run.study.get("name") or run.path.name
    lines = [f"{name}: {len(run.trials)} of {run.planned} trials", line(heads), *map(line, rows)]
    if summary.best is not None and summary.choice != summary.metric:
        lines.append(f"{CHOSEN}: the {summary.measure.highest} mean of {summary.choice}.")
    tests, wanted = tests_of(summary), more_seeds(summary)
    needed = seeds_needed(tests)
    if tests and seeds_of(summary) < needed:
        lines.append(
            f"p cannot fall below 0.05 with fewer than {needed} seeds ({plural(tests, 'comparison')}, Holm): "
            "read the intervals."
        )
    if wanted is not None:
        lines.append(f"more seeds: {wanted[1]}")
    if summary.failed:
        lines.append(f"{plural(len(summary.failed), 'trial')} diverged; left out of the means.")
    if summary.stopped:
        lines.append(f"{plural(len(summary.stopped), 'trial')} stopped early; left out of the means.")
    return "\n".join([*lines, *rates_text(summary)])


def _row(summary: Summary, condition: Condition) -> dict[str, str]:
    comparison, measure = summary.comparison(condition), summary.measure
    params, size = condition.first("params"), condition.first("adapter_bytes")
    difference = p = ""
    if condition is summary.best:
        difference = CHOSEN
    elif comparison is not None and comparison.pairs:
        difference, p = measure.signed(comparison.difference), p_text(comparison.p_holm)
        if not math.isnan(comparison.low):
            difference += f" [{measure.signed(comparison.low)}, {measure.signed(comparison.high)}]"
    return {
        "setting": "frozen base" if condition.rank == 0 else str(condition.family),
        "rank": "probe" if condition.rank == 0 else str(condition.rank),
        "rate": f"{condition.lr:g}" if condition.done else "–",
        "seeds": seeds_text(condition if condition.done else _all_rates(summary, condition)),
        "metric": measure.interval(condition.interval(summary.metric), short=True),
        "validation": measure.short(condition.mean(summary.choice)),
        "loss": _number(condition.mean("val_loss"), ".4f"),
        "params": "" if params is None else f"{params:,.0f}",
        "size": "" if size is None else bytes_text(size),
        "difference": difference,
        "p": p,
    }


def _all_rates(summary: Summary, condition: Condition) -> Condition:
    """The trials of a rank of which none finished, at every rate."""
    same = at_every_rate(summary, condition) or [condition]
    return replace(condition, trials=tuple(trial for c in same for trial in c.trials))


def seeds_text(condition: Condition) -> str:
    """How many seeds finished, and what became of the others."""
    stopped = sum(trial["status"] == STOPPED for trial in condition.trials)
    failed = len(condition.trials) - len(condition.done) - stopped
    lost = [f"+{failed} failed"] * bool(failed) + [f"+{stopped} stopped"] * bool(stopped)
    return f"{len(condition.done)} ({', '.join(lost)})" if lost else str(len(condition.done))


def _number(value: float, spec: str) -> str:
    return "" if math.isnan(value) else format(value, spec)
