"""`lorax-kit export` on the real model and reviews, and the script that reads what it wrote."""

import functools
import importlib.util
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.cli import main
from lorax_kit.commands import train_adapter
from lorax_kit.commands.compress.subjects import sentiment_subject
from lorax_kit.commands.export.called import export_adapter
from lorax_kit.commands.export.options import Export
from lorax_kit.data import load_reviews
from lorax_kit.models import Tokenizer, load_bert
from lorax_kit.problems import Sentiment
from lorax_kit.serve import load_tensors

SCRIPT = Path(__file__).parents[2] / "experiments" / "run_onnx.py"
SITE = "encoder/layer_5/attention/query/kernel"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of two steps, on a problem with 20 test reviews."""
    workload = Sentiment(batch_size=4, length=8, val=20, test=20, buckets=(16,))
    with jax.numpy_dtype_promotion("standard"):
        done = train_adapter(workload, lk.LoRA(rank=2, alpha=4), out=tmp_path_factory.mktemp("export"), lr=1e-3,
                             seed=0, targets=[SITE], epochs=1, steps_per_epoch=2, progress=False)  # fmt: skip
    return done["adapter"]


@pytest.fixture(scope="module", autouse=True)
def quicker():
    """Reviews are read once, and programs that hold the model's weights stay out of the compilation cache."""
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorax_kit.commands.export.called.subject_of", subject_of)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


@functools.cache
def subject_of(adapter, targets=(), address=None, files=None):
    return sentiment_subject(adapter, targets=targets)


def call(*argv):
    main([str(a) for a in argv])


def test_merged_and_factored_exports_are_measured_and_load_again(adapter, tmp_path, capsys):
    before = {p: p.read_bytes() for p in Path(adapter).rglob("*") if p.is_file()}
    options, half = ["--rounds", 1, "--json"], ["--method", "svd", "--keep", "0.5", "--target", SITE]
    found = {}
    for name, chosen in {
        "merged": ["--format", "safetensors"],
        "factored": ["--format", "safetensors", *half],
        "program": ["--format", "stablehlo", *half],
    }.items():
        call("export", adapter, "--out", tmp_path / name, *chosen, *options)
        found[name] = json.loads(capsys.readouterr().out)
        row = found[name]
        assert set(row["files"]) == {"export.json", "vocab.txt", row["file"]}
        assert row["files"][row["file"]] == row["bytes"] == (tmp_path / name / row["file"]).stat().st_size
        assert row["max_difference"] <= 1e-4
        assert (row["accuracy"], row["agreement"], row["examples"]) == (row["accuracy_jax"], 1.0, 20)
        assert row["params_bytes"] < row["bytes"] < row["params_bytes"] + 200_000
        assert row["latency_ms"] > 0
    whole = found["merged"]
    assert whole["base_bytes"] == whole["params_bytes"] == 4 * (22_565_376 + 770)
    assert found["factored"]["params_bytes"] <= whole["base_bytes"] - 4 * 384**2 // 2
    assert whole["accuracy_merged"] == whole["accuracy_jax"]
    assert 0 < whole["adapter_bytes"] < 200_000
    merged = subject_of(adapter).params
    assert jax.tree.all(jax.tree.map(np.array_equal, load_tensors(tmp_path / "merged" / "model.safetensors"), merged))
    document = json.loads((tmp_path / "factored" / "export.json").read_text())
    assert document["labels"] == ["negative", "positive"]
    assert (document["max_length"], document["encoder"]["num_hidden_layers"]) == (16, 6)
    assert {p: p.read_bytes() for p in Path(adapter).rglob("*") if p.is_file()} == before


