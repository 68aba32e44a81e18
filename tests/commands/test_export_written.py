"""`lorax-kit export` of models that write: merged, adapters apart, bad calls; text by the runtime alone."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers

import lorax_kit as lk
from lorax_kit.assets import MissingPackageError
from lorax_kit.cli import main
from lorax_kit.commands import train_adapter
from lorax_kit.commands.adapters.generation import author_of, generate
from lorax_kit.commands.export.measured import samples_of
from lorax_kit.commands.export.options import Export
from lorax_kit.commands.export.written import export_writer, writes
from lorax_kit.errors import ExportError
from lorax_kit.models import Tokenizer, load_model
from lorax_kit.problems import Chat
from tests.models.llama_files import write_folder
from tests.problems.test_talk import PLAIN, TEXT, decoder, lines, said, t5  # noqa: F401 (fixtures)

pytestmark = pytest.mark.usefixtures("standard_promotion")
SCRIPT = Path(__file__).parents[2] / "experiments" / "run_onnx.py"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text(f"{TEXT}\n{' '.join(reversed(TEXT.split()))}\n")
    return file


@pytest.fixture(scope="module")
def adapters(decoder, tmp_path_factory):  # noqa: F811
    """Two adapters of ranks 2 and 3, on conversations."""
    folder = tmp_path_factory.mktemp("adapters")
    words = TEXT.split()
    rows = [{"messages": said(words[i % len(words)], words[(3 * i) % len(words)])} for i in range(24)]
    with_data = lines(folder / "talk.jsonl", rows)
    problem = Chat(model=decoder, data=with_data, messages="messages", template=PLAIN, batch_size=4, length=16)
    for rank in (2, 3):
        train_adapter(problem, lk.LoRA(rank=rank), out=folder / f"r{rank}", lr=3e-2, seed=rank, epochs=1,
                      steps_per_epoch=3, progress=False)  # fmt: skip
    return folder


def export(capsys, *argv):
    main(["export", *map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_pretrained_decoder_as_stablehlo(decoder, texts, tmp_path, capsys):  # noqa: F811
    row = export(capsys, "--model", decoder, "--format", "stablehlo", "--texts", texts, "--rounds", "1", "--out",
                 tmp_path / "x")  # fmt: skip
    assert set(row["files"]) == {"decoder.stablehlo", "export.json", "tokenizer.json"}
    assert (row["prompts"], row["tokens_equal"]) == (2, 1.0)
    assert row["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert row["max_difference"] < 1e-4
    assert row["latency_ms"] > 0
    document = json.loads((tmp_path / "x" / "export.json").read_text())
    part = document["parts"]["decoder"]
    assert part["inputs"]["key_0"] == {"shape": ["batch", 1, "slots", 8], "dtype": "float32"}
    assert part["carried"]["next_key_0"] == "key_0"
    assert (document["eos"], document["max_length"]) == ([3], 64)
    assert document["prompt"] == {"before": "", "after": "", "special_tokens": True}


def test_bad_calls_exit_2_and_write_nothing(decoder, texts, tmp_path, capsys):  # noqa: F811
    model, out = ["--model", decoder], ["--out", tmp_path / "x"]
    (tmp_path / "empty").write_text("\n")
    for argv, message in (
        ([], "give an ADAPTER, or --model"),
        ([*model, *out], "Missing option '--format'"),
        ([*model, "--format", "onnx"], "Missing option '--out'"),
        ([*model, *out, "--format", "safetensors"], "'safetensors' is none of a model that writes"),
        ([*model, *out, "--format", "stablehlo", "--int8"], "int8 is a form of onnx"),
        ([*model, *out, "--format", "stablehlo", "--adapters", "separate"], "give an ADAPTER alone"),
        ([*model, *out, "--format", "stablehlo", "--problem", "a:b"], "--problem goes with"),
        (["--model", "minilm", *out, "--format", "stablehlo"], "is an encoder"),
        ([*model, "--onto", tmp_path], "--onto adds an ADAPTER"),
        ([*model, *out, "--format", "stablehlo", "--texts", tmp_path / "empty"], "holds no text"),
        ([*model, *out, "--format", "stablehlo", "--slots", "9"], "--slots goes with --format litert"),
        ([*model, "--format", "stablehlo", "--out", tmp_path, "--overwrite"], "is no such export"),
    ):
        with pytest.raises(SystemExit) as e:
            main(["export", *map(str, argv)])
        assert e.value.code == 2, argv
        assert message in capsys.readouterr().err, argv
        assert not (tmp_path / "x").exists()
    assert not writes(tmp_path)


def test_an_adapter_is_laid_out_as_in_its_training_and_served_beside_its_base(adapters, decoder, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "x"
    row = export(capsys, adapters / "r2", "--format", "stablehlo", "--adapters", "separate", "--rounds", "0",
                 "--out", out)  # fmt: skip
    assert row["tokens_equal"] == 1.0
    assert row["perplexity_ratio"] == pytest.approx(1, abs=1e-4)
    assert {"adapters/r2.safetensors", "decoder.stablehlo"} <= set(row["files"])
    document = json.loads((out / "export.json").read_text())
    assert document["prompt"] == {"before": "user ", "after": " assistant ", "special_tokens": False}
    found = export(capsys, adapters / "r3", "--onto", out)
    assert Path(found["file"]) == out / "adapters" / "r3.safetensors"
    with pytest.raises(SystemExit):
        main(["export", str(adapters / "r3"), "--onto", str(out)])
    assert "exists" in capsys.readouterr().err
    merged = tmp_path / "merged"
    export(capsys, adapters / "r2", "--format", "stablehlo", "--rounds", "0", "--out", merged)
    with pytest.raises(SystemExit):
        main(["export", str(adapters / "r3"), "--onto", str(merged)])
    assert "take no adapters" in capsys.readouterr().err


def test_a_compressed_model_is_exported_to_write_and_compared(adapters, tmp_path, capsys):
    halved = ["--method", "svd", "--keep", "0.5", "--batches", "1"]
    for name, chosen in {"whole": [], "half": halved}.items():
        row = export(capsys, adapters / "r2", "--format", "stablehlo", *chosen, "--rounds", "0", "--out",
                     tmp_path / name)  # fmt: skip
        assert row["tokens_equal"] == 1.0
    folders = [str(tmp_path / name) for name in ("whole", "half")]
    main(["exports", *folders, "--out", str(tmp_path / "page.html"), "--json"])
    whole, half = json.loads(capsys.readouterr().out)
    assert half["params_bytes"] < whole["params_bytes"]
    assert half["jax"] == pytest.approx(half["exported"], rel=1e-4)
    assert half["jax"] != pytest.approx(whole["jax"], rel=1e-4)
    page = (tmp_path / "page.html").read_text()
    assert page.count('<td class="text">stablehlo</td>') == 2
    with pytest.raises(SystemExit):
        main(["exports", str(tmp_path)])
    assert "is no folder of `lorax-kit export`" in capsys.readouterr().err


def alone(*argv):
    """The script in a process that cannot import jax, the project or tokenizers."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys(('jax', 'lorax_kit', 'tokenizers', 'flax')))  # any import of them fails
