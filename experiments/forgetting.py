"""Does LoRA learn less and forget less than full fine-tuning, and do intruder dimensions have to do with it?

Command:   python experiments/smollm2_ranks.py fp32, then python experiments/forgetting.py
Hardware:  2 CPU cores
Time:      12 min, in two calls: LoRA's rates that validation did not choose came second
Result:    perplexity (the base: plays 55.3, prose 97.0), six seeds, intervals of 95 %

    method   lr      plays (learnt)       prose (forgotten)
    LoRA 1   0.001   45.2 [44.6, 45.4]    97.7 [96.7, 98.4]
    LoRA 1   0.003   41.6 [41.0, 42.2]    113.0 [109.0, 117.7]
    LoRA 8   0.001   42.6 [42.0, 43.0]    103.6 [101.6, 105.7]
    LoRA 8   0.003   40.0 [39.5, 40.5]    127.3 [120.7, 137.0]
    LoRA 64  0.001   40.5 [39.9, 41.1]    112.6 [108.4, 118.3]
    LoRA 64  0.003   40.1 [39.4, 40.8]    147.0 [137.5, 163.0]
    full     0.0001  45.1 [44.8, 45.4]    95.3 [95.0, 95.6]
    full     0.0003  41.7 [40.9, 42.3]    101.8 [100.8, 102.7]

           Disagrees in so few steps: where LoRA learns as much as full fine-tuning it forgets a little more (rank 1 at
           0.001 against full at 0.0001, rank 8 at 0.001 against full at 0.0003); a higher rank and a higher rate both
           forget more. No intruder appears among the leading ten at the counted matrices, of LoRA or of full
           fine-tuning, so this setting says nothing of their dispute.
Writes:    runs/forgetting/table.csv

SmolLM2-135M learns plays (upper ten blocks, 30 steps, six seeds); what it may forget is English prose that is no play:
film reviews, by perplexity on 16 windows of 128 tokens. Biderman et al. (arXiv 2405.09673) find that LoRA learns less
and forgets less. Shuttleworth et al. (arXiv 2410.21228) lay forgetting to intruder dimensions, singular vectors of W'
that are like none of W, and scale them down; the dispute is whether a change of the same size elsewhere does the same.
So each adapter of rank 64 is measured with its intruders removed, with a change of that size in random directions, and
with the whole delta shrunk to that size. Intruders are counted and scaled at query and output of the attention in four
blocks, among the leading ten.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
from smollm2_ranks import OUT as STUDIES
from smollm2_ranks import TARGETS, study_of
from tables import at_best_rate, spread, write
from tqdm import tqdm

import lorax_kit as lk
from lorax_kit.analysis import adapter_intruders, count_intruders, scale_intruders
from lorax_kit.core.paths import flatten, unflatten
from lorax_kit.data import Plays, load_reviews
from lorax_kit.problem import Evaluator
from lorax_kit.problems import PlaysText
from lorax_kit.report import read_run
from lorax_kit.study.programs.steps import rate

OUT = Path("runs/forgetting")
SEEDS, STEPS, FULL_RATES = range(6), 30, (1e-4, 3e-4)
COUNTED = "layer_{20,23,26,29}/attention/{query,output}/kernel"


def reviews(settings: PlaysText) -> lk.Problem:
    """Film reviews as a text to continue: one long text for each of training (unused) and test."""
    texts = load_reviews().texts
    half = len(texts) // 2
    return settings.build(Plays(train=["\n".join(texts[:half])], test=["\n".join(texts[half:])]))


def full(problem: lk.Problem, peak: float) -> Iterator[dict]:
    """The same matrices trained in full for each seed, by the study's optimiser, schedule and batches."""
    params, batch = problem.params(jax.random.key(0)), next(problem.train(0, 0))
    plan = lk.resolve(lk.Spec([(p, lk.Full()) for p in TARGETS["upper-linear"]]), params, problem.apply, batch)
    adapted = lk.adapt(problem.apply, plan)

    tx = lk.partition(optax.adamw(rate(study_of("fp32"), peak), weight_decay=0.0), plan, clip=1.0)
    init, step = lk.make_step(lambda base, factors, batch: problem.loss(adapted(base, factors, batch), batch), tx)
    for seed in tqdm(SEEDS, desc=f"full, {peak:g}", disable=None):
        base, factors = lk.split(params, plan, jax.random.key(seed))
        state = init(factors)
        for batch in itertools.islice(problem.train(seed, 0), STEPS):
            state, _ = step(state, base, batch)
        yield lk.merge(base, state.factors, plan)


