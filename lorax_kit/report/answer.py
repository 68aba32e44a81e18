"""The answer of a study in words: which rank, is that a difference at all, and what does it cost.

The wording is held to what the seeds can show: with fewer than six pairs the sign-flip test cannot reach
p < .05, and then the text says that the run cannot tell, not that there is no difference.
"""

from __future__ import annotations

import math

from lorax_kit.report.conditions import Condition, Summary, at_edge_of_grid
from lorax_kit.report.tables import bytes_text, interval_text, p_text, percent, plural, signed
from lorax_kit.study.statistics import Comparison, seeds_needed, smallest_p

METRIC_NAMES = {"test_accuracy": "test accuracy", "val_accuracy": "validation accuracy"}


def answer(summary: Summary) -> list[str]:
    """Sentences that answer "which rank, and does it matter?", most important first.

    Returns:
      Paragraphs of plain text; at least one, whatever the run holds.

    Example:
      >>> print("\\n".join(answer(summarise(read_run("runs/demo")))))  # doctest: +SKIP
      Rank 8 has the best mean validation accuracy; its test accuracy is 87.3 % ...
    """
    best = summary.best
    if best is None:
        if not summary.conditions:
            return ["This run holds only the frozen-encoder probe so far; no rank can be compared yet."]
        return [
            f"No rank can be recommended: {_of_all(len(summary.failed), len(summary.run.trials))} diverged. "
            "A learning rate well below those tried is the first thing to change."
        ]
    if not best.values(summary.metric).size:
        return ["Trials finished, but none of them recorded an accuracy; see the losses below."]
    paragraphs = [_headline(summary, best)]
    smaller = [c for c in summary.ladder if c.rank < best.rank and c.values(summary.metric).size]
    if smaller:
        paragraphs.append(_against_smaller(summary, best, smaller[-1]))
    elif len(summary.ladder) > 1:
        paragraphs.append(f"Rank {best.rank} is also the smallest rank that finished; try smaller ones.")
    else:
        paragraphs.append("Only one rank was trained, so nothing can be said about the choice of rank.")
    if len(smaller) > 1 or len(summary.ladder) > len(smaller) + 1:
        paragraphs.append(_cheapest(summary, best))
    if summary.probe is not None:
        paragraphs.append(_against_probe(summary, summary.probe))
    return [paragraph for paragraph in paragraphs if paragraph]


def cautions(summary: Summary) -> list[str]:
    """What limits the answer: an unfinished run, diverged trials, rates at the edge of the grid, notes."""
    run = summary.run
    found = []
    if len(run.trials) < run.planned:
        found.append(
            f"Partial run: {len(run.trials)} of {run.planned} trials. Everything here may change when the "
            "others finish."
        )
    elif not run.finished:
        found.append("The study has not recorded its end; numbers on time may be missing.")
    if summary.failed:
        found.append(
            f"Diverged: {_of_all(len(summary.failed), len(run.trials))}. They are listed below, "
            "counted as ×n in the figures, and left out of every mean: read a mean beside ×n as conditional "
            "on not diverging."
        )
    edges = at_edge_of_grid(summary)
    if edges:
        ranks = ", ".join(str(condition.rank) for condition in edges)
        found.append(
            f"The chosen learning rate is the lowest or highest one tried at rank {ranks}. A better one may "
            "lie outside the grid; compare ranks after widening it."
        )
    if summary.metric == "val_accuracy" and summary.best is not None:
        found.append(
            "No test accuracy was recorded: rates are chosen and results reported on the same validation "
            "set, which flatters them."
        )
    return found + list(summary.notes)


