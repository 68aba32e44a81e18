"""Compression of decoders and encoder-decoders on a user's own file, from the command line: every kind of method."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lorax_kit.cli import main
from lorax_kit.commands import Recipe, compress_subject, subject_of
from lorax_kit.commands.compress.methods import statistics_for
from lorax_kit.commands.compress.recipe import Method
from lorax_kit.compress import CompressError
from lorax_kit.core.paths import flatten
from tests.problems.folders import tokenizer

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore:.*saw fewer inputs than they have dimensions"),
]

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
TEXT = "user assistant : say red green blue house car what is it a the please ."
WORDS = TEXT.split()  # as many as the folders have room for
PLAIN = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
METHODS = ("whitened", "wanda", "nf4", "student")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "a.jsonl"
    columns = {"text": 6, "prompt": 3, "response": 2, "source": 4, "target": 3}
    rows = [{name: " ".join(rng.choice(WORDS[3:], n)) for name, n in columns.items()} for _ in range(50)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def model(folder, family):
    shutil.copytree(FAMILIES / family, folder)
    (folder / "recorded.safetensors").unlink()
    tokenizer(WORDS, family in ("t5", "t5_gated", "marian")).save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.mark.parametrize(
    ("family", "task"), [("gpt2", "lm"), ("llama", "chat"), ("t5", "translate"), ("marian", "translate")]
)
def test_every_kind_of_method_compresses_and_heals(tmp_path, data, capsys, family, task):
    command = ["compress", "--compare", "--model", model(tmp_path / "m", family), "--task", task, "--data", data]
    chat = ["--with", f"template={PLAIN}"] if task == "chat" else []
    size = ["--length", "16", "--batch-size", "4", "--batches", "2", "--rounds", "0", "--heal", "2", "--rank", "0"]
    methods = [x for method in METHODS for x in ("--method", method)]
    main([*command, *chat, *size, *methods, "--keep", "0.5", "--out", str(tmp_path / "o"), "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == [*METHODS, "original_tuned"]
    for row in rows:
        assert np.isfinite([row["metric_before"], row["metric_after"]]).all()
        assert (row["metric_healed"] is None) == (row["method"] == "nf4")
        assert row["method"] == "original_tuned" or row["bytes_ratio"] < 0.7
        assert 0 <= row["agreement_after"] <= 1
    assert "original_tuned" in (tmp_path / "o" / "results.csv").read_text()


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_each_side_of_an_encoder_decoder_is_calibrated_on_its_own_tokens(tmp_path, data, family):
    settings = {"task": "translate", "data": data, "model": model(tmp_path / "m", family), "batch_size": 4}
    subject = subject_of(None, settings=settings | {"length": 16})
    found = statistics_for(subject, [Method.parse("whitened")], 2, progress=False)
    batches = list(itertools.islice(subject.train(0), 2))
    read, written = sum(batch.mask.sum() for batch in batches), sum(batch.weight.sum() for batch in batches)
    assert read != written
    assert min(batch.mask.min() for batch in batches) == 0
    for path, hints in found.items():
        source = path.startswith("encoder/") or "cross/key" in path or "cross/value" in path
        assert hints.tokens == (read if source else written), path


def test_a_student_of_an_encoder_decoder_keeps_layers_of_both(tmp_path, data):
    settings = {"task": "translate", "data": data, "model": model(tmp_path / "m", "t5"), "batch_size": 4}
    subject = subject_of(None, settings=settings)
    whole = {path.split("/layer_")[0] for path in flatten(subject.params)[0] if "/layer_1/" in path}
    assert "decoder" in whole
    apply, params = subject.student(2)
    assert not any("/layer_1/" in path for path in flatten(params)[0])
    assert np.isfinite(subject.quality(apply, params).loss)
    with pytest.raises(CompressError, match="2:4 needs a multiple of 4"):
        compress_subject(subject, Recipe(method="magnitude-2:4"), rounds=0, progress=False)
