"""Which rank does a language model need for plays? SmolLM2-135M by perplexity, on a base in fp32 and in NF4.

Command:   python experiments/smollm2_ranks.py [fp32|nf4]     (both; a second call goes on where the first stopped)
Hardware:  2 CPU cores
Time:      about 14 min for each base
Result:    perplexity of held-out plays, six seeds, intervals of 95 %; differences to rank 8 are paired by seed

    base  rank  trained    lr     perplexity           against rank 8
    fp32  1     101,760    0.003  41.6 [41.0, 42.2]    +1.6 [+1.2, +1.9]
    fp32  8     814,080    0.003  40.0 [39.5, 40.5]
    fp32  64    6,512,640  0.003  40.1 [39.4, 40.8]    +0.1 [-0.7, +0.7]
    NF4   1     101,760    0.003  43.5 [42.8, 44.3]    +1.7 [+1.3, +2.0]
    NF4   8     814,080    0.003  41.9 [41.2, 42.4]
    NF4   64    6,512,640  0.003  41.9 [41.0, 42.7]    +0.0 [-0.6, +0.5]

           Rank 8 is enough in so few steps, and rank 1 is not. An NF4 base costs 1.8 to 2.0 of perplexity at every rank
           and leaves the order of ranks as it is. (The better rate is the highest tried.)
Writes:    runs/smollm2_ranks/{fp32,nf4}/ (a study each: report.html, adapters/), runs/smollm2_ranks/table.csv

All linear layers of the upper ten of thirty blocks, 30 steps of two windows of 128 tokens, six seeds, two rates. The
rate is chosen by mean validation perplexity (16 windows of the training plays); the table has that of 16 windows of
held-out plays.
"""

import sys
from pathlib import Path

from tables import against, at_best_rate, spread, write

import lorax_kit as lk
from lorax_kit.problems import PlaysText

OUT = Path("runs/smollm2_ranks")
TARGETS = {"upper-linear": ["layer_{20..29}/**/kernel"]}
RANKS = (1, 8, 64)


def study_of(base: str) -> lk.Study:
    """All ranks and rates on one kind of base."""
    return lk.Study(
        rank=RANKS,
        alpha=16,
        rslora=True,
        lr=(1e-3, 3e-3),
        seed=range(6),
        targets=TARGETS,
        quantise=None if base == "fp32" else base,
        steps=30,
        warmup=5,
        stream="seed",
    )


def main(bases: list[str]) -> None:
    problem = PlaysText(batch_size=2, length=128, held_out=16).build()
    table = []
    for base in bases:
        results = lk.run(study_of(base), problem, out=OUT / base, command=f"python experiments/smollm2_ranks.py {base}")
        runs = {r: at_best_rate([x for x in results.rows if x["rank"] == r], "val_perplexity", min) for r in RANKS}
        tests = {rank: [row["test_perplexity"] for row in rows] for rank, rows in runs.items()}
        for rank, rows in runs.items():
            row = {"base": base, "rank": rank, "lr": rows[0]["lr"], "params": rows[0]["params"]} | spread(tests[rank])
            table.append(row | (against(tests[rank], tests[8]) if rank != 8 else {}))
    write(OUT / "table.csv", table)


if __name__ == "__main__":
    main(sys.argv[1:] or ["fp32", "nf4"])
