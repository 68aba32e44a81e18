"""The answer of a study in words: which rank, is that a difference at all, and what does it cost.

The wording is held to what the seeds can show: with fewer than six pairs the sign-flip test cannot reach
p < .05, and then the text says that the run cannot tell, not that there is no difference.
"""

from __future__ import annotations

import math

from lorax_kit.analysis.statistics.conditions import seeds_needed, smallest_p
from lorax_kit.core.specs.setting import is_number
from lorax_kit.report.claims import examples_error, not_inferior_text, power_text, rates_text, smaller_ranks
from lorax_kit.report.conditions import Condition, Summary
from lorax_kit.report.tables.text import bytes_text, p_text, plural


def answer(summary: Summary) -> list[str]:
    """Sentences that answer "which rank, and does it matter?", most important first.

    Returns:
      Paragraphs of plain text; at least one, whatever the run holds.

    Example:
      >>> print("\\n".join(answer(summarise(read_run("runs/demo")))))  # doctest: +SKIP
      Rank 4 (learning rate 0.002) has the best mean validation accuracy. Its test accuracy is 78.3 % ...
    """
    best = summary.best
    if best is None:
        if not summary.conditions:
            return [
                "This run holds only the probe (a trained head on the frozen base) so far; no rank can be compared yet."
            ]
        diverged = f"{_of_all(len(summary.failed), len(summary.run.trials))} diverged"
        return [
            f"No rank can be recommended: {diverged if summary.failed else 'no trial finished'}. "
            "A learning rate well below those tried is the first thing to change."
        ]
    if not best.values(summary.metric).size:
        return [f"Trials finished, but none of them recorded the {summary.measure.word}; see the losses below."]
    paragraphs = [_headline(summary, best), _choice_error(summary, best)]
    smaller = smaller_ranks(summary)
    if smaller:
        paragraphs += [not_inferior_text(summary), _against_smaller(summary, best, smaller[-1])]
    elif len([c for c in summary.ladder if c.values(summary.metric).size]) > 1:
        tried = [str(c.rank) for c in summary.ladder if c.rank < best.rank]
        advice = "" if best.rank == 1 else "; try smaller ones"
        if tried:
            advice = f"; of rank {', '.join(tried)} all trials {summary.lost}"
        paragraphs.append(f"Rank {best.rank} is also the smallest rank that finished{advice}.")
    else:
        paragraphs.append("Only one rank finished, so nothing can be said about the choice of rank.")
    if len(smaller) > 1:
        paragraphs.append(_cheapest(summary, best, smaller))
    if summary.probe is not None:
        paragraphs.append(_against_probe(summary, best, summary.probe))
    paragraphs.append(power_text(summary))
    return [paragraph for paragraph in paragraphs if paragraph]


def cautions(summary: Summary) -> list[str]:
    """What limits the answer: an unfinished run, diverged trials, too few rates or one at the edge, notes."""
    run = summary.run
    limits = []
    if len(run.trials) < run.planned:
        limits.append(
            f"Partial run: {len(run.trials)} of {run.planned} trials. Everything here may change when the "
            "others finish."
        )
    elif not run.finished:
        limits.append("The study has not recorded its end; numbers on time may be missing.")
    if summary.failed:
        limits.append(
            f"Diverged: {_of_all(len(summary.failed), len(run.trials))}. They are listed below, "
            "counted as ×n in the figures, and left out of every mean: read a mean beside ×n as conditional "
            "on not diverging."
        )
    if summary.stopped:
        limits.append(_stopped(summary))
    limits += rates_text(summary)
    for column in dict.fromkeys((summary.choice, summary.metric)):
        odd = [t for t in run.trials if t["status"] == "done" and not is_number(t.get(column))]
        if odd and len(odd) < len(run.trials):
            limits.append(
                f"{plural(len(odd), 'finished trial')} with no finite {column.replace('_', ' ')}, such as "
                f"{odd[0]['trial']}: left out of every mean and choice."
            )
    if not summary.tested and summary.best is not None:
        limits.append(
            f"No test {summary.measure.word} was recorded: rates are chosen and results reported on the same "
            "validation set, which flatters them."
        )
    return limits + list(summary.notes)


