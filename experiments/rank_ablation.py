"""Rank ablation of MiniLM on all rotten_tomatoes training reviews: 5 ranks and a probe, 6 paired seeds.

Command:   python experiments/rank_ablation.py
Hardware:  2 CPU cores, 70 minutes alone (124 measured beside other work); 6 compilations, one per length of text
Result:    best rank (4) 0.825 [0.821, 0.828] test accuracy, frozen probe 0.745 [0.745, 0.746];
           chosen by validation: rank 2, 0.819 [0.812, 0.825]
Writes:    runs/rank_ablation/ (report.html, results.csv, adapters/); after an interruption the same command goes on.
"""

from lorax_kit import Study, run
from lorax_kit.problems import Sentiment
from lorax_kit.report import read_run, summary_table, write_report

PROBLEM = Sentiment(batch_size=32, length=None, buckets=(16, 24, 32, 40, 48, 64), val=500, test=1066)
STUDY = Study(
    rank=[1, 2, 4, 8, 16],
    alpha=16,
    rslora=True,
    lr=1.5e-3,
    seed=range(6),
    targets={"upper-linear": ["encoder/layer_{2,3,4,5}/**/kernel"]},
    probe_lr=1e-2,
    steps=500,  # 2.3 passes over the 6,964 training reviews
    warmup=25,
    eval_every=125,
)
OUT = "runs/rank_ablation"

if __name__ == "__main__":
    # 6 GiB: three groups of twelve trials, so an interruption loses a third at most.
    run(STUDY, PROBLEM.build(), out=OUT, command="python experiments/rank_ablation.py", memory_bytes=6 * 2**30)
    write_report(OUT)
    print(summary_table(read_run(OUT)))
