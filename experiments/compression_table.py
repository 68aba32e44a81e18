"""How much quality a smaller model keeps: every method on MiniLM's sentiment and on SmolLM2's plays.

    python experiments/compression_table.py minilm      # five classifiers, half of their linear parameters
    python experiments/compression_table.py smollm2     # needs `make llama`; 20 % and 40 % removed

Writes runs/compression/{minilm,smollm2}: report.html, results.csv, rows.jsonl; a second call goes on where the first
stopped. Hardware: 2 CPU cores; smollm2 about an hour.

Result so far: smollm2 with 20 % removed, perplexity of 32 windows of held-out plays (the original: 31.8): svd 41,486,
asvd 35,030, fisher 127, whitened 40.9, healed by 150 steps of distillation alone 37.2. With an equal share of every
matrix kept, svd, asvd and fisher leave 1.7e7, 1.6e6 and 6,220, whitened 57.7 (16 windows): ASVD is behind FWSVD here,
unlike on LLaMA-7B.
"""

import argparse
from pathlib import Path

import numpy as np

import lorax_kit as lk
from lorax_kit.report.compression import comparison_table, write_comparison
from lorax_kit.study.statistics import interval
from lorax_kit.workloads import Sentiment, sentiment_subject, text_subject
from lorax_kit.workloads.comparison import METHODS, compare

OUT = Path("runs/compression")
SEEDS = range(5)
HEALING = {"steps": 300, "rank": None, "lr": 2e-4}


def minilm() -> None:
    """Five classifiers of one study: each compressed by half and healed; the first by every method."""
    study = lk.Study(
        rank=[8],
        alpha=16,
        lr=[1e-3],
        seed=SEEDS,
        targets={"all": ["encoder/layer_*/**/kernel"]},
        steps=400,
        probe_lr=(),
    )
    found = lk.run(study, Sentiment(length=None).build(), out=OUT / "classifiers")
    losses, options = [], {"methods": ("whitened",), "keeps": (0.5,), "rounds": 0, **HEALING}
    for trial in found.rows:
        subject = sentiment_subject(OUT / "classifiers" / trial["adapter"], length=48)
        (row,) = compare(subject, OUT / "minilm" / f"seed {trial['seed']}", seeds=(trial["seed"],), **options)
        losses.append(row["metric_healed"] - row["metric_before"])
        before, after, healed = (row[f"metric_{when}"] for when in ("before", "after", "healed"))
        print(f"seed {trial['seed']}: {before:.3f} -> {after:.3f} -> {healed:.3f}")
    low = interval(100 * np.array(losses))
    print(f"healed minus original: {low.mean:+.2f} points [{low.low:+.2f}, {low.high:+.2f}]")
    subject = sentiment_subject(OUT / "classifiers" / found.rows[0]["adapter"], length=48)
    compare(subject, OUT / "minilm", methods=METHODS, keeps=(0.5, 0.3), **HEALING)
    show("minilm")


def smollm2() -> None:
    """SmolLM2-135M with 20 % and 40 % of its linear parameters removed; perplexity of plays that were held out."""
    subject = text_subject("smollm2")
    methods = ("svd", "fisher", "asvd", "whitened", "whitened+residual-nf4", "wanda", "nf4")
    options = {"heal": ("whitened",), "batches": 64, "steps": 150, "rounds": 3}
    compare(subject, OUT / "smollm2", methods=methods, keeps=(0.8, 0.6), **options)
    show("smollm2")


def show(name: str) -> None:
    print(comparison_table(OUT / name))
    print(f"report: {write_comparison(OUT / name)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["minilm", "smollm2"])
    {"minilm": minilm, "smollm2": smollm2}[parser.parse_args().model]()