def _headline(summary: Summary, best: Condition) -> str:
    value = best.interval(summary.metric)
    chosen = [c for ladder in summary.ladders.values() for c in ladder]
    seeds = best.values(summary.choice).size
    passed_over = [c for c in chosen if c.values(summary.choice).size < seeds]
    rivals = [c for c in chosen if c.values(summary.choice).size >= seeds and c.values(summary.metric).size]
    setting = f"{best.family}, learning rate {best.lr:g}" if len(summary.ladders) > 1 else f"learning rate {best.lr:g}"
    value_text = f"{summary.label} is {summary.measure.interval(value)}"
    if len(chosen) == 1:
        text = f"Rank {best.rank} ({setting}): the {value_text}"
    else:
        text = f"Rank {best.rank} ({setting}) has the best mean validation {summary.measure.word}"
        if passed_over:
            text += f" among the conditions with {plural(seeds, 'finished seed')}"
        tied = [c for c in rivals if c is not best and c.mean(summary.choice) == best.mean(summary.choice)]
        if tied:
            text += f", tied with {plural(len(tied), 'other')}; it has the fewest parameters, then the lowest loss"
        text += f". Its {value_text}"
    if not math.isnan(value.low):
        text += "."
    elif best.values(summary.metric).size == 1:
        text += " from a single seed, so without an interval."
    else:
        text += f" at all {best.values(summary.metric).size} seeds; no spread was seen, so there is no interval."
    params, size = best.first("params"), best.first("adapter_bytes")
    if params is not None:
        text += f" It trains {params:,.0f} parameters"
        text += f" ({bytes_text(size)} on disk)." if size is not None else "."
    sign = summary.measure.sign
    top = max(rivals, key=lambda c: sign * c.mean(summary.metric))
    if sign * top.mean(summary.metric) > sign * best.mean(summary.metric) and summary.tested:
        text += (
            f" (Rank {_which(top, best)} has a {'higher' if sign > 0 else 'lower'} mean on test data, "
            f"{summary.measure.text(top.mean(summary.metric))}; "
            "the choice is made on validation data, as it must be.)"
        )
    if passed_over:
        names = ", ".join(f"{_which(c, best)} with {c.values(summary.choice).size}" for c in passed_over)
        text += f" Not considered, having fewer finished seeds: rank {names}."
    return text


def _choice_error(summary: Summary, best: Condition) -> str:
    """What the finite validation set leaves open: ranks within the interval of the best mean over other examples."""
    error = examples_error(summary, best, summary.choice)
    if error is None or len(summary.ladder) < 2:
        return ""
    near = [c for c in summary.ladder if c is not best and c.mean(summary.choice) >= error.low]
    if not near:
        return ""
    ranks = ", ".join(str(c.rank) for c in near)
    shown = summary.measure.interval(error._replace(method=error.method.replace("examples", "validation examples")))
    return (
        f"The choice rests on a finite validation set: its mean accuracy, {shown}, would differ on other examples, "
        f"whatever the seeds; rank {ranks} lie{'s' if len(near) == 1 else ''} within that interval."
    )


def _stopped(summary: Summary) -> str:
    """How many trials were stopped early, and when."""
    steps = [trial.get("stopped_at") or trial.get("steps") for trial in summary.stopped]
    known = sorted({int(step) for step in steps if step})
    when = f", at step {known[0]}" if len(known) == 1 else f", at steps {known[0]} to {known[-1]}" if known else ""
    return (
        f"Stopped early: {_of_all(len(summary.stopped), len(summary.run.trials))}{when}, for being behind others. They "
        "enter no mean, so a condition that was stopped at some seeds has fewer of them."
    )


