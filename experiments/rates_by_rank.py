"""Does the best rate depend on the rank? alpha / r, alpha / sqrt(r), and ten times the rate of full fine-tuning.

Command:   python experiments/rates_by_rank.py     (a second call goes on where the first stopped)
Hardware:  2 CPU cores
Time:      50 min with other work on the machine
Result:    best rate, and test accuracy in % there; six seeds, intervals of 95 %

    scale           rank 1                     rank 8                     rank 64
    alpha / r       0.003: 77.3 [76.7, 78.0]   0.003: 78.6 [77.9, 79.0]   0.003: 78.5 [78.0, 79.2]
    alpha / sqrt r  0.003: 78.1 [77.5, 78.6]   0.003: 78.6 [77.9, 79.0]   0.001: 78.8 [78.1, 79.4]
    full            0.0003: 79.3 [78.8, 79.7]

           Agrees with LoRA Without Regret: under alpha / r the best of five rates is the same at ranks 1 to 64, and ten
           times that of full fine-tuning. Does not show what alpha / sqrt(r) is for: rank 64 learns as much under
           either scale in so few steps, and under alpha / sqrt(r) its best rate is lower.
Writes:    runs/rates_by_rank/{linear,sqrt}/ (a study each), runs/rates_by_rank/table.csv

Film reviews, MiniLM's upper three layers, 100 steps, six seeds. Schulman et al., "LoRA Without Regret" (2025), find
that with a scale of alpha / r the best rate is about the same at every rank, and ten times that of full fine-tuning;
Kalajdzievski (arXiv 2312.03732) holds that alpha / r keeps high ranks from learning, and alpha / sqrt(r) does not. Both
scales are equal at rank 8. The best rate is that of the highest mean validation accuracy.
"""

import itertools
from pathlib import Path

import jax
import optax
from tables import spread, write
from tqdm import tqdm

import lorax_kit as lk
from lorax_kit.problem import val_and_test
from lorax_kit.problems import Sentiment
from lorax_kit.study.programs.steps import rate

OUT = Path("runs/rates_by_rank")
RANKS, SEEDS, STEPS, WARMUP = (1, 8, 64), range(6), 100, 10
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FULL_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
TARGETS = "encoder/layer_{3..5}/**/kernel"
SCALES = {"linear": {"alpha": 16.0, "rslora": False}, "sqrt": {"alpha": 16.0 / 8**0.5, "rslora": True}}


def study_of(scale: str) -> lk.Study:
    """All ranks and rates under one scale."""
    return lk.Study(
        rank=RANKS,
        lr=RATES,
        seed=SEEDS,
        targets={"upper-linear": [TARGETS]},
        steps=STEPS,
        warmup=WARMUP,
        **SCALES[scale],
    )


def full_rows(problem: lk.Problem) -> list[dict]:
    """Full fine-tuning of the same matrices, by the study's optimiser and schedule."""
    params, batch = problem.params(jax.random.key(0)), next(problem.train(0, 0))
    plan = lk.resolve(lk.Spec([(TARGETS, lk.Full()), *problem.whole_rules]), params, problem.apply, batch)
    adapted = lk.adapt(problem.apply, plan)

    def loss(base, factors, batch):
        return problem.loss(adapted(base, factors, batch), batch)

    rows, measures, steps = [], None, {}
    for peak, seed in tqdm(list(itertools.product(FULL_RATES, SEEDS)), desc="full", disable=None):
        key = jax.random.key(seed)
        base, factors = lk.split(problem.params(jax.random.fold_in(key, 0)), plan, jax.random.fold_in(key, 1))
        if peak not in steps:
            tx = lk.partition(optax.adamw(rate(study_of("linear"), peak), weight_decay=0.0), plan, clip=1.0)
            steps[peak] = lk.make_step(loss, tx)
        init, step = steps[peak]
        state = init(factors)
        for batch in itertools.islice(problem.train(0, 0), STEPS):
            state, _ = step(state, base, batch)
        merged = lk.merge(base, state.factors, plan)
        measures = measures or val_and_test(problem, merged, plan.trained)
        val, test = (measure(merged) for measure in measures)
        rows.append({"lr": peak, "val_accuracy": val["accuracy"], "test_accuracy": test["accuracy"]})
    return rows


def chosen(rows: list[dict], how: str, rank: int | None) -> dict:
    """The rate of the highest mean validation accuracy, and the test accuracy there."""
    by_rate = {lr: [row for row in rows if row["lr"] == lr] for lr in sorted({row["lr"] for row in rows})}
    means = {lr: sum(r["val_accuracy"] or 0 for r in some) / len(some) for lr, some in by_rate.items()}
    best = max(means, key=means.__getitem__)
    curve = " ".join(f"{lr:g}:{100 * mean:.1f}" for lr, mean in means.items())
    tests = spread(100 * row["test_accuracy"] for row in by_rate[best])
    return {"how": how, "rank": rank, "lr": best, **tests, "validation": curve}


def main() -> None:
    problem = Sentiment(length=32, val=256).build()
    table = []
    for scale in SCALES:
        rows = lk.run(study_of(scale), problem, out=OUT / scale, command="python experiments/rates_by_rank.py").rows
        table += [chosen([row for row in rows if row["rank"] == rank], scale, rank) for rank in RANKS]
    table.append(chosen(full_rows(problem), "full", None))
    write(OUT / "table.csv", table)


if __name__ == "__main__":
    main()