def as_adapter(problem: lk.Problem, base: dict, merged: dict) -> tuple:
    """Full fine-tuning's delta at the counted matrices as a LoRA of full rank: delta = a^T b with b the identity."""
    before, after = flatten(base)[0], flatten(merged)[0]
    batch = next(problem.train(0, 0))
    paths = [site.path for site in lk.resolve(lk.Spec({COUNTED: lk.LoRA(rank=1)}), base, problem.apply, batch).sites]
    rules = {path: lk.LoRA(rank=min(before[path].shape)) for path in paths}
    plan = lk.resolve(lk.Spec(rules), base, problem.apply, batch)
    factors = {}
    for path in paths:
        delta = np.asarray(after[path] - before[path], np.float64)
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        factors[path] = lk.Factors(a=jax.numpy.float32((u * s).T), b=jax.numpy.float32(vt))
    return plan, factors


def counts(base: dict, plan, factors) -> dict[str, float]:
    """Intruders a matrix: the adapter's, and the controls'."""
    found = adapter_intruders(plan, base, factors)
    return {
        f"intruders_{arm}": float(np.mean([count_intruders(getattr(site, arm)) for site in found]))
        for arm in ("adapter", "random", "spread")
    }


def main() -> None:
    settings = PlaysText(batch_size=2, length=128, held_out=16)
    plays, prose = settings.build(), reviews(settings)
    base = plays.params(jax.random.key(0))
    trained = {path for path in flatten(base)[0] if re.match(r"layer_2\d/.*/kernel", path)}
    measure = {name: Evaluator(p, base, trained, p.test) for name, p in (("plays", plays), ("prose", prose))}

    def worth(params: dict) -> dict[str, float]:
        return {name: one(params)["perplexity"] for name, one in measure.items()}

    before, found = worth(base), {}
    run = read_run(STUDIES / "fp32")
    chosen = [at_best_rate([row for row in run.trials if row["rank"] == r], "val_perplexity", min) for r in (8, 64)]
    counted = {row["trial"] for row in itertools.chain(*chosen)}
    for row in tqdm(run.trials, desc="LoRA", disable=None):
        adapter = lk.load_adapter(run.path / row["adapter"], base=base)
        merged = lk.merge(base, adapter.factors, adapter.plan)
        one = worth(merged)
        if row["trial"] in counted:
            plan, factors = as_adapter(plays, base, merged)
            one |= counts(base, plan, factors)
        if row["trial"] in counted and row["rank"] == 64:
            # All but the counted matrices are merged before, so that only those change.
            own, treedef = flatten(merged)
            own |= {site.path: flatten(base)[0][site.path] for site in plan.sites}
            for arm, params in scale_intruders(plan, unflatten(own, treedef), factors, 0.0).items():
                found.setdefault((f"LoRA 64, {arm}", row["lr"]), []).append(worth(params))
        found.setdefault((f"LoRA {row['rank']}", row["lr"]), []).append(one)
    for peak in FULL_RATES:
        found["full", peak] = [
            worth(merged) | counts(base, *as_adapter(plays, base, merged)) for merged in full(plays, peak)
        ]
    table = [{"method": "base", "plays": before["plays"], "prose": before["prose"]}]
    for (name, lr), some in found.items():
        row = {"method": name, "lr": lr}
        for key in some[0]:
            row |= spread([one[key] for one in some], key)
        table.append(row)
    write(OUT / "table.csv", table)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    main()
