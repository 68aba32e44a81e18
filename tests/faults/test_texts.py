"""Texts and tensors that no writer of ours makes, in the place of each file: an error in words, from every reader."""

import json
import shutil
import struct

import pytest

import lorax_kit as lk
from lorax_kit.checkpoint.adapter import read_document
from lorax_kit.commands.export.table import export_rows
from lorax_kit.data.table import read_rows
from lorax_kit.models import load_model
from lorax_kit.serve import load_tensors
from lorax_kit.transform import Costs
from tests.faults import made

DEEP, LONG = b"[" * 100_000 + b"]" * 100_000, b"9" * 5000
TEXTS = {
    "empty": b"",
    "not UTF-8": b'{"a": "\xff"}',
    "deep": b'{"a": %s}' % DEEP,
    "long number": b'{"a": %s}' % LONG,
    "key twice": b'{"trial": 1, "trial": 2}',
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "half": b'{"trial": "a", ',
    "others": b'{"rules": 3, "trial": {"a": []}, "measured": [], "method": 1, "identity": {"steps": []}}',
}
PLACES = {
    "spec": (None, made.READ["spec"]),
    "run": ("study.json", made.READ["run"]),
    "run ": ("trials.jsonl", made.READ["run"]),
    "run  ": ("curves.jsonl", made.READ["run"]),
    "comparison": ("comparison.json", made.READ["comparison"]),
    "comparison ": ("rows.jsonl", made.READ["comparison"]),
    "small": ("row.json", made.READ["small"]),
    "adapter": ("digests.json", made.READ["adapter"]),
    "adapter ": ("spec/metadata", read_document),
    "peft": ("adapter_config.json", made.READ["peft"]),
    "tensors": (None, made.READ["tensors"]),
    "program": (None, made.READ["program"]),
    "training.npz": (None, made.READ["training.npz"]),
}


@pytest.mark.parametrize("name", PLACES, ids=str.strip)
@pytest.mark.parametrize("text", TEXTS)
def test_odd_texts_are_refused_in_words(things, tmp_path, name, text, injected):
    inner, read = PLACES[name]
    source = things[name.strip()]
    path = tmp_path / source.name
    (tmp_path / "trained").symlink_to(things["trained"])
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, path)
    (path / inner if inner else path).write_bytes(TEXTS[text] + b"\n")
    injected("odd text")
    try:
        read(path)
    except ValueError as e:  # what the command line prints in a line
        assert 0 < len(str(e)) < 1000
        assert len(str(e).splitlines()) <= 4
        assert type(e).__module__.startswith("lorax_kit")
    else:  # a line of blanks, or an empty file of lines, holds no rows
        assert (name in ("run", "comparison") and text == "others") or (name.startswith("run ") and text == "empty")


@pytest.mark.parametrize("text", TEXTS)
def test_odd_texts_of_users_are_refused_in_words(tmp_path, text, injected):
    file, folder = tmp_path / "rows.jsonl", tmp_path / "x"
    folder.mkdir()
    file.write_bytes(TEXTS[text] + b"\n")
    (folder / "export.json").write_bytes(TEXTS[text])
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_bytes(TEXTS[text])
    (folder / "config.json").write_bytes(TEXTS[text])
    for read in (
        lambda: list(read_rows(file, {"text": "text"})),
        lambda: export_rows([folder]),
        lambda: load_model(str(folder)),
        lambda: Costs.read(file),
    ):
        injected("odd text")
        with pytest.raises(ValueError) as e:
            read()
        assert 0 < len(str(e.value)) < 1000
        assert len(str(e.value).splitlines()) <= 4


def tensors(dtype, size, **metadata):
    header = {"__metadata__": metadata, "w": {"dtype": dtype, "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


ODD_TENSORS = {
    "float8": tensors("F8_E4M3", 4),
    "float8, other": tensors("F8_E5M2", 4),
    "unknown dtype": tensors("F7", 4),
    "compact of another kind": tensors("U8", 4, **{"lorax_kit.compact": "[1]"}),
    "compact that is deep": tensors("U8", 4, **{"lorax_kit.compact": DEEP.decode()}),
    "compact of long numbers": tensors("U8", 4, **{"lorax_kit.compact": f'{{"w": {LONG.decode()}}}'}),
    "header longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "header that is deep": struct.pack("<Q", len(DEEP)) + DEEP,
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_odd_tensors_are_refused_in_words(things, tmp_path, kind, injected):
    shutil.copytree(things["peft"], tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.safetensors").write_bytes(ODD_TENSORS[kind])
    (tmp_path / "t").write_bytes(ODD_TENSORS[kind])
    for read in (lambda: load_tensors(tmp_path / "t"), lambda: made.READ["peft"](tmp_path / "peft")):
        injected("odd tensors")
        with pytest.raises(lk.LoraxError) as e:
            read()
        assert len(str(e.value)) < 1000
        assert len(str(e.value).splitlines()) <= 4
