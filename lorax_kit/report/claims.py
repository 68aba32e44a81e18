"""What a run can claim: the smallest rank not inferior, how many seeds would tell, what finite data leave open."""

from __future__ import annotations

import math
import shlex
from typing import NamedTuple

from lorax_kit.analysis.statistics.conditions import (
    Comparison,
    Interval,
    NonInferior,
    Rung,
    SeedsToTell,
    non_inferior,
    over_examples,
    seeds_needed,
    seeds_to_tell,
)
from lorax_kit.report.conditions import (
    Condition,
    Summary,
    at_edge_of_grid,
    best_of,
    compare_conditions,
    differences,
    paired_rows,
    rates_tried,
)
from lorax_kit.report.run_folder import RunFolder
from lorax_kit.report.tables.text import plural

LIMITS = "one-sided 97.5 % limit of the paired differences; --margin states another margin"

SENSIBLE = 100
"""More seeds than that are not proposed: the difference is too small for its spread."""


def smaller_ranks(summary: Summary) -> list[Condition]:
    """The chosen conditions of the best one's ladder below it that have values, the nearest last."""
    best = summary.best
    return [c for c in summary.ladder if best is not None and c.rank < best.rank and c.values(summary.metric).size]


def smallest_not_inferior(summary: Summary) -> NonInferior | None:
    """The smallest rank that is not inferior to the best by the run's margin; None without margin or smaller ranks."""
    smaller = smaller_ranks(summary)[::-1]
    if summary.best is None or summary.margin is None or not smaller:
        return None
    return non_inferior(
        paired_rows([summary.best, *smaller]),
        summary.metric,
        ("condition",),
        (summary.best.key,),
        margin=summary.margin,
        better=summary.measure.better,
        ladder=[(condition.key,) for condition in smaller],
    )


def not_inferior_text(summary: Summary) -> str:
    """What can be said of smaller ranks with the margin; how to state one where there is none."""
    best, measure = summary.best, summary.measure
    if best is None or not smaller_ranks(summary):
        return ""
    tested = smallest_not_inferior(summary)
    if tested is None or summary.margin is None:
        return (
            f"No margin was stated for the {measure.word}, so no smaller rank is claimed to be as good: "
            "report again with --margin, the largest change for the worse that does not matter."
        )
    held = [rung for rung in tested.rungs if rung.holds]
    failing = next((rung for rung in tested.rungs if not rung.holds), None)
    margin = f"a margin of {measure.amount(summary.margin)}"
    if not held:
        failed = "" if failing is None else _rung(summary, failing)
        return f"No smaller rank is shown to be as good as rank {best.rank} within {margin}: {failed} ({LIMITS})."
    text = (
        f"The smallest rank shown to be not inferior to rank {best.rank}, within {margin}, is "
        f"{held[-1].condition[0][-1]}: {_rung(summary, held[-1])} ({LIMITS})."
    )
    return text if failing is None else f"{text} Below it, {_rung(summary, failing)}."


def _rung(summary: Summary, rung: Rung) -> str:
    rank, seeds = rung.condition[0][-1], plural(rung.pairs, "seed")
    if math.isnan(rung.bound):
        return f"the difference to rank {rank} has no interval, {seeds}"
    return f"rank {rank} is at worst {_worse(summary, rung.bound)}, {seeds}"


def _worse(summary: Summary, bound: float) -> str:
    """A limit of (smaller - best) as how much worse that is."""
    loss = -summary.measure.sign * bound
    amount = summary.measure.amount(loss)
    return f"{amount} worse" if loss > 0 else f"{amount} better"


class Methods(NamedTuple):
    """Every method, or other setting, at its own best rank and rate; the best on validation data first.

    `comparisons` are of the others against the reference, Holm-corrected among them, named by their `key`.
    """

    conditions: tuple[Condition, ...]
    reference: Condition
    comparisons: tuple[Comparison, ...]


def methods_compared(summary: Summary) -> Methods | None:
    """Each family at its best rank and rate by validation; None where fewer than two have finished.

    The reference is plain LoRA where it took part, the best LoRA family of several; otherwise the best of all.
    """
    sign = summary.measure.sign
    best = [best_of(ladder, summary.measure) for ladder in summary.ladders.values()]
    best = [condition for condition in best if condition.values(summary.metric).size]
    if len(best) < 2:
        return None
    most = max(condition.values(summary.choice).size for condition in best)
    best.sort(key=lambda c: (c.values(summary.choice).size < most, -sign * c.mean(summary.choice)))
    lora = [c for c in best if c.family.variant == "lora"]
    plain = [c for c in lora if not c.family.rest]
    reference = (plain or lora or best)[0]
    return Methods(tuple(best), reference, compare_conditions(best, summary.metric, reference))


def tests_of(summary: Summary) -> int:
    """How many comparisons Holm's correction is over."""
    return sum(c.pairs > 0 for c in summary.comparisons)


def seeds_of(summary: Summary) -> int:
    """The most paired seeds of a comparison."""
    return max((c.pairs for c in summary.comparisons), default=0)