def _headline(summary: Summary, best: Condition) -> str:
    value = best.interval(summary.metric)
    chosen = [c for ladder in summary.ladders.values() for c in ladder]
    setting = f"{best.family}, learning rate {best.lr:g}" if len(summary.ladders) > 1 else f"learning rate {best.lr:g}"
    value_text = f"{METRIC_NAMES[summary.metric]} is {interval_text(value)}"
    if len(chosen) == 1:
        text = f"Rank {best.rank} ({setting}): the {value_text}"
    else:
        text = f"Rank {best.rank} ({setting}) has the best mean validation accuracy"
        if any(c.values("val_accuracy").size < best.values("val_accuracy").size for c in chosen):
            text += f" among the conditions with {plural(len(best.done), 'finished seed')}"
        text += f". Its {value_text}"
    text += "." if not math.isnan(value.low) else ", from a single seed, so without an interval."
    params, size = best.first("params"), best.first("adapter_bytes")
    if params is not None:
        text += f" It trains {params:,.0f} parameters"
        text += f" ({bytes_text(size)} on disk)." if size is not None else "."
    highest = max(c.mean(summary.metric) for c in chosen if c.values(summary.metric).size)
    if highest > best.mean(summary.metric) and summary.metric == "test_accuracy":
        text += (
            f" (Another condition has the higher mean on test data, {percent(highest)}; the choice is made "
            "on validation data, as it must be.)"
        )
    return text


def _against_smaller(summary: Summary, best: Condition, smaller: Condition) -> str:
    found = summary.comparison(smaller)
    question = f"Is it distinguishable from rank {smaller.rank}, the next smaller one?"
    if found is None or not found.pairs:
        return f"{question} The two share no finished seed, so they cannot be compared."
    evidence = (
        f"mean paired difference {_points(found)}, paired sign-flip test p = {p_text(found.p)}, "
        f"{plural(found.pairs, 'seed')}"
    )
    if found.pairs < seeds_needed():
        return (
            f"{question} This run cannot tell: {evidence}. Fewer than {seeds_needed()} seeds cannot reach p "
            f"< .05 (the smallest p that {plural(found.pairs, 'pair')} can give is "
            f"{smallest_p(found.pairs):.3g}), however large the difference."
        )
    if found.p < 0.05:
        direction = "better" if found.difference < 0 else "worse on test data"
        return f"{question} Yes, it is {direction}: {evidence}."
    return (
        f"{question} No: {evidence}. That does not show the two to be equal; the interval says how large a "
        "difference may remain."
    )


def _cheapest(summary: Summary, best: Condition) -> str:
    """The smallest rank the corrected tests cannot tell from the best; or why they cannot tell."""
    tests = [c for c in summary.comparisons if c.pairs]
    pairs = max((c.pairs for c in tests), default=0)
    if pairs < seeds_needed(len(tests)):
        return (
            f"All ranks at once: with {plural(len(tests), 'comparison')} and Holm's correction no p-value "
            f"can fall below .05 before {seeds_needed(len(tests))} seeds (here {pairs}), so read the "
            "intervals, not the absence of a small p."
        )
    for condition in summary.ladder:
        found = summary.comparison(condition)
        if condition.rank < best.rank and found is not None and found.p_holm >= 0.05:
            return (
                f"The smallest rank not distinguishable from rank {best.rank} is {condition.rank}: the "
                f"difference is {_points(found)}, p = {p_text(found.p_holm)} after Holm's correction over "
                f"{plural(len(tests), 'comparison')}."
            )
    return f"Every smaller rank is distinguishable from rank {best.rank} after Holm's correction."


def _against_probe(summary: Summary, probe: Condition) -> str:
    found = next((c for c in summary.comparisons if c.condition == (*probe.family, 0)), None)
    if found is None or not found.pairs:
        return ""
    gain = -100 * found.difference
    return (
        f"The frozen encoder with a trained head reaches {percent(probe.mean(summary.metric))}; adapting it "
        f"{'adds' if gain >= 0 else 'costs'} {abs(gain):.2f} points (sign-flip p = {p_text(found.p)}, "
        f"{plural(found.pairs, 'seed')})."
    )


def _points(found: Comparison) -> str:
    """best - condition in percentage points with its interval."""
    text = f"{signed(-100 * found.difference)} points"
    if not math.isnan(found.low):
        text += f" (95 % interval {signed(-100 * found.high)} to {signed(-100 * found.low)})"
    return text


def _of_all(part: int, whole: int) -> str:
    return f"all {whole} trials" if part == whole and whole > 1 else f"{part} of {plural(whole, 'trial')}"