sys.argv = {[str(SCRIPT), *map(str, argv)]!r}
import runpy
runpy.run_path(sys.argv[0], run_name='__main__')
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


@pytest.mark.interop
def test_text_out_with_numpy_and_the_runtime_alone(tmp_path, texts):
    (tmp_path / "m").mkdir()
    write_folder(tmp_path / "m", eos_token_id=1)
    as_onnx, told = Export(form="onnx", rounds=0), ["the 12 the", "he the t"]
    export_writer(tmp_path / "m", tmp_path / "x", as_onnx, texts=told, new=2)
    author = author_of(tmp_path / "m")
    prompts = ["the the 12", "<|im_start|>he"]
    expected = generate(author, prompts, max_new_tokens=6)["texts"]
    printed = alone(tmp_path / "x", "--max-new-tokens", "6", *prompts)
    assert printed == "".join(one["text"] + "\n" for one in expected)
    drawn = [alone(tmp_path / "x", "--temperature", "2", "--seed", seed, prompts[0]) for seed in ("0", "0", "1")]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.interop
def test_adapters_by_name_with_numpy_and_the_runtime(adapters, decoder, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "x"
    row = export(capsys, adapters / "r2", "--format", "onnx", "--adapters", "separate", "--rounds", "0", "--out", out)
    assert row["tokens_equal"] == 1.0
    export(capsys, adapters / "r3", "--onto", out)
    spec = importlib.util.spec_from_file_location("run_onnx", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name in ("r2", "r3"):
        expected = generate(author_of(adapters / name), ["please say red"], max_new_tokens=5)["texts"][0]["text"]
        script.main([str(out), "--adapter", name, "--max-new-tokens", "5", "please say red"])
        assert capsys.readouterr().out == expected + "\n"
    with pytest.raises(ExportError, match="more than a product of two factors"):
        _dora(adapters, decoder, tmp_path)


def _dora(adapters, decoder, tmp_path):  # noqa: F811
    problem = Chat(model=decoder, data=str(adapters / "talk.jsonl"), messages="messages", template=PLAIN, batch_size=4,
                   length=16)  # fmt: skip
    train_adapter(problem, lk.DoRA(rank=2), out=tmp_path / "dora", lr=3e-2, seed=0, epochs=1, steps_per_epoch=1,
                  progress=False)  # fmt: skip
    export_writer(tmp_path / "dora", tmp_path / "y", Export(form="onnx", rounds=0), separate=True)


@pytest.mark.interop
def test_an_encoder_decoder_reads_and_writes(t5, tmp_path, capsys):  # noqa: F811
    (tmp_path / "texts").write_text("red green blue house car what\nwhat is it a the please\n")
    out = tmp_path / "x"
    for int8 in ([], ["--int8"]):
        row = export(capsys, "--model", t5, "--format", "onnx", *int8, "--texts", tmp_path / "texts", "--rounds", "1",
                     "--out", out, "--overwrite")  # fmt: skip
        assert {"decoder.onnx", "encoder.onnx", "weights.bin"} <= set(row["files"])
        if not int8:
            assert row["tokens_equal"] == 1.0
            assert row["max_difference"] < 1e-4
    assert load_model(t5).kind == "encoder-decoder"


def smollm2s_pairs():
    try:
        return load_model("smollm2").tokenizer.inner
    except (MissingPackageError, ImportError) as e:
        pytest.skip(f"SmolLM2 is installed by make llama ({e})")


def learnt_pairs():
    """Pairs as SmolLM2 has them (digits apart, special tokens), learnt on this file: no model need be installed."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [digits, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=special)
    inner.train_from_iterator([Path(__file__).read_text()], trainer)
    return inner


@pytest.mark.interop
@pytest.mark.parametrize("pairs", [learnt_pairs, smollm2s_pairs])
def test_the_scripts_byte_pairs_are_the_models(pairs):
    spec = importlib.util.spec_from_file_location("run_onnx", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    inner = pairs()
    ours = script.BytePairs(json.loads(inner.to_str()))
    odd = ["", " ", "  a  b\n\nc 12 3² ½ x\t\n 1a's don't it'll  ", "Crème brûlée—naïve?!", "北京 is\x85big\u200b\t\n",
           "<|im_start|>user\nhi<|im_end|>\n <|endoftext|>", "😀 a😀\u3000b",
           "    def f():\n        return 1\n"]  # fmt: skip
    for text in odd:
        ids = inner.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == inner.decode(ids)


def test_texts_that_are_all_too_long_to_measure_on_say_how_long_they_are():
    words = Tokenizer.from_texts(["a b"], 4)
    author = SimpleNamespace(loaded=SimpleNamespace(kind="decoder", tokenizer=words))
    with pytest.raises(ExportError, match="the shortest of 2 has 6 tokens, and what is exported takes 4"):
        samples_of(author, ["a b " * 3, "a b " * 5], 4)
    with pytest.raises(ExportError, match="no text is long enough to measure on"):
        samples_of(author, ["a"], 4)
