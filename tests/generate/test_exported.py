"""Exported models that write give JAX's logits token by token, and one exported base serves many adapters."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.errors import ExportError, LoraxError
from lorax_kit.generate.exported import WEIGHTS, adapter_arrays, load_parts, one_at_a_time, save_parts
from lorax_kit.generate.programs import parts_of, with_factors
from lorax_kit.models import load_model
from lorax_kit.serve.int8 import BLOCK, ZERO, blocks_of
from lorax_kit.serve.litert import save_litert
from tests.models.test_families import copied, recorded
from tests.problems.folders import write_model

ONNX = pytest.mark.interop
LITERT = pytest.mark.skipif(find_spec("tensorflow") is None, reason="needs the litert extra")


def inputs(family):
    """(ids read, their mask) of an encoder-decoder or none, and (ids, mask) of what is written, padded on the left."""
    found = recorded(family)
    rng = np.random.default_rng(0)
    prefix = "decoder_" if "decoder_input_ids" in found else ""
    ids = rng.integers(3, found["logits"].shape[-1], found[f"{prefix}input_ids"].shape).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, :2] = 0
    return (found["input_ids"], found["attention_mask"]) if prefix else (), (ids, mask)


def logits_by_token(runner, read, ids, mask):
    """Logits after the first four tokens, and after each of the rest; an encoder-decoder's text begins with ids."""
    if read:
        logits, held = runner.begin(*read, ids.shape[1])
        out, rest = [logits], range(1, ids.shape[1])
    else:
        logits, held = runner.begin(ids[:, :4], mask[:, :4], ids.shape[1] - 4)
        out, rest = [logits], range(4, ids.shape[1])
    for i in rest:
        logits, held = runner.step(ids[:, i : i + 1], mask[:, i : i + 1], held)
        out.append(logits)
    return np.stack(out, axis=1)


def whole(loaded, params, read, ids, mask):
    found = np.asarray(loaded.model.apply({"params": params}, *read, ids, mask))
    return found if read else found[:, 3:]


CASES = [
    *(
        pytest.param(family, "onnx", marks=ONNX)
        for family in ("llama3", "gpt2", "mistral_window", "t5_gated", "marian")
    ),
    *((family, "stablehlo") for family in ("llama3", "t5")),
    *(pytest.param(family, "litert", marks=LITERT) for family in ("llama3", "t5", "marian")),
]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_tokens_read_one_by_one_give_the_logits_of_the_whole_text(family, form, tmp_path):
    loaded = load_model(copied(family, tmp_path / "x"))
    read, (ids, mask) = inputs(family)
    if read:  # its text begins with the start token, and is not padded
        ids[:, 0], mask = loaded.special.start, np.ones_like(mask)
    parts = parts_of(loaded, grows=form == "onnx")
    parts = one_at_a_time(parts, 12) if form == "litert" else parts
    (tmp_path / "out").mkdir()
    files = save_parts(tmp_path / "out", parts, loaded.params, form, platforms=("cpu",))
    runner = load_parts(tmp_path / "out", parts, files, loaded)
    found = logits_by_token(runner, read, ids, mask)
    np.testing.assert_allclose(found, whole(loaded, loaded.params, read, ids, mask), atol=1e-4, rtol=0)
    assert runner.fixed == (form == "litert")
    if read and form == "onnx":  # the table of words is in one file, once
        table = np.asarray(loaded.params["embeddings"]["embedding"])
        stored = (tmp_path / "out" / WEIGHTS).read_bytes() if table.nbytes >= 4096 else table.tobytes()
        assert stored.count(table.tobytes()) == 1


def drawn(params, fn, args, pattern, rank, seed):
    """An adapter with factors that are not zero."""
    plan = lk.resolve(lk.Spec({pattern: lk.LoRA(rank=rank)}), params, fn, *args)
    rng = np.random.default_rng(seed)
    factors = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), lk.split(params, plan, jax.random.key(0))[1]
    )
    return plan, factors