def _which(condition: Condition, best: Condition) -> str:
    """The rank, and the family where it is not that of the best."""
    return f"{condition.rank}" + (f" ({condition.family})" if condition.family != best.family else "")


def _against_smaller(summary: Summary, best: Condition, smaller: Condition) -> str:
    comparison = summary.comparison(smaller)
    question = f"Is it distinguishable from rank {smaller.rank}, the next smaller one?"
    if comparison is None or not comparison.pairs:
        return f"{question} The two share no finished seed, so they cannot be compared."
    evidence = (
        f"mean paired difference {summary.measure.difference(comparison)}, "
        f"sign-flip test of this pair alone {_p(comparison.p)}, {plural(comparison.pairs, 'seed')}"
    )
    if comparison.pairs < seeds_needed():
        return (
            f"{question} This run cannot tell: {evidence}. Fewer than {seeds_needed()} seeds cannot reach "
            f"p < 0.05 (the smallest p that {plural(comparison.pairs, 'pair')} can give is "
            f"{smallest_p(comparison.pairs):.3g}), however large the difference."
        )
    if comparison.p < 0.05:
        direction = "better" if summary.measure.sign * comparison.difference < 0 else "worse on test data"
        return f"{question} Yes, it is {direction}: {evidence}."
    remains = "the interval says how large a difference may remain."
    if math.isnan(comparison.low):
        remains = "the difference was the same at every seed, so there is no interval of what may remain."
    return f"{question} No: {evidence}. That does not show the two to be equal; {remains}"


def _cheapest(summary: Summary, best: Condition, smaller: list[Condition]) -> str:
    """The smallest rank the corrected tests cannot tell from the best; or why they cannot tell."""
    tests = [c for c in summary.comparisons if c.pairs]
    needed = seeds_needed(len(tests))
    most = max((c.pairs for c in tests), default=0)
    if most < needed:
        return (
            f"All rows of the table at once: with {plural(len(tests), 'comparison')} and Holm's correction no "
            f"p-value can fall below 0.05 before {needed} seeds (here {most}), so read the intervals, not the "
            "absence of a small p."
        )
    by_rank = {c.rank: summary.comparison(c) for c in smaller}
    alike = {rank: c for rank, c in by_rank.items() if c is not None and not c.p_holm < 0.05}  # nan without a pair
    unclear = [rank for rank, c in alike.items() if c.pairs < needed]
    aside = f" (Rank {', '.join(map(str, unclear))}: too few seeds finished to tell.)" if unclear else ""
    over = f"Holm's correction over {plural(len(tests), 'comparison')}"
    for rank, c in alike.items():
        if rank not in unclear:
            return (
                f"The smallest rank not distinguishable from rank {best.rank} is {rank}: the difference is "
                f"{summary.measure.difference(c)}, {_p(c.p_holm)} after {over}.{aside}"
            )
    which = "Every other smaller rank" if unclear else "Every smaller rank"
    return f"{which} is distinguishable from rank {best.rank} after {over}.{aside}"


def _against_probe(summary: Summary, best: Condition, probe: Condition) -> str:
    comparison = next((c for c in summary.comparisons if c.condition == (*probe.family, 0)), None)
    if comparison is None or not comparison.pairs:
        return ""
    state = summary.run.study.get("state") or ()
    moves = f" (its weights are frozen; {', '.join(map(str, state))}, which training updates, is not)" if state else ""
    return (
        f"The frozen base with a trained head{moves} reaches "
        f"{summary.measure.text(probe.mean(summary.metric))}; rank {best.rank} differs from it by "
        f"{summary.measure.difference(comparison)}, sign-flip test of this pair alone {_p(comparison.p)}, "
        f"{plural(comparison.pairs, 'seed')}."
    )


def _p(p: float) -> str:
    """0.031 -> "p = 0.031", 0.0001 -> "p < 0.001"."""
    text = p_text(p)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _of_all(part: int, whole: int) -> str:
    return f"all {whole} trials" if part == whole and whole > 1 else f"{part} of {plural(whole, 'trial')}"
