"""Every method at about the same number of trained parameters, on real film reviews: rate swept, six paired seeds.

Command:   python experiments/methods.py [METHOD ...]     (all, or some; a second call goes on where the first stopped)
Hardware:  2 CPU cores
Time:      1 h 10 min with other work on the machine, and 20 min for the rates beyond the sweep
Result:    test accuracy in %, six seeds, intervals of 95 %; differences to LoRA paired by seed, p after Holm

    method   rank  trained  lr     accuracy            against LoRA        p
    LoRA     4     82,944   0.005  78.2 [77.4, 79.2]
    DoRA     3     72,576   0.005  78.2 [77.6, 78.8]   -0.0 [-0.4, +0.4]   1.00
    HRA      8     82,944   0.001  78.8 [78.1, 79.2]   +0.6 [-0.3, +1.4]   0.78
    LoKr     383   19,968   0.025  78.5 [77.7, 79.1]   +0.3 [-1.0, +1.5]   1.00
    LoHa     2     82,944   0.025  78.3 [77.4, 79.1]   +0.2 [-0.7, +1.1]   1.00
    DeLoRA   4     82,962   0.025  77.9 [77.5, 78.3]   -0.3 [-1.1, +0.4]   1.00
    LoRA-XS  68    83,232   0.001  77.3 [77.0, 77.5]   -0.9 [-2.1, -0.1]   0.31
    IA3            10,368   0.125  76.8 [75.4, 78.0]   -1.4 [-2.7, +0.1]   0.75
    VeRA     384   17,280   0.125  76.5 [76.0, 76.9]   -1.6 [-2.9, -0.7]   0.31
    AdaLoRA  4     83,016   0.025  75.4 [75.1, 75.9]   -2.8 [-4.0, -1.8]   0.31
    MiSS     8     82,944   0.001  74.7 [74.1, 75.4]   -3.5 [-4.5, -2.4]   0.31

           No method is clearly above LoRA; best rates lie 125 times apart. The intervals of LoRA-XS, VeRA, AdaLoRA and
           MiSS lie below zero; six pairs cannot give less than p = 0.031, nor ten comparisons of them less than 0.31.
           AdaLoRA is without its budget, DeLoRA's bound is in proportion to the width (below).
Writes:    runs/methods/METHOD/ (one study each: report.html, results.csv, adapters/), runs/methods/table.csv

LoRA of rank 4 sets the number. Methods whose size does not grow with the rank (VeRA, IA3) stay below it, and the table
says by how much. Rates go from 2e-4 to 2.5e-2 by factors of five, and on where the last is best. The rate is chosen by
mean validation accuracy; the interval is that of the test accuracy over seeds,
the difference to LoRA is paired by seed, and its p is Holm's over all methods.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

import lorax_kit as lk
from lorax_kit.analysis.statistics.conditions import holm, interval, paired_test
from lorax_kit.core.leaves import trained_only
from lorax_kit.core.method import METHODS as METHOD_TABLE
from lorax_kit.problems import Sentiment

OUT = Path("runs/methods")
SEEDS, STEPS, RATES = range(6), 100, (2e-4, 1e-3, 5e-3, 2.5e-2)
TARGETS = {"upper-linear": ["encoder/layer_{3..5}/**/kernel"]}
HIGHEST = 384  # of MiniLM's smallest matrix
# Method -> further settings, and what its ranks are multiples of. DeLoRA's update is lambda / sqrt(rank * in) of |W| as
# soon as it moves: PEFT's lambda of 15 is 0.05 |W| at rank 32 and 3,072 inputs; here the same share takes lambda 2.
METHODS = {
    "lora": ({}, 1),
    "dora": ({}, 1),
    "adalora": ({}, 1),
    "miss": ({}, 1),
    "delora": ({"bound": 2.0}, 1),
    "hra": ({}, 2),
    "loha": ({}, 1),
    "lokr": ({}, 1),
    "lora_xs": ({}, 1),
    "vera": ({}, 32),
    "ia3": ({}, 1),
}


def trained(method: str, rank: int, problem: lk.Problem) -> int:
    """Parameters that a method trains beside the head."""
    study = study_of(method, rank)
    params, batch = jax.eval_shape(problem.params, jax.random.key(0)), next(problem.train(0, 0))
    spec = lk.Spec([(pattern, study.setting(study.trials()[0])) for pattern in TARGETS["upper-linear"]])
    plan = lk.resolve(spec, params, problem.apply, batch)
    factors = jax.eval_shape(lambda key: lk.split(problem.params(key), plan, key)[1], jax.random.key(0))
    return sum(x.size for x in jax.tree.leaves(trained_only(plan, factors)))


def study_of(method: str, rank: int, rates: Sequence[float] = RATES) -> lk.Study:
    """The study of one method at one rank."""
    setting = METHOD_TABLE[method].setting
    has = setting.__dataclass_fields__
    return lk.Study(
        variant=method,
        settings={method: METHODS[method][0]},
        rank=rank if "rank" in has else 1,
        alpha=rank if "alpha" in has else None,
        lr=rates,
        seed=SEEDS,
        targets=TARGETS,
        steps=STEPS,
        warmup=10,
        probe_lr=(),
    )


def equal_rank(method: str, wanted: int, problem: lk.Problem) -> int:
    """The rank at which a method trains the number of parameters closest to `wanted`."""
    multiple = METHODS[method][1]
    low, high = 1, HIGHEST // multiple
    while low < high:  # the number grows with the rank, or not at all
        middle = (low + high) // 2
        try:
            enough = trained(method, middle * multiple, problem) >= wanted
        except lk.LoraxError:  # above what the method can hold
            enough = True
        low, high = (low, middle) if enough else (middle + 1, high)
    ranks = [r * multiple for r in (low - 1, low) if r >= 1]
    sizes = {}
    for rank in ranks:
        try:
            sizes[rank] = trained(method, rank, problem)
        except lk.LoraxError:
            continue
    return min(sizes, key=lambda rank: (abs(sizes[rank] - wanted), rank))


def best_rate(rows: list[dict]) -> list[dict]:
    """The trials of the rate with the highest mean validation accuracy."""

    def mean(lr: float) -> float:
        values = [row["val_accuracy"] for row in rows if row["lr"] == lr and row["status"] == "done"]
        return sum(values) / len(values) if len(values) == len(SEEDS) else 0.0

    chosen = max(sorted({row["lr"] for row in rows}), key=mean)
    return sorted((row for row in rows if row["lr"] == chosen), key=lambda row: row["seed"])


def swept(method: str, rank: int, problem: lk.Problem) -> tuple[list[dict], list[float]]:
    """The trials of the best rate, and the rates tried: the folder grows by one where the best is the sweep's end."""
    rates = list(RATES)
    while True:
        study = study_of(method, rank, rates)
        rows = best_rate(lk.run(study, problem, out=OUT / method, command="python experiments/methods.py").rows)
        best = rows[0]["lr"]
        if len(rates) >= len(RATES) + 2 or min(rates) < best < max(rates):
            return rows, rates
        rates = sorted([*rates, best * 5 if best == max(rates) else best / 5])


