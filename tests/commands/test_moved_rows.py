"""Rows that have moved: which option finds them; and what `compress --out` left is measured by `evaluate`."""

import csv
import json
import shutil

import pytest

import lorax_kit as lk
from lorax_kit.cli import main
from lorax_kit.commands import train_adapter
from lorax_kit.problems import Chat, Classify
from tests.problems.folders import write_model

pytestmark = pytest.mark.usefixtures("standard_promotion")

COLOURS, THINGS = ["blue", "green", "red"], ["house", "car", "tree", "lamp", "bird", "boat"]
ROWS = [(f"the {a} {b} and {c}", a) for a in COLOURS for b in THINGS for c in THINGS]
WORDS = [*COLOURS, *THINGS, "the", "and", "user", "assistant", ":"]


def call(capsys, *argv):
    main([*map(str, argv), "--json"])
    out = capsys.readouterr().out
    return json.loads(out[out.index("{\n") :])


def said(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    assert e.value.code == 2
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("lorax-kit: "))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A trained adapter, and the file of its rows."""
    root = tmp_path_factory.mktemp("classifier")
    with open(root / "a.csv", "w", newline="") as out:
        csv.writer(out).writerows([["text", "label"], *ROWS])
    model = write_model(root / "m", WORDS)
    problem = Classify(data=str(root / "a.csv"), model=model, batch_size=8, length=8)
    options = {"lr": 1e-2, "seed": 0, "epochs": 1, "steps_per_epoch": 3, "progress": False}
    train_adapter(problem, lk.LoRA(rank=2), out=root / "o", **options)
    return root / "o", root / "a.csv"


def test_what_compress_left_is_measured_by_evaluate(classifier, tmp_path, capsys):
    adapter, data = classifier
    row = call(capsys, "compress", adapter, "--method", "svd", "--keep", 0.5, "--rounds", 0, "--out", tmp_path / "s")
    found = call(capsys, "evaluate", tmp_path / "s")
    assert found["test_accuracy"] == pytest.approx(row["metric_after"], abs=1e-7)
    assert found["examples"] == 11
    argv = ("compress", "--model", adapter.parent / "m", "--task", "classify", "--data", data, "--length", 8)
    row = call(capsys, *argv, "--method", "int8", "--rounds", 0, "--out", tmp_path / "m")
    assert call(capsys, "evaluate", tmp_path / "m")["test_accuracy"] == pytest.approx(row["metric_after"], abs=1e-7)
    assert "--texts goes with an adapter, or --model" in said(capsys, "evaluate", tmp_path / "s", "--texts", "x")
    kept = json.loads((tmp_path / "m" / "row.json").read_text())
    del kept["lorax_crc32"]
    kept["of"] = {"model": None, "settings": {"address": "tests.tiny:built"}}  # what a file names is not run
    (tmp_path / "m" / "row.json").write_text(json.dumps(kept))
    assert "does not say of which problem it is. | give its address: --problem" in said(
        capsys, "evaluate", tmp_path / "m"
    )


def test_every_command_finds_rows_that_have_moved(classifier, tmp_path, capsys):
    adapter, data = classifier
    call(capsys, "compress", adapter, "--method", "svd", "--rounds", 0, "--out", tmp_path / "s")
    before, moved = call(capsys, "evaluate", adapter), tmp_path / "b.csv"
    shutil.move(data, moved)
    try:
        ways = (
            ["evaluate", adapter],
            ["evaluate", tmp_path / "s"],
            ["compress", adapter, "--method", "svd", "--rounds", 0],
            ["export", adapter, "--format", "safetensors", "--rounds", 0, "--out", tmp_path / "x"],
        )
        for argv in ways:
            message = said(capsys, *argv)
            assert message.endswith("remembers. | put it there, or say where it lies now: --data NEW")
            assert f"there is no file {str(data)!r}" in message
            if argv[0] == "export":  # the rows are found, and then the test's own tokenizer is refused
                assert "is a WordLevel tokenizer" in said(capsys, *argv, "--data", moved)
                continue
            found = call(capsys, *argv, "--data", moved)
            if argv[1] == adapter and argv[0] == "evaluate":
                assert found == before
    finally:
        shutil.move(moved, data)


def test_a_model_that_writes_is_exported_without_its_rows_on_texts(tmp_path, capsys):
    rows = [{"prompt": text, "response": label} for text, label in ROWS[:40]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.txt").write_text("the red car and tree\nthe blue boat and car\n")
    model = write_model(tmp_path / "m", WORDS, "llama")
    chat = Chat(data=str(tmp_path / "a.jsonl"), model=model, template="plain", batch_size=4)
    options = {"lr": 1e-2, "seed": 0, "epochs": 1, "steps_per_epoch": 1, "progress": False}
    train_adapter(chat, lk.LoRA(rank=2), out=tmp_path / "o", **options)
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    argv = ["export", tmp_path / "o", "--format", "stablehlo", "--rounds", 0, "--out", tmp_path / "x"]
    message = said(capsys, *argv)
    assert message.endswith("say where it lies now: --data NEW, or other texts to measure on: --texts FILE")
    assert call(capsys, *argv, "--texts", tmp_path / "t.txt")["prompts"] == 2
    assert call(capsys, *argv, "--data", tmp_path / "b.jsonl", "--overwrite")["prompts"] == 4