def power(summary: Summary) -> tuple[Condition, SeedsToTell] | None:
    """How many seeds would tell a difference of the margin from the next smaller rank, or from the first other one."""
    others = smaller_ranks(summary)[-1:] or [c for c in summary.ladder if c is not summary.best]
    if summary.best is None or summary.margin is None or not others:
        return None
    try:
        gaps = differences(others[0], summary.best, summary.metric)
        return others[0], seeds_to_tell(gaps, summary.margin, comparisons=max(tests_of(summary), 1))
    except ValueError:  # fewer than two pairs, or no spread
        return None


def power_text(summary: Summary) -> str:
    """The power note; empty where the spread of differences is unknown."""
    estimate = power(summary)
    if estimate is None or summary.margin is None or summary.best is None:
        return ""
    other, told = estimate
    have = differences(other, summary.best, summary.metric).size
    tests = tests_of(summary)
    corrected = f" with Holm's correction over {plural(tests, 'comparison')}" if tests > 1 else ""
    amount = summary.measure.amount
    return (
        f"Power: the paired differences between ranks {summary.best.rank} and {other.rank} have a standard deviation "
        f"of {amount(told.sd)}. To find a true difference of {amount(summary.margin)} in four of five studies takes "
        f"about {told.seeds:,} seeds{corrected} ({told.low:,} to {told.high:,}, since {have} pairs say little of that "
        "deviation)."
    )


def more_seeds(summary: Summary) -> tuple[str, str] | None:
    """Why more seeds are wanted, and the command that adds them; None where the run has enough."""
    if summary.best is None or not summary.comparisons:
        return None
    have, needed = seeds_of(summary), seeds_needed(tests_of(summary))
    estimate = power(summary)
    asked = estimate[1].seeds if estimate and estimate[1].seeds <= SENSIBLE else 0
    wanted = max(needed, asked)
    if have >= wanted:
        return None
    if have >= needed:
        why = f"the spread seen asks for about {wanted}"
    else:
        why = f"p can fall below 0.05 from {needed} seeds on"
        why += f", and the spread seen asks for about {wanted}" * (needed < wanted)
    kept = (
        "A study that stops trials early does not grow: another folder"
        if stops(summary.run)
        else "The finished trials are kept"
    )
    return f"More seeds would tell ({why}; this run has {have}). {kept}:", add_seeds(summary.run, wanted)


def stops(run: RunFolder) -> bool:
    """Whether a rule stops trials early."""
    return bool((run.study.get("design") or {}).get("stop"))


def add_seeds(run: RunFolder, seeds: int) -> str:
    """The command line that brings a run to `seeds` seeds, its own with --seeds; the call, where Python made the run.

    Of a study that stops trials early it runs anew, in a folder of its own.

    Example:
      >>> add_seeds(read_run("runs/demo"), 6)  # doctest: +SKIP
      'lorax-kit study --config experiments/demo.json --out runs/demo --seeds 6'
    """
    try:
        words = shlex.split(str(run.study.get("command") or ""))
    except ValueError:
        words = []
    path = f"{run.path}-{seeds}-seeds" if stops(run) else str(run.path)
    if words[:2] != ["lorax-kit", "study"] or not {"--config", "--out"} <= {word.split("=")[0] for word in words}:
        return f"lk.run(dataclasses.replace(study, seed=range({seeds})), problem, out={path!r})"
    kept = [word for word in words if word not in ("--json", "--overwrite") and not word.startswith("--seeds=")]
    while "--seeds" in kept:
        place = kept.index("--seeds")
        del kept[place : place + 2]
    if stops(run):
        place = next(i for i, word in enumerate(kept) if word.split("=")[0] == "--out")
        kept[place : place + (1 if "=" in kept[place] else 2)] = ["--out", path]
    return shlex.join([*kept, "--seeds", str(seeds)])


def examples_error(summary: Summary, condition: Condition, column: str) -> Interval | None:
    """Where an accuracy would lie over all examples that those of a column's part were drawn from.

    None for other metrics, whose spread over examples is not recorded, and where the number of examples is unknown.
    """
    count = (summary.run.study.get("task") or {}).get(column.split("_")[0])
    mean = condition.mean(column)
    if not (isinstance(count, int) and count > 0 and summary.measure.counted and 0 <= mean <= 1):
        return None
    return over_examples(mean, count)


def rates_text(summary: Summary) -> list[str]:
    """Sentences on learning rates that may decide the comparison of ranks: too few, or the best at the grid's edge."""
    said, edges = [], at_edge_of_grid(summary)
    few = max((rates_tried(summary, condition) for condition in summary.ladder), default=0)
    if len(summary.ladder) > 1 and few < 3:
        said.append(
            f"Only {'one learning rate was' if few == 1 else 'two learning rates were'} tried per rank: a rank may "
            f"look better only because {'that rate suits' if few == 1 else 'those rates suit'} it. To compare ranks, "
            "try at least three rates around the best."
        )
    if edges:
        ranks = ", ".join(str(condition.rank) for condition in edges)
        said.append(
            f"The chosen learning rate is the lowest or highest one tried at rank {ranks}. A better one may "
            "lie outside the grid; compare ranks after widening it."
        )
    return said