def main(names: list[str]) -> None:
    problem = Sentiment(length=32, val=256).build()
    wanted = trained("lora", 4, problem)
    runs = {}
    for name in names:
        rank = equal_rank(name, wanted, problem)
        print(f"{name}: rank {rank}, {trained(name, rank, problem):,} of {wanted:,} parameters", file=sys.stderr)
        rows, rates = swept(name, rank, problem)
        runs[name] = (rank, rows, trained(name, rank, problem), rates)
    table, reference = [], runs.get("lora")
    for name, (rank, rows, size, rates) in runs.items():
        tests = [row["test_accuracy"] for row in rows]
        spread = interval(tests)
        paired = None if reference is None or name == "lora" else [row["test_accuracy"] for row in reference[1]]
        difference = None if paired is None else interval([x - y for x, y in zip(tests, paired, strict=True)])
        table.append(
            {
                "method": name,
                "rank": rank,
                "params": size,
                "lr": rows[0]["lr"],
                "rates": " ".join(f"{lr:g}" for lr in rates),
                "test_accuracy": spread.mean,
                "low": spread.low,
                "high": spread.high,
                "against_lora": None if difference is None else difference.mean,
                "against_low": None if difference is None else difference.low,
                "against_high": None if difference is None else difference.high,
                "p": None if paired is None else paired_test(tests, paired),
                "train_seconds": sum(row["train_seconds"] for row in rows) / len(rows),
            }
        )
    compared = [row for row in table if row["p"] is not None]
    for row, p in zip(compared, holm([row["p"] for row in compared]) if compared else [], strict=True):
        row["p_holm"] = float(p)
    with open(OUT / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*table[0], "p_holm"])
        writer.writeheader()
        writer.writerows(table)
    for row in table:
        against = "" if row["p"] is None else f"  {100 * row['against_lora']:+.1f} points, p {row['p_holm']:.3f}"
        interval_text = f"{row['test_accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        tried = [float(lr) for lr in row["rates"].split()]
        edge = "" if min(tried) < row["lr"] < max(tried) else " (the end of the sweep)"
        rate = f"lr {row['lr']:g}{edge}"
        print(f"{row['method']:9} rank {row['rank']:3} {row['params']:8,} {rate}  {interval_text}{against}")


if __name__ == "__main__":
    if unknown := sorted(set(sys.argv[1:]) - set(METHODS)):
        sys.exit(f"method {unknown[0]!r} is unknown; choose from {', '.join(METHODS)}.")
    main(sys.argv[1:] or list(METHODS))
