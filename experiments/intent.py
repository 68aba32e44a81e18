"""Intent of what people ask of an assistant, seven classes, 93 examples to learn from.

Command:   pip download --no-deps --no-binary :all: bigbench==1.0.0 -d runs/data && python experiments/intent.py
Hardware:  2 CPU cores
Time:      6 min with other work on the machine
Result:    test, six seeds, intervals of 95 %

    arm                 rate     accuracy, %          macro F1, %
    head alone          0.01     90.3 [89.9, 90.6]    90.4 [90.0, 90.7]
    adapter and head    0.003    92.5 [91.4, 93.4]    92.5 [91.4, 93.6]
    gain                         +2.2 [1.0, 3.3]      +2.2 [0.8, 3.3]
Writes:    runs/intent/{rows.jsonl,study/,table.csv}

693 utterances of BIG-bench's intent_recognition, of which 100 are for validation and 500 for the test. MiniLM, all
linear maps, rank 8, 100 steps of 16 utterances, six seeds.
"""

from pathlib import Path

from applied import before_and_after, best_class, examples, write_rows

import lorax_kit as lk
from lorax_kit.problems import Classify

OUT = Path("runs/intent")
STUDY = lk.Study(
    rank=8,
    lr=(1e-3, 3e-3),
    seed=range(6),
    targets={"all-linear": ["encoder/layer_*/**/kernel"]},
    steps=100,
    warmup=10,
    probe_lr=1e-2,
)


def main() -> None:
    found = examples("intent_recognition")["intent_recognition"]
    rows = [
        {"text": one["input"].removeprefix("Utterance: "), "label": best_class(one["target_scores"])} for one in found
    ]
    problem = Classify(data=write_rows(OUT / "rows.jsonl", rows), val=100, test=500).build()
    before_and_after(STUDY, problem, OUT)


if __name__ == "__main__":
    main()
