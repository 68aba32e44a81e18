"""Sentiment in five languages: an adapter for each, one for all, and what an adapter is worth in another language.

Command:   pip download --no-deps --no-binary :all: bigbench==1.0.0 -d runs/data && python experiments/multilingual.py
Hardware:  2 CPU cores
Time:      35 minutes beside other work
Result:    own language: en 69.6 %, es 57.9, fr 56.0, de 55.4, nl 53.6. The English adapter elsewhere: 26.3 to 31.9 %,
           25 to 29 points below (intervals from 20 to 31); the others lose 7 to 27 in another language. One adapter of
           all, on as many sentences: 8 to 11 points below each language's own (3 to 17), -1 to +5 of its head alone
Writes:    runs/multilingual/{en,de,es,fr,nl,all}/{*.jsonl,study/}, table.csv

Sentences of reviews that are negative, neutral, positive or ambivalent (MultiEmo, Kocoń et al., 2021, as BIG-bench has
it; all but the Polish are translations). MiniLM has read English alone. Of each language 2,000 sentences to learn from
and 1,000 of other reviews for the test, the same sentences in each; the adapter of all languages learns from 400 of
each, so from as many. Linear maps of the upper three layers, rank 8, 120 steps of 32 sentences, three seeds.
"""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from applied import best_class, examples, write_rows
from tables import against, at_best_rate, spread, write

import lorax_kit as lk
from lorax_kit.problem import Evaluator
from lorax_kit.problems import Classify

OUT = Path("runs/multilingual")
LANGUAGES = ("en", "de", "es", "fr", "nl")
PARTS = {"train": 2000, "val": 300, "test": 1000}
BLOCK, SENTENCES = 100, 57400
STUDY = lk.Study(
    rank=8,
    lr=3e-3,
    seed=range(3),
    targets={"upper-linear": ["encoder/layer_{3..5}/**/kernel"]},
    steps=120,
    warmup=12,
)


def files_of(found: dict[str, list[dict]]) -> dict[str, dict[str, str]]:
    """Language, or "all" -> part -> file."""
    sets = {language: (language,) for language in LANGUAGES} | {"all": LANGUAGES}
    out: dict[str, dict[str, str]] = {}
    # Whole stretches of the corpus, which is in the order of its reviews: no review is in two parts.
    blocks = np.random.default_rng(0).permutation(SENTENCES // BLOCK)
    places = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
    places = np.array([i for i in places if all(found[language][i]["text"].strip() for language in LANGUAGES)])
    for name, languages in sets.items():
        out[name], start = {}, 0
        for part, count in PARTS.items():
            some = places[start : start + count // len(languages)]
            rows = [found[language][i] for language in languages for i in some]
            out[name][part] = write_rows(OUT / name / f"{part}.jsonl", rows)
            start += count
    return out


def problem_of(files: dict[str, str]) -> lk.Problem:
    return Classify(
        data=files["train"], val_data=files["val"], test_data=files["test"], batch_size=32, length=48
    ).build()


def main() -> None:
    tasks = {language: f"multiemo/all_sentence_{language}" for language in LANGUAGES}
    found = {
        language: [{"text": one["input"], "label": best_class(one["target_scores"])} for one in rows]
        for language, rows in zip(tasks, examples(*tasks.values()).values(), strict=True)
    }
    problems = {name: problem_of(files) for name, files in files_of(found).items()}
    accuracies: dict[str, dict[str, list[float]]] = {}
    evaluators: dict[str, Evaluator] = {}
    for name, problem in problems.items():
        design = replace(STUDY, probe_lr=1e-2) if name == "all" else STUDY
        study = lk.run(design, problem, out=OUT / name / "study", command="python experiments/multilingual.py")
        base = problem.params(jax.random.key(0))
        arms = {"adapter": at_best_rate(row for row in study.rows if row["rank"] != 0)}
        if name == "all":
            arms["head alone"] = at_best_rate(row for row in study.rows if row["rank"] == 0)
        for arm, rows in arms.items():
            measured = accuracies[name if arm == "adapter" else "head alone, all"] = {}
            for row in rows:
                adapter = lk.load_adapter(study.path / row["adapter"], base=base)
                params = lk.merge(base, adapter.factors, adapter.plan)
                for language in LANGUAGES:
                    if language not in evaluators:  # all adapters have the same sites
                        like = next(iter(evaluators.values()), None)
                        test = problems[language].test
                        evaluators[language] = Evaluator(problem, params, adapter.plan.trained, test, like)
                    measured.setdefault(language, []).append(evaluators[language](params)["accuracy"])
    table = []
    for name, by_language in accuracies.items():
        table += [{"learnt": name, "test": language, **spread(values)} for language, values in by_language.items()]
    for language in LANGUAGES:
        own = accuracies[language][language]
        for other in ("en", "all"):
            if other != language:
                gap = against(accuracies[other][language], own)
                table.append({"learnt": f"{other} less own", "test": language, **gap})
    write(OUT / "table.csv", table)


if __name__ == "__main__":
    main()
