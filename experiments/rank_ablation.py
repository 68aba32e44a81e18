"""Rank ablation of MiniLM on all rotten_tomatoes training reviews: 5 ranks and a probe, 6 paired seeds.

Command:   python experiments/rank_ablation.py
Hardware:  2 CPU cores
Writes:    runs/rank_ablation/ (report.html, results.csv, adapters/); go on after an interruption with the same command.
"""

from lorax_kit import Study, run
from lorax_kit.report import read_run, summary_table, write_report
from lorax_kit.workloads import Sentiment

PROBLEM = Sentiment(batch_size=16, length=48, val=1000, test=1066)
STUDY = Study(
    rank=[1, 2, 4, 8, 16],
    alpha=16,
    rslora=True,
    lr=1e-3,
    seed=range(6),
    targets={"all-linear": ["encoder/layer_*/**/kernel"]},
    probe_lr=1e-2,
    steps=404,  # one pass over the 6,464 training reviews
    warmup=20,
    eval_every=101,
)

if __name__ == "__main__":
    run(STUDY, PROBLEM.build(), out="runs/rank_ablation", command="python experiments/rank_ablation.py")
    write_report("runs/rank_ablation")
    print(summary_table(read_run("runs/rank_ablation")))
