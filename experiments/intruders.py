"""Do intruder dimensions make an adapter forget, or is it the size of its update?

Command:   pip install --no-deps zaragoza-construction-faq==1.2.1 && python experiments/intruders.py
Hardware:  2 CPU cores
Time:      40 min with other work on the machine
Result:    what is learnt (accuracy on film reviews, %) and what is left of the base's own task (answers found, mean
           reciprocal rank in %; the base: 67.1), six seeds, intervals of 95 %. Rank 1 at a rate of 0.003:

    arm                 reviews              answers
    the adapter         77.4 [76.6, 78.4]    49.2 [46.4, 51.9]
    intruders halved    76.6 [74.1, 77.4]    61.6 [59.6, 63.6]
    random, as large    77.0 [76.0, 78.3]    48.9 [46.9, 51.0]
    shrunk, as large    77.5 [76.3, 78.6]    60.2 [58.7, 62.3]
    intruders removed   67.1 [53.3, 75.0]    62.0 [58.2, 65.2]
    random, as large    76.2 [75.3, 77.9]    47.6 [45.9, 49.2]
    shrunk, as large    77.6 [76.0, 79.0]    59.6 [57.5, 61.5]

           intruders a matrix, of ten       adapter   random directions   spread
           rank 1, rates 0.001, 0.003       0.04, 0.60   0.03, 0.67       0, 0
           rank 4, rates 0.001, 0.003       0, 0.06      0, 0.09          0, 0

           Both sides are right. Halving the intruders brings back two thirds of what was forgotten, as published, and a
           random change of that size nothing: 12.7 points [9.7, 14.2] less. But shrinking the whole update to that size
           brings back nearly as much (1.3 points [0.2, 2.4] less) and keeps more of what was learnt (1.0 point
           [0.4, 1.7] more): most of the gain comes of a smaller update, a little of the intruders. An adapter has no
           more intruders than a delta of its singular values in random directions. In the other three
           conditions, where there are few, what is left of the answers differs by less than its interval.
Writes:    runs/intruders/{study/,table.csv,arms.csv}

MiniLM (all six layers, all linear) learns film reviews in 100 steps. What it was made for and may forget is to find the
answer to a question by the nearest embedding: 503 questions and answers, by mean reciprocal rank. Shuttleworth et al.
(arXiv 2410.21228) scale intruders down and see less forgetting at little cost to what was learnt; a change of the size
of the update does that too, so `scale_intruders` sets two controls of the same size beside it. Singular values of
intruders are multiplied by 0.5 and by 0. Both numbers are of held-out data and higher is better; differences are paired
by seed.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from lorax_kit.workloads import Sentiment
from tables import against, spread, write
from tqdm import tqdm

import lorax_kit as lk
from lorax_kit.analysis import adapter_intruders, count_intruders, scale_intruders
from lorax_kit.assets import locate
from lorax_kit.models import Tokenizer, load_bert
from lorax_kit.models.encoders.bert import BertEncoder
from lorax_kit.problem import Evaluator
from lorax_kit.report import read_run

OUT = Path("runs/intruders")
STUDY = lk.Study(
    rank=(1, 4),
    lr=(1e-3, 3e-3),
    seed=range(6),
    targets={"all": ["encoder/layer_*/**/kernel"]},
    steps=100,
    warmup=10,
)
SCALES, BATCH = (0.5, 0.0), 128


def answers() -> Callable[[dict], float]:
    """Mean reciprocal rank of the right answer among all, by cosine of mean-pooled embeddings."""
    pretrained = load_bert("minilm")
    tokenizer, encoder = Tokenizer.from_file(pretrained.tokenizer_file), BertEncoder(pretrained.config)
    file = locate("zaragoza-construction-faq", "zaragoza_construction_faq/data/faq-en.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def padded(name: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.zeros((len(rows), length), np.int32)
        for row, some in zip(ids, tokenizer.encode([row[name] for row in rows], length), strict=True):
            row[: len(some)] = some
        return ids, (ids != 0).astype(np.int32)  # 0 is the id of padding

    @jax.jit
    def embed(params: dict, ids: jax.Array, mask: jax.Array) -> jax.Array:
        hidden = encoder.apply({"params": params}, ids, mask) * mask[..., None]
        mean = hidden.sum(axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    questions, texts = padded("q", 32), padded("a", 128)

    def measure(params: dict) -> float:
        def of(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            parts = range(0, len(rows), BATCH)
            return np.concatenate([embed(params["encoder"], ids[i : i + BATCH], mask[i : i + BATCH]) for i in parts])

        cosines = of(*questions) @ of(*texts).T
        above = np.sum(cosines > np.diag(cosines)[:, None], axis=1)
        return float(np.mean(1 / (1 + above)))

    return measure


def main() -> None:
    problem = Sentiment(length=32, val=256).build()
    lk.run(STUDY, problem, out=OUT / "study", command="python experiments/intruders.py")
    retrieved, reviews = answers(), None
    base = problem.params(jax.random.key(0))
    print("base", retrieved(base))

    counts: dict[tuple, list[dict]] = {}
    worth: dict[tuple, list[dict]] = {}
    for row in tqdm(read_run(OUT / "study").trials, desc="adapters", disable=None):
        start = problem.params(jax.random.fold_in(jax.random.key(row["seed"]), 0))
        adapter = lk.load_adapter(OUT / "study" / row["adapter"], base=start)
        plan, factors = adapter.plan, adapter.factors
        condition = row["rank"], row["lr"]
        merged = lk.merge(start, factors, plan)
        reviews = reviews or Evaluator(problem, merged, plan.trained, problem.test)

        found = adapter_intruders(plan, start, factors)
        by_arm = {
            arm: float(np.mean([count_intruders(getattr(site, arm)) for site in found]))
            for arm in ("adapter", "random", "spread")
        }
        counts.setdefault(condition, []).append(by_arm)
        for scale in SCALES:
            for arm, params in scale_intruders(plan, start, factors, scale).items():
                if arm == "adapter" and scale != SCALES[0]:
                    continue
                one = {"reviews": 100 * reviews(params)["accuracy"], "answers": 100 * retrieved(params)}
                worth.setdefault((*condition, None if arm == "adapter" else scale, arm), []).append(one)

    write(
        OUT / "table.csv",
        [
            {"rank": rank, "lr": lr, **{arm: float(np.mean([one[arm] for one in some])) for arm in some[0]}}
            for (rank, lr), some in counts.items()
        ],
    )
    arms = []
    for (rank, lr, scale, arm), some in worth.items():
        row = {"rank": rank, "lr": lr, "scale": scale, "arm": arm}
        for name in ("reviews", "answers"):
            row |= spread([one[name] for one in some], name)
        if arm in ("random", "shrunk"):
            aimed = worth[rank, lr, scale, "intruders"]
            for name in ("reviews", "answers"):
                gain = against([one[name] for one in aimed], [one[name] for one in some])
                row |= {f"intruders_less_this_{name}{key[10:]}": value for key, value in gain.items()}
        arms.append(row)
    write(OUT / "arms.csv", arms)


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    main()
