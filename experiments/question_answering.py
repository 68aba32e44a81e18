"""Answers that stand in a passage: a span head on MiniLM alone, and with an adapter below it.

Command:   pip download --no-deps --no-binary :all: bigbench==1.0.0 -d runs/data && \
               python experiments/question_answering.py
Hardware:  2 CPU cores
Time:      27 minutes, beside other work
Result:    the head alone finds 12.0 % of the answers exactly (11.3 to 13.0), F1 21.2 %; with the adapter 18.4 % (15.8
           to 19.4) and 28.2 %. Gain, paired by seed: 6.4 points (5.7 to 7.5), F1 7.0 points (4.3 to 12.6)
Writes:    runs/question_answering/{rows.jsonl,study/,table.csv}

1,779 questions of Quoref (Dasigi et al., arXiv 1908.05803, as BIG-bench has it) whose answers stand in a passage of at
most 280 words letter by letter; those of one passage are all in one part. MiniLM was trained to compare sentences, not
to point at words. All linear maps, rank 8, 120 steps of 4 windows of 384 tokens, three seeds.
"""

from pathlib import Path

from applied import before_and_after, examples, write_rows

import lorax_kit as lk
from lorax_kit.problems import Answer

TASK = "natural_instructions/subtask002_quoref_answer_generation"
MOST_WORDS = 280
OUT = Path("runs/question_answering")
STUDY = lk.Study(
    rank=8,
    lr=3e-3,
    seed=range(3),
    targets={"all-linear": ["encoder/layer_*/**/kernel"]},
    steps=120,
    warmup=12,
    probe_lr=1e-2,
)


def rows() -> list[dict]:
    """The questions whose answer stands in their passage."""
    found = []
    for one in examples(TASK)[TASK]:
        passage, question = one["input"].removeprefix("Passage: ").rsplit("Question:", 1)
        answer = one["target"][0].strip().removesuffix(".")
        if answer and answer in passage and len(passage.split()) <= MOST_WORDS:
            found.append({"context": passage.strip(), "question": question.strip(), "answer": answer})
    return found


def main() -> None:
    problem = Answer(data=write_rows(OUT / "rows.jsonl", rows()), batch_size=4, length=384, val=200, test=500).build()
    print({name: problem.facts[name] for name in ("rows", "train", "val", "test", "left_out")})
    before_and_after(STUDY, problem, OUT)


if __name__ == "__main__":
    main()
