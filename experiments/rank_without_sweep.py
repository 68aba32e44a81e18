"""Ranks without the sweep: nested training, truncation and ranks from spectra, each beside the true ladder.

Command:   python experiments/rank_without_sweep.py     (the ladder goes on where an earlier call stopped)
Hardware:  2 CPU cores
Time:      8 min
Result:    test accuracy in %, six seeds, intervals of 95 %; the difference to the ladder's adapter is paired by seed

    rank  ladder               nested                truncated              ranks by gradients    by inputs
    1     77.9 [76.9, 78.7]    -1.2 [-1.9, -0.5]     -1.3 [-2.7, +0.1]
    2     78.1 [77.3, 78.8]    -0.9 [-1.8, +0.0]     -0.3 [-1.6, +1.0]
    4     78.9 [78.0, 79.5]    -1.2 [-2.1, -0.5]     -0.1 [-1.5, +1.3]      -0.5 [-1.5, +0.7]     -0.1 [-0.6, +0.6]
    8     78.6 [78.0, 79.4]    -1.1 [-2.3, -0.1]     +0.1 [-0.4, +1.0]
    16    78.8 [78.1, 79.5]    -2.3 [-6.4, -0.1]

           Rank 16 cut by SVD is as good as a ladder from rank 2 on, for a fifth of the training; one nested run, which
           costs as much, is a point behind at every rank (each rank has but a fifth of its steps). Ranks by spectra are
           no better than equal ranks at this budget.
Writes:    runs/rank_without_sweep/ladder/ (a study), runs/rank_without_sweep/table.csv

Film reviews, MiniLM's upper three layers, 100 steps, six seeds. The ladder trains every rank; "nested" trains rank 16
once with a rank drawn at each step, and is cut after its first rows; "truncated" cuts the ladder's rank 16 by SVD;
"gradients" and "inputs" spend rank 4's budget on the sites whose gradients or inputs at the start have the directions
that count the most. Every one is compared with the ladder's adapter of the same rank and seed.
"""

import itertools
from pathlib import Path

import jax
import numpy as np
import optax
from tables import against, spread, write
from tqdm import tqdm

import lorax_kit as lk
from lorax_kit.analysis import gradient_spectra
from lorax_kit.problem import val_and_test
from lorax_kit.problems import Sentiment
from lorax_kit.starts.eva import explained
from lorax_kit.study.programs.steps import rate
from lorax_kit.training import first_rows, nested

OUT = Path("runs/rank_without_sweep")
RANKS, SEEDS, STEPS, WARMUP, RATE, ALPHA = (1, 2, 4, 8, 16), range(6), 100, 10, 2e-3, 16.0
TARGETS = "encoder/layer_{3..5}/**/kernel"
STUDY = lk.Study(
    rank=RANKS,
    alpha=ALPHA,
    rslora=True,
    lr=RATE,
    seed=SEEDS,
    targets={"upper-linear": [TARGETS]},
    steps=STEPS,
    warmup=WARMUP,
)


def start(problem, plan, seed):
    """Where the study's trial of a seed starts."""
    key = jax.random.key(seed)
    return lk.split(problem.params(jax.random.fold_in(key, 0)), plan, jax.random.fold_in(key, 1))


def trained(problem, plan, name, ranks=None):
    """The factors of every seed, trained as the study trains; with `ranks` nested."""
    adapted = lk.adapt(problem.apply, plan)

    def loss(base, factors, batch, key=None):
        return problem.loss(adapted(base, factors, batch), batch)

    init, step = lk.make_step(
        nested(loss, plan, ranks) if ranks else loss,
        lk.partition(optax.adamw(rate(STUDY, RATE), weight_decay=0.0), plan, clip=1.0),
    )
    out = []
    for seed in tqdm(SEEDS, desc=name, disable=None):
        base, factors = start(problem, plan, seed)
        state = init(factors, jax.random.key(seed)) if ranks else init(factors)
        for batch in itertools.islice(problem.train(0, 0), STEPS):
            state, _ = step(state, base, batch)
        out.append((base, state.factors))
    return out


def accuracies(problem, adapters):
    """Test accuracy of (base, plan, factors), each merged."""
    found, test = [], None
    for base, plan, factors in adapters:
        merged = lk.merge(base, factors, plan)
        test = test or val_and_test(problem, merged, plan.trained)[1]
        found.append(100 * test(merged)["accuracy"])
    return found


def values_at_start(problem, plan):
    """{"gradients", "inputs"}: site -> what its directions count for, over eight batches of the start."""
    base, factors = start(problem, plan, 0)
    batches = list(itertools.islice(problem.train(1, 0), 8))
    measure = gradient_spectra(lambda p, batch: problem.loss(problem.apply(p, batch), batch), plan, base)
    spectra = [measure(factors, batch) for batch in batches]
    gradients = {
        rows[0].path: np.mean([row.singular_values**2 for row in rows], axis=0) for rows in zip(*spectra, strict=True)
    }
    stats = lk.calibrate(problem.apply, base, plan, batches, weight="mask", progress=False)
    return {"gradients": gradients, "inputs": {site.path: explained(site, stats) for site in plan.sites}}


def main() -> None:
    problem = Sentiment(length=32, val=256).build()
    rows = lk.run(STUDY, problem, out=OUT / "ladder", command="python experiments/rank_without_sweep.py").rows
    ladder = {r: [100 * row["test_accuracy"] for row in rows if row["rank"] == r] for r in RANKS}
    batch = next(problem.train(0, 0))
    params = problem.params(jax.random.key(0))

    def plan_of(rank):
        rules = [(TARGETS, lk.LoRA(rank=rank, alpha=ALPHA, rslora=True)), *problem.whole_rules]
        return lk.resolve(lk.Spec(rules), params, problem.apply, batch)

    highest = plan_of(max(RANKS))
    found = {("ladder", r): ladder[r] for r in RANKS}
    nest = trained(problem, highest, "nested", RANKS)
    for rank in RANKS:
        cut = [(base, *first_rows(highest, factors, rank)) for base, factors in nest]
        found["nested", rank] = accuracies(problem, cut)
    for rank in RANKS[:-1]:
        cut = []
        for row in (row for row in rows if row["rank"] == max(RANKS)):
            base, _ = start(problem, highest, row["seed"])
            adapter = lk.load_adapter(OUT / "ladder" / row["adapter"], base=base)
            small = lk.algebra.truncate(adapter, rank=rank, base=base)
            cut.append((base, small.plan, small.factors))
        found["truncated", rank] = accuracies(problem, cut)
    for name, values in values_at_start(problem, plan_of(4)).items():
        plan = lk.starts.spend_ranks(plan_of(4), values, rho=4)
        print(name, {site.path.removeprefix("encoder/"): site.rank for site in plan.sites})
        found[name, 4] = accuracies(problem, [(base, plan, factors) for base, factors in trained(problem, plan, name)])
    table = []
    for (how, rank), values in found.items():
        row = {"how": how, "rank": rank} | spread(values)
        table.append(row | (against(values, ladder[rank]) if how != "ladder" else {}))
    write(OUT / "table.csv", table)


if __name__ == "__main__":
    main()
