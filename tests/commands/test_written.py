"""What is written after the prompts of a test set, and how it is measured."""

import json

import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.cli import main
from lorax_kit.commands import evaluate_base, train_adapter
from lorax_kit.commands.adapters.generation import author_of, generate
from lorax_kit.commands.adapters.written import asked_of
from lorax_kit.problems import Language, Translate
from lorax_kit.tasks import Pairs, Told, resampled_metrics, text_metrics
from tests.problems.folders import write_model

pytestmark = pytest.mark.usefixtures("standard_promotion")
WORDS = "user assistant say red green blue house car what is it a the please yes no .".split()  # noqa: SIM905
PLAIN = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def test_what_a_row_asks_for_is_the_last_answer_and_filling_rows_ask_nothing():
    ids = np.asarray([[1, 2, 3, 4, 5, 6, 7, 0], [1, 2, 3, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
    told = np.asarray([[0, 1, 0, 0, 1, 1, 0, 0], [0] * 8, [0, 0, 0, 0, 0, 0, 1, 1]], np.int32)
    found = list(asked_of([Told(ids, np.minimum(ids, 1), told)]))
    beyond = ([1, 2, 3], [], True)  # its answer is not in the batch any more
    assert found == [([1, 2, 3, 4], [5, 6], False), beyond, ([1, 2, 3, 4, 5, 6], [7, 8], True)]
    filling = Told(ids[:1], np.eye(1, 8, dtype=np.int32), told[1:2])
    assert list(asked_of([filling])) == []
    some = np.asarray([[4, 5, 0], [4, 5, 6], [0, 0, 0]], np.int32)
    mask = np.minimum(some, 1)
    read = list(asked_of([Pairs(some, mask, some, some[[0, 0, 2]], mask[[0, 0, 2]])]))
    assert read == [([4, 5], [4, 5], False), ([4, 5, 6], [4, 5], True)]
    with pytest.raises(lk.LoraxError, match="the task 'lm' continues texts"):
        list(asked_of([Told(ids, np.full_like(ids, 2), told)]))
    with pytest.raises(lk.LoraxError, match="in the tasks 'chat' and 'translate'"):
        list(asked_of([{"ids": ids}]))


def test_equal_texts_measure_as_equal_and_resamples_are_paired():
    wanted = ["the house is red", "a blue car", "yes it is"]
    assert text_metrics(wanted, wanted) == pytest.approx({"bleu": 100, "chrf": 100, "exact_match": 1, "f1": 1})
    half = ["the house is red", "no", "no"]
    assert text_metrics(half, wanted)["exact_match"] == pytest.approx(1 / 3)
    ours, theirs = resampled_metrics([wanted, half], wanted, times=40)
    assert all(one["chrf"] >= other["chrf"] for one, other in zip(ours, theirs, strict=True))
    shares = [one["exact_match"] for one in theirs]
    assert np.mean(shares) == pytest.approx(1 / 3, abs=0.15)
    assert len(set(shares)) > 2
    with pytest.raises(lk.LoraxError, match="1 texts and 3 references"):
        text_metrics(["a"], wanted)


def test_evaluate_writes_after_each_prompt_of_the_test_set(tmp_path, capsys):
    decoder = write_model(tmp_path / "llama", WORDS, "llama", eos_token_id=3)
    rows = [{"source": f"{a} {b}", "target": f"the {a} car"} for a in WORDS for b in WORDS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data": str(tmp_path / "a.jsonl"), "model": decoder, "template": PLAIN, "length": 16, "test": 20}
    problem = Translate(**settings).build()
    train_adapter(problem, lk.LoRA(rank=2), out=tmp_path / "o", lr=1e-2, seed=0, epochs=1, steps_per_epoch=2,
                  progress=False)  # fmt: skip
    texts = tmp_path / "texts.jsonl"
    main(["evaluate", str(tmp_path / "o"), "--texts", str(texts), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {"test_loss", "test_bleu", "test_chrf", "test_exact_match", "test_f1"} <= set(found)
    assert (found["written"], found["left_out"], found["texts"]) == (20, 0, str(texts))
    written = [json.loads(line) for line in texts.read_text().splitlines()]
    one = next(row for row in written if row["prompt"] == "user red blue assistant" or row is written[-1])
    assert one["wanted"].startswith("the ")
    asked = one["prompt"].removeprefix("user ").removesuffix(" assistant")
    longest = max(len(row["wanted"].split()) for row in written)
    alone = generate(author_of(tmp_path / "o"), [asked], max_new_tokens=int(1.5 * longest) + 1)["texts"][0]
    assert one["written"] == alone["text"].strip()
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "o"), "--texts", str(texts)])
    assert "texts.jsonl' exists" in capsys.readouterr().err
    argv = ["--model", decoder, "--task", "translate", "--data", settings["data"], "--with", "length=16"]
    main(["evaluate", *argv, "--with", f"template={PLAIN}", "--texts", str(tmp_path / "base.jsonl"), "--json"])
    assert 0 <= json.loads(capsys.readouterr().out)["test_chrf"] <= 100


def test_texts_of_a_task_that_writes_nothing_are_refused_before_anything_is_measured(tmp_path):
    decoder = write_model(tmp_path / "llama", WORDS, "llama", eos_token_id=3)
    (tmp_path / "a.txt").write_text("\n\n".join(" ".join(np.roll(WORDS, i)) for i in range(17)))
    problem = Language(data=str(tmp_path / "a.txt"), model=decoder, batch_size=2, length=16).build()
    with pytest.raises(lk.LoraxError, match="the task 'lm' continues texts"):
        evaluate_base(problem, tmp_path / "t.jsonl")
    assert not (tmp_path / "t.jsonl").exists()