@pytest.mark.parametrize(
    ("family", "form"),
    [pytest.param("llama3", "onnx", marks=ONNX), pytest.param("t5", "onnx", marks=ONNX), ("gpt2", "stablehlo")],
)
def test_adapters_of_any_rank_on_one_base_equal_their_merged_models(family, form, tmp_path):
    loaded = load_model(copied(family, tmp_path / "x"))
    read, (ids, mask) = inputs(family)
    if read:
        ids[:, 0], mask = loaded.special.start, np.ones_like(mask)

    def fn(params, *args):
        return loaded.model.apply({"params": params}, *args)

    side = "{encoder,decoder}/" if read else ""
    adapters = [
        drawn(loaded.params, fn, (*read, ids, mask), pattern, rank, seed)
        for pattern, rank, seed in ((f"{side}layer_*/**/kernel", 2, 0), (f"{side}layer_0/mlp/**/kernel", 3, 1))
    ]
    sites = adapters[0][0].sites
    parts = [with_factors(part, loaded.params, sites) for part in parts_of(loaded, grows=form == "onnx")]
    files = save_parts(tmp_path, parts, loaded.params, form, platforms=("cpu",))
    runner = load_parts(tmp_path, parts, files, loaded)
    for plan, factors in [*adapters, (None, {})]:
        scaled = {} if plan is None else {s.path: (factors[s.path].a, factors[s.path].b * s.scale) for s in plan.sites}
        params = loaded.params if plan is None else lk.merge(loaded.params, factors, plan)
        own = runner._replace(factors=adapter_arrays(parts, scaled))
        expected = whole(loaded, params, read, ids, mask)
        np.testing.assert_allclose(logits_by_token(own, read, ids, mask), expected, atol=2e-4, rtol=0)


def test_what_does_not_write_is_refused(tmp_path):
    with pytest.raises(LoraxError, match="is an encoder"):
        parts_of(load_model(copied("bert", tmp_path / "x")), grows=True)


def test_litert_says_what_it_lacks(tmp_path, monkeypatch):
    (part,) = parts_of(load_model(copied("llama3", tmp_path / "x")), grows=False)
    monkeypatch.setattr("lorax_kit.extras.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"tensorflow is not installed.\n  install the extra: pip install"):
        save_litert(tmp_path / "m.tflite", part.fn, {}, part.inputs)
    monkeypatch.setattr("lorax_kit.extras.find_spec", lambda name: name)
    with pytest.raises(ExportError, match="LiteRT needs sizes that are numbers"):
        save_litert(tmp_path / "m.tflite", part.fn, {}, part.inputs)
    assert not (tmp_path / "m.tflite").exists()


@ONNX
def test_int8_in_blocks_keeps_the_logits_and_the_table_once(tmp_path):
    words = [f"w{i}" for i in range(300)]
    loaded = load_model(write_model(tmp_path / "x", words, "llama", hidden_size=64, intermediate_size=80))
    ids = np.random.default_rng(0).integers(0, 300, (2, 6)).astype(np.int32)
    expected = whole(loaded, loaded.params, (), ids, np.ones_like(ids))
    sizes = {}
    for int8 in (False, True):
        folder = tmp_path / str(int8)
        folder.mkdir()
        parts = parts_of(loaded, grows=True)
        files = save_parts(folder, parts, loaded.params, "onnx", int8=int8)
        found = logits_by_token(load_parts(folder, parts, files, loaded), (), ids, np.ones_like(ids))
        assert np.linalg.norm(found - expected) < (0.1 if int8 else 1e-5) * np.linalg.norm(expected)
        sizes[int8] = (folder / files["decoder"]).stat().st_size
    kernels = sum(x.size for x in jax.tree.leaves(loaded.params) if x.ndim == 2)
    assert sizes[False] - sizes[True] > 2.6 * kernels  # of four bytes one and a sixteenth of a scale are left


def test_codes_mean_what_was_rounded():
    w = np.random.default_rng(0).normal(size=(5, 70)).astype(np.float32) * np.logspace(-3, 3, 5)[:, None]
    w[0] = 0
    codes, scales = blocks_of(w)
    assert (codes.shape, scales.shape) == ((5, 2, BLOCK), (10,))
    found = (codes.astype(np.float64) - ZERO) * scales.reshape(5, 2, 1)
    assert (np.abs(found.reshape(5, -1)[:, :70] - w) <= 0.5001 * scales.reshape(5, 2).max(1)[:, None]).all()
    assert (codes[:, 1, 6:] == ZERO).all()
