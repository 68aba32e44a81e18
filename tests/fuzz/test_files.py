"""Files that may come from anywhere: PEFT folders, GGUF, safetensors and model folders, rows of text."""

import json
import shutil
import struct

import numpy as np
import pytest
from hypothesis import strategies as st

import lorax_kit as lk
from lorax_kit.data.table import read_rows
from lorax_kit.models import load_model
from lorax_kit.models.stored.gguf import read_gguf
from lorax_kit.serve import load_tensors, save_tensors
from tests.faults import made
from tests.fuzz.inputs import changed, json_text, mutated
from tests.fuzz.verdict import NOTHING, run, taken
from tests.models import llama_files

ROWS = {
    "a.csv": b'text,label\n"good, really",yes\nbad,no\n\n"two\nlines",yes\n',
    "a.tsv": b"text\tlabel\ngood\tyes\nbad\tno\n",
    "a.jsonl": b'{"text": "good", "label": "yes"}\n\n{"text": "bad", "label": 1, "more": [1]}\n',
    "a.txt": b"one\ntwo\n\nthree\n",
}


def with_header(content, header):
    """The bytes of a safetensors file with another header."""
    (length,) = struct.unpack("<Q", content[:8])
    text = json_text(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def header_of(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


def odd_tensors(draw, content):
    """Mutated bytes, or a whole file with a changed header without its digest."""
    if draw(st.booleans()):
        return mutated(draw, content)
    header = header_of(content)
    header["__metadata__"] = {k: v for k, v in header.get("__metadata__", {}).items() if k != "lorax_sha256"}
    return with_header(content, changed(draw, header))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_peft_folders(tried, tmp_path, name):
    made.save_peft(tmp_path / "peft")
    file = tmp_path / "peft" / name
    content = file.read_bytes()

    def check(draw, said):
        if name.endswith("json") and draw(st.integers(0, 3)):
            text = json_text(changed(draw, json.loads(content))).encode("utf-8", "surrogatepass")
        else:
            text = mutated(draw, content) if name.endswith("json") else odd_tensors(draw, content)
        said += [text]
        file.write_bytes(text)
        found = taken(lambda: lk.load_peft(tmp_path / "peft", base=made.BASE, names=made.NAMES), tmp_path)
        assert found is NOTHING or all(np.isfinite(x).all() for x in made.jax.tree.leaves(found.factors))

    run(check, 1000, tried, "PEFT folders")


def test_safetensors(tried, tmp_path):
    file = tmp_path / "t.safetensors"
    save_tensors(file, {"w": lk.quantize({"w": made.PARAMS["up"]["kernel"]}, ["w"], "int8")["w"], "b": np.ones(3)})
    content = file.read_bytes()

    def check(draw, said):
        text = odd_tensors(draw, content)
        said += [text]
        file.write_bytes(text)
        taken(lambda: load_tensors(file), tmp_path)

    run(check, 700, tried, "safetensors files")


def test_gguf(tried, tmp_path):
    file = llama_files.write_gguf(tmp_path / "x.gguf")
    content = file.read_bytes()
    head = content.index(b"blk.0.attn_norm")

    def check(draw, said):
        text = mutated(draw, content[: head + 2000]) + content[head + 2000 :]
        said += [text[:300]]
        file.write_bytes(text)
        found = taken(lambda: read_gguf(file), tmp_path)
        if found is not NOTHING:
            taken(lambda: [found.stored.read(name) for name in found.stored.names], tmp_path)

    run(check, 500, tried, "GGUF files")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_model_folders(tried, tmp_path, name):
    (folder := tmp_path / "x").mkdir()
    llama_files.write_folder(folder)
    content = (folder / name).read_bytes()

    def check(draw, said):
        if name.endswith("json"):
            tree = json.loads(content)
            text = json_text(changed(draw, tree)).encode("utf-8", "surrogatepass")
            text = text if draw(st.integers(0, 3)) else mutated(draw, content)
        else:
            text = odd_tensors(draw, content)
        said += [text[:300]]
        (folder / name).write_bytes(text)
        taken(lambda: load_model(folder), tmp_path)

    run(check, 60, tried, "model folders")


@pytest.mark.parametrize("name", ROWS)
def test_rows(tried, tmp_path, name):
    file = tmp_path / name

    def check(draw, said):
        text = mutated(draw, ROWS[name])
        columns = {"text": "text"} if name == "a.txt" else {"text": "text", "label": "label"}
        encoding = draw(
            st.sampled_from(["utf-8"] * 6 + ["latin-1", "utf-16", "utf-32", "ascii", "rot13", "", "\0", "idna"])
        )
        said += [text, encoding]
        file.write_bytes(text)
        taken(lambda: list(read_rows(file, columns, encoding=encoding)), tmp_path)

    run(check, 750, tried, "files of rows")


def test_parquet(tried, tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["good", "bad"] * 9, "label": [0, 1] * 9}), file)
    content = file.read_bytes()

    def check(draw, said):
        said += [text := mutated(draw, content)]
        file.write_bytes(text)
        taken(lambda: list(read_rows(file, {"text": "text", "label": "label"})), tmp_path)

    run(check, 500, tried, "Parquet files")


def test_documents_of_adapters(tried, tmp_path):
    made.save_adapter(tmp_path / "whole")
    files = [p for p in (tmp_path / "whole").rglob("*") if p.is_file() and p.stat().st_size and "lock" not in p.name]

    def check(draw, said):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "a")
        file = draw(st.sampled_from(files))
        text = mutated(draw, file.read_bytes())
        said += [file.name, text[:300]]
        (tmp_path / "a" / file.relative_to(tmp_path / "whole")).write_bytes(text)
        taken(lambda: lk.load_adapter(tmp_path / "a", base=made.BASE), tmp_path)

    run(check, 60, tried, "adapters on disk")
