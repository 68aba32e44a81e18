"""ONNX models in ONNX Runtime equal JAX to 1e-4 for sizes they never saw; in int8 they stay close."""

import importlib.util

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.compress import compress, compressed, plan_ranks
from lorax_kit.models import LstmClassifier, LstmConfig
from lorax_kit.models.encoders.bert import BertClassifier, BertConfig
from lorax_kit.serve import ExportError, load_onnx, save_onnx
from tests import tiny
from tests.serve.test_stablehlo import CASES, calling_back, points

PARAMS = tiny.params(jax.random.key(0))
X = tiny.points(0, 5).x
INPUTS = jax.export.symbolic_args_specs({"x": X}, f"batch, {tiny.WIDTH}")


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("lorax_kit.extras.find_spec", lambda name: None if name == "jax2onnx" else found(name))
    for call in (lambda: save_onnx(tmp_path / "m", points, PARAMS, INPUTS), lambda: load_onnx(tmp_path / "m")):
        with pytest.raises(ExportError, match=r"is not installed.\n  install the extra: pip install 'lorax_kit\[exp"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_params_that_one_file_cannot_hold_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("lorax_kit.serve.onnx.check_installed", lambda: None)
    params = {"w": jax.ShapeDtypeStruct((2**15, 2**14), jnp.float32)}
    with pytest.raises(ExportError, match=r"the params hold 2.0 GiB, .*\n  export as StableHLO, or the params alone"):
        save_onnx(tmp_path / "m.onnx", points, params, INPUTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.interop
@pytest.mark.parametrize("case", CASES)
def test_models_equal_jax_for_any_batch(case, tmp_path):
    fn, make = CASES[case]
    params = make()
    save_onnx(tmp_path / "m.onnx", fn, params, INPUTS)
    run = load_onnx(tmp_path / "m.onnx")
    for n in (1, 5, 9):
        x = tiny.points(n, n).x
        np.testing.assert_allclose(run(x)[0], jax.jit(fn)(params, x), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def bert():
    config = BertConfig(vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=128, max_position_embeddings=32)  # fmt: skip
    model = BertClassifier(config, num_classes=3)
    ids = np.random.default_rng(0).integers(1, 500, (6, 16)).astype(np.int32)
    mask = (np.arange(16)[None] < np.array([16, 12, 9, 5, 2, 1])[:, None]).astype(np.int32)
    params = model.init(jax.random.key(0), ids, mask)["params"]
    return lambda params, ids, mask: model.apply({"params": params}, ids, mask), params, ids, mask


@pytest.mark.interop
@pytest.mark.parametrize("form", ["merged", "factored"])
def test_bert_of_any_batch_and_length_in_fp32_and_int8(form, bert, tmp_path):
    fn, params, ids, mask = bert
    if form == "factored":
        sites = lk.resolve(lk.Spec({"encoder/layer_*/**/kernel": lk.LoRA(rank=1)}), params, fn, ids, mask)
        params, fn = compress(params, plan_ranks(params, sites, keep=0.6, method="svd")), compressed(fn)
    inputs = jax.export.symbolic_args_specs({"ids": ids, "mask": mask}, "batch, length")
    sizes = {}
    for int8 in (False, True):
        file = tmp_path / f"{int8}.onnx"
        save_onnx(file, fn, params, inputs, outputs=("logits",), int8=int8)
        run, sizes[int8] = load_onnx(file), file.stat().st_size
        for rows, length in ((6, 16), (2, 12), (1, 16)):
            given = ids[:rows, :length], mask[:rows, :length]
            want = np.asarray(jax.jit(fn)(params, *given))
            (got,) = run(*given)
            np.testing.assert_allclose(got, want, rtol=0, atol=0.05 * np.abs(want).max() if int8 else 1e-4)
    kernels = 2 * (4 * 64**2 + 2 * 64 * 128) + 500 * 64
    kept = sum(x.nbytes for x in jax.tree.leaves(params))
    assert sizes[False] - kept < 120_000  # the graph: params are stored once
    # Every matrix and the table of words in 8 bits: three of four bytes of the least there could be are gone.
    assert sizes[False] - sizes[True] > 0.6 * 3 * kernels * (0.6 if form == "factored" else 1)


def unknown(params, x):
    return jax.lax.linalg.schur(x.T @ x)[0]


def random(params, x):
    """The converter has an operation for it that the runtime lacks."""
    return x[:3] + jax.random.normal(jax.random.key(0), (3, tiny.WIDTH))


BAD = [
    (unknown, {}, "the function uses 'schur', which it lacks"),
    (random, {}, "ONNX Runtime cannot run"),
    (calling_back, {}, "uses 'pure_callback', which calls back into Python"),
    (points, {"outputs": ("a", "b")}, "the function returns 1 arrays, and `outputs` names"),
]


@pytest.mark.interop
@pytest.mark.parametrize(("fn", "options", "message"), BAD)
def test_what_the_format_lacks_is_named_and_nothing_is_left(fn, options, message, tmp_path):
    before = jax.tree.map(np.array, PARAMS)
    with pytest.raises(ExportError, match=message):
        save_onnx(tmp_path / "m.onnx", fn, PARAMS, {"x": X}, **options)
    assert list(tmp_path.iterdir()) == []
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, PARAMS))


@pytest.mark.interop
def test_existing_and_damaged_files(tmp_path):
    file = tmp_path / "m.onnx"
    file.write_bytes(b"mine")
    with pytest.raises(lk.AdapterError, match="exists"):
        save_onnx(file, points, PARAMS, INPUTS)
    assert file.read_bytes() == b"mine"
    with pytest.raises(ExportError, match="ONNX Runtime cannot run"):
        load_onnx(file)
    with pytest.raises(FileNotFoundError):
        load_onnx(tmp_path / "none")
    save_onnx(file, points, PARAMS, INPUTS, overwrite=True)
    run = load_onnx(file)
    np.testing.assert_allclose(run(X)[0], points(PARAMS, X), rtol=0, atol=1e-4)
    for inputs, message in (((X, X), "takes x; 2 arrays were given"), ((X[:, :2],), "cannot be run on these inputs")):
        with pytest.raises(ExportError, match=message):
            run(*inputs)


@pytest.mark.interop
def test_an_lstm_of_any_batch(tmp_path):
    """The keys that its layers draw and do not use have no counterpart in the format."""
    model = LstmClassifier(LstmConfig(vocab_size=50, embedding_size=8, hidden_size=8))
    ids = np.random.default_rng(0).integers(1, 50, (3, 7)).astype(np.int32)
    mask = (np.arange(7) < np.array([7, 4, 1])[:, None]).astype(np.int32)
    params = model.init(jax.random.key(0), ids, mask)["params"]
    inputs = jax.export.symbolic_args_specs({"ids": ids, "mask": mask}, "batch, 7")
    save_onnx(tmp_path / "m.onnx", lambda p, *x: model.apply({"params": p}, *x), params, inputs)
    run = load_onnx(tmp_path / "m.onnx")
    for n in (1, 3):
        ours = model.apply({"params": params}, ids[:n], mask[:n])
        np.testing.assert_allclose(run(ids[:n], mask[:n])[0], ours, rtol=0, atol=1e-5)


@pytest.mark.interop
def test_the_converter_leaves_jax_as_it_was(tmp_path):
    names = ("matmul", "take", "where", "exp", "sum")
    before = [getattr(jnp, name) for name in names]
    strict = jax.config.jax_numpy_dtype_promotion
    save_onnx(tmp_path / "m.onnx", points, PARAMS, INPUTS)
    assert [getattr(jnp, name) for name in names] == before
    assert (jax.config.jax_numpy_dtype_promotion, jax.config.jax_enable_x64) == (strict, False)


@pytest.mark.interop
@pytest.mark.parametrize(("largest", "width"), [(1.0, 16), (500.0, 16), (500.0, 64)])
def test_one_large_entry_does_not_round_the_rest_of_an_int8_table_to_zero(largest, width, tmp_path):
    """The runtime has one int8 scale for a table; beside an entry of 500 it would round rows of about 1 to zero.

    Such a table has a scale for each 64 entries of a row, or stays as it is where rows are not so long.
    """
    params = {"table": jax.random.normal(jax.random.key(0), (400, width)).at[0, 0].set(largest)}
    ids = jnp.asarray([[3, 7, 2], [1, 5, 399]], jnp.int32)
    fn = lambda p, ids: p["table"][ids]  # noqa: E731
    save_onnx(tmp_path / "m.onnx", fn, params, {"ids": ids}, int8=True)
    got, want = load_onnx(tmp_path / "m.onnx")(ids)[0], np.asarray(fn(params, ids))
    stays = (largest, width) == (500, 16)
    assert np.linalg.norm(got - want) < (1e-6 if stays else 0.02) * np.linalg.norm(want)
    in_int8 = (tmp_path / "m.onnx").stat().st_size < 2 * params["table"].size
    assert in_int8 == (not stays)