def test_bad_calls_exit_2_and_write_nothing(adapter, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for argv, message in (
        (["--format", "stablehlo", "--int8", "--out", tmp_path / "x"], "int8 is a form of onnx"),
        (["--format", "tflite", "--out", tmp_path / "x"], "'tflite' is not one of"),
        (["--format", "stablehlo", "--platform", "tpu", "--out", tmp_path / "x"], "this machine runs cpu"),
        (["--format", "safetensors", "--method", "pca", "--out", tmp_path / "x"], "method 'pca' is unknown"),
        (["--format", "safetensors", "--method", "svd", "--keep", "2", "--out", tmp_path / "x"], "keep is 2"),
        (["--format", "safetensors", "--out", tmp_path / "mine"], "exists"),
        (["--format", "safetensors", "--out", "/dev/null/x"], "is no folder that may be written to"),
        (["--format", "safetensors", "--method", "int8", "--keep", "0.3", "--out", tmp_path / "x"], "int8 keeps all"),
        (["--format", "safetensors", "--out", tmp_path / "mine", "--overwrite"], "is no such export"),
    ):
        with pytest.raises(SystemExit) as e:
            call("export", adapter, *argv)
        assert e.value.code == 2
        assert message in capsys.readouterr().err
        assert [p.name for p in tmp_path.rglob("*")] == ["mine"]
    with pytest.raises(SystemExit):
        call("export", tmp_path / "mine", "--format", "safetensors", "--out", tmp_path / "x")
    assert "is not an adapter" in capsys.readouterr().err


def test_a_failure_while_measuring_leaves_the_earlier_export(adapter, tmp_path, monkeypatch):
    alone = Export(form="safetensors", rounds=0)
    export_adapter(adapter, tmp_path / "x", alone, progress=False)
    (tmp_path / "x" / "mine").mkdir()
    with pytest.raises(lk.LoraxError, match="holds 'mine', too"):
        export_adapter(adapter, tmp_path / "x", replace(alone, overwrite=True), progress=False)
    (tmp_path / "x" / "mine").rmdir()
    before = {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()}
    monkeypatch.setattr("lorax_kit.commands.export.called._measured", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_adapter(adapter, tmp_path / "x", replace(alone, overwrite=True), progress=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    monkeypatch.setattr("lorax_kit.commands.export.called._measured", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as e:  # as a scheduler ends a job
        call("export", adapter, "--format", "safetensors", "--rounds", 0, "--out", tmp_path / "y")
    assert e.value.code == 130
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def script():
    spec = importlib.util.spec_from_file_location("run_onnx", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_scripts_tokenizer_is_the_models(tmp_path):
    file = load_bert().tokenizer_file
    words = sorted((vocab := json.loads(file.read_text())["model"]["vocab"]), key=vocab.get)
    ours = script().WordPiece(words, lowercase=True, strip_accents=None, handle_chinese_chars=True)
    odd = ["", " ", "Crème brûlée—naïve?!", "北京 is\x85big\u200b\t\n", "x" * 101, "ÀÉ\ufffd ß ﬁ", "$5.99 a_b <i>"]
    texts = [*load_reviews().texts, *load_reviews("imdb").texts[:200], *odd]
    assert [ours.encode(text, 64) for text in texts] == Tokenizer.from_file(file).encode(texts, 64)


@pytest.mark.interop
def test_text_in_label_out_with_numpy_and_the_runtime_alone(adapter, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    for name, chosen in {"fp32": [], "int8": ["--int8"], "small": ["--method", "svd", "--target", SITE]}.items():
        call("export", adapter, "--format", "onnx", "--out", tmp_path / name, "--rounds", 1, "--json", *chosen)
        row = json.loads(capsys.readouterr().out)
        assert row["max_difference"] <= (0.3 if name == "int8" else 1e-4)
    texts = ["a warm and funny film", "two hours of my life that I want back", "Crème brûlée"]
    alone = f"""
import sys
sys.modules.update(dict.fromkeys(('jax', 'lorax_kit', 'tokenizers', 'flax')))  # any import of them fails
sys.argv = {[str(SCRIPT), str(tmp_path / "fp32"), *texts]!r}
import runpy
runpy.run_path(sys.argv[0], run_name='__main__')
"""
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, check=True, timeout=120)
    subject = subject_of(adapter)
    for text, line in zip(texts, done.stdout.splitlines(), strict=True):
        ids = np.asarray(Tokenizer.from_file(load_bert().tokenizer_file).encode([text], 16), np.int32)
        batch = subject.test[0]._replace(ids=ids, mask=np.ones_like(ids))
        share = np.asarray(jax.nn.softmax(subject.apply(subject.params, batch), axis=-1))[0]
        assert line == f"{('negative', 'positive')[share.argmax()]} {share.max():.4f}  {text}"
