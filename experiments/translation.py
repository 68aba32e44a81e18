"""Swedish to English by a decoder of 135 million parameters that knows little Swedish: before and after LoRA.

Command:   pip install --no-deps zaragoza-construction-faq==1.2.1 && pip install 'lorax_kit[text]' && \
               python experiments/translation.py
Hardware:  2 CPU cores
Time:      24 min with other work on the machine
Result:    121 test texts, intervals of 95 %

    arm               BLEU                 chrF                 exact match, %       F1 of words, %
    zero-shot          0.4 [ 0.3,  0.6]    17.2 [15.6, 18.7]     0.0 [0.0,  0.0]     11.3 [ 9.0, 13.3]
    LoRA              23.9 [19.3, 27.8]    41.4 [37.3, 45.4]    10.7 [5.8, 14.9]     51.2 [46.3, 55.6]
    chrF against zero-shot                 2.41x [2.17, 2.74]

           Mostly it learns the questions' phrases and the words of the trade: 392 pairs teach no language.
Writes:    runs/translation/{train,val,test}.jsonl, adapter/, {base,adapter}.jsonl (what was written), table.csv

571 questions and short answers about building, in Swedish and in English (zaragoza-construction-faq), of at most 20
words; a question and its answer are in one part. SmolLM2-135M is asked in its chat template, greedily, before and
after; all linear maps, rank 16. Intervals are of a paired bootstrap over the test texts: they say how much the texts
matter, not the seed.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from applied import write_rows
from tables import write

import lorax_kit as lk
from lorax_kit.assets import locate
from lorax_kit.commands import train_adapter
from lorax_kit.commands.adapters.generation import author_of
from lorax_kit.commands.adapters.written import written
from lorax_kit.problems import Translate
from lorax_kit.tasks import resampled_metrics

OUT = Path("runs/translation")
EPOCHS, BATCH, RATE, RANK = 3, 8, 2e-3, 16
VAL, TEST, MOST_WORDS = 40, 120, 20


def pairs() -> list[list[dict]]:
    """The two pairs of each entry: its question, and its answer."""
    folder = locate("zaragoza-construction-faq", "zaragoza_construction_faq/data")
    sides = [
        [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("faq-alpaca.jsonl", "faq-en-alpaca.jsonl")
    ]
    return [
        [{"source": sv[name], "target": en[name]} for name in ("instruction", "output")]
        for sv, en in zip(*sides, strict=True)
    ]


def short(found: list[list[dict]], chosen: np.ndarray) -> Iterator[dict]:
    return (pair for i in chosen for pair in found[i] if len(pair["source"].split()) <= MOST_WORDS)


def problem() -> Translate:
    found = pairs()
    order = np.random.default_rng(0).permutation(len(found))
    cuts = {"test": order[:TEST], "val": order[TEST : TEST + VAL], "train": order[TEST + VAL :]}
    files = {name: write_rows(OUT / f"{name}.jsonl", short(found, some)) for name, some in cuts.items()}
    return Translate(
        data=files["train"],
        val_data=files["val"],
        test_data=files["test"],
        prompt="Translate this Swedish text into English: {source}",
        batch_size=BATCH,
        length=96,
    )


def main() -> None:
    built = problem().build()
    if not (OUT / "adapter" / "adapter").exists():
        done = train_adapter(
            built, lk.LoRA(rank=RANK, alpha=2 * RANK), out=OUT / "adapter", lr=RATE, seed=0, epochs=EPOCHS,
            steps_per_epoch=None,
        )  # fmt: skip
        print({name: x for name, x in done.items() if name.startswith("test_")})
    found = {}
    for name, source in (("base", "smollm2"), ("adapter", OUT / "adapter")):
        found[name] = written(author_of(source), built.test)
        write_rows(OUT / f"{name}.jsonl", found[name]["rows"])
    texts = [[row["written"] for row in one["rows"]] for one in found.values()]
    drawn = resampled_metrics(texts, [row["wanted"] for row in found["base"]["rows"]])
    table = []
    for (name, one), some in zip(found.items(), drawn, strict=True):
        row = {"arm": name, "texts": len(one["rows"]), "left_out": one["left_out"]}
        for metric, value in one["metrics"].items():
            low, high = np.quantile([x[metric] for x in some], (0.025, 0.975))
            row |= {metric: value, f"{metric}_low": float(low), f"{metric}_high": float(high)}
        table.append(row)
    ratio = {"arm": "adapter / base", "chrf": table[1]["chrf"] / table[0]["chrf"]}
    low, high = np.quantile([b["chrf"] / a["chrf"] for a, b in zip(*drawn, strict=True)], (0.025, 0.975))
    write(OUT / "table.csv", [*table, ratio | {"chrf_low": float(low), "chrf_high": float(high)}])


if __name__ == "__main__":
    main()
