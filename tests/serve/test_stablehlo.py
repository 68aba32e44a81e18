"""A StableHLO file runs in a process that has jax only, for sizes it never saw, to the same bits."""

import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.compress import CompressPlan, compress, compressed
from lorax_kit.models.encoders.bert import BertClassifier, BertConfig
from lorax_kit.serve import ExportError, load_stablehlo, save_stablehlo
from tests import tiny

PARAMS = tiny.params(jax.random.key(0))
BATCH = tiny.points(0, 5)
SITES = lk.resolve(lk.Spec({"{up,down}/kernel": lk.LoRA(rank=2)}), PARAMS, tiny.apply, BATCH)
FACTORED = compress(PARAMS, CompressPlan(method="svd", sites=SITES, ranks={"up/kernel": 2}))


def points(params, x, apply=tiny.apply):
    return apply(params, tiny.Points(x, None))


def adapted(params, x):
    base, factors = params
    return points(base, x, lambda p, batch: lk.adapt(tiny.apply, SITES)(p, factors, batch))


def drawn():
    base, factors = lk.split(PARAMS, SITES, jax.random.key(1))
    return base, {p: f._replace(b=jnp.ones_like(f.b)) for p, f in factors.items()}


CASES = {
    "merged": (points, lambda: PARAMS),
    "factored": (lambda p, x: points(p, x, compressed(tiny.apply)), lambda: FACTORED),
    "quantised": (
        lambda p, x: points(p, x, compressed(tiny.apply)),
        lambda: lk.quantize(FACTORED, ["down/kernel", "up/kernel/a"], "int8", block=4),
    ),
    "base and adapter": (adapted, drawn),
}
ALONE = """
import pathlib, sys
sys.modules['lorax_kit'] = None  # any import of it fails
import jax.export, numpy
exported = jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
numpy.save(sys.argv[3], exported.call(*numpy.load(sys.argv[2]).values())[0])
"""


def alone(tmp_path, file, *arrays):
    np.savez(tmp_path / "in.npz", *arrays)
    argv = [sys.executable, "-c", ALONE, file, tmp_path / "in.npz", tmp_path / "out.npy"]
    subprocess.run([str(a) for a in argv], check=True, timeout=120, cwd=tmp_path)
    return np.load(tmp_path / "out.npy")


@pytest.mark.parametrize("case", CASES)
def test_reloaded_programs_equal_ours_for_any_batch(case, tmp_path):
    fn, make = CASES[case]
    params = make()
    inputs = jax.export.symbolic_args_specs({"x": BATCH.x}, f"batch, {tiny.WIDTH}")
    save_stablehlo(tmp_path / "m.stablehlo", fn, params, inputs)
    run = load_stablehlo(tmp_path / "m.stablehlo")
    for n in (1, 5, 9):
        x = tiny.points(n, n).x
        np.testing.assert_allclose(run(x)[0], jax.jit(fn)(params, x), rtol=0, atol=1e-6)


def test_it_runs_without_the_project(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=16)  # fmt: skip
    model = BertClassifier(config, num_classes=2)
    ids = np.random.default_rng(0).integers(1, 50, (3, 8)).astype(np.int32)
    mask = (np.arange(8)[None] < np.array([[8], [5], [2]])).astype(np.int32)
    params = model.init(jax.random.key(0), ids, mask)["params"]
    inputs = jax.export.symbolic_args_specs({"ids": ids, "mask": mask}, "batch, length")

    def fn(params, ids, mask):
        return model.apply({"params": params}, ids, mask)

    save_stablehlo(tmp_path / "m.stablehlo", fn, params, inputs)
    found = alone(tmp_path, tmp_path / "m.stablehlo", ids, mask)
    np.testing.assert_allclose(found, jax.jit(fn)(params, ids, mask), rtol=0, atol=1e-6)
    run = load_stablehlo(tmp_path / "m.stablehlo")
    short = fn(params, ids[:2, :6], mask[:2, :6])
    np.testing.assert_allclose(run(ids[:2, :6], mask[:2, :6])[0], short, rtol=0, atol=1e-6)


def test_a_program_for_machines_that_are_not_here(tmp_path):
    save_stablehlo(tmp_path / "m.stablehlo", points, PARAMS, {"x": BATCH.x}, platforms=("tpu", "cuda"))
    exported = jax.export.deserialize(bytearray((tmp_path / "m.stablehlo").read_bytes()))
    assert exported.platforms == ("tpu", "cuda")


def calling_back(params, x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: jax.pure_callback(lambda y: y, x, x), lambda x: x, x)


ANY = jax.export.symbolic_shape("batch, width")
BAD = [
    (calling_back, {"x": BATCH.x}, ("cpu",), "uses 'pure_callback', which calls back into Python"),
    (points, {"x": BATCH.x[:, :3]}, ("cpu",), r"cannot be traced for the inputs x float32\[5, 3\]"),
    (points, {}, ("cpu",), "there are no inputs"),
    (points, {"x": "text"}, ("cpu",), "the input 'x' is a str"),
    (points, {"x": BATCH.x}, ("abacus",), "platform 'abacus' is unknown"),
    (
        points,
        {"x": jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, width"), "float32")},
        ("cpu",),
        "give the one",
    ),
]


@pytest.mark.parametrize(("fn", "inputs", "platforms", "message"), BAD)
def test_bad_exports_say_what_is_wrong_and_leave_nothing(fn, inputs, platforms, message, tmp_path):
    before = jax.tree.map(np.array, PARAMS)
    with pytest.raises(ExportError, match=message):
        save_stablehlo(tmp_path / "m", fn, PARAMS, inputs, platforms=platforms)
    assert list(tmp_path.iterdir()) == []
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, PARAMS))


def test_existing_and_damaged_files(tmp_path):
    file = tmp_path / "m"
    file.write_bytes(b"mine")
    with pytest.raises(lk.AdapterError, match="exists"):
        save_stablehlo(file, points, PARAMS, {"x": BATCH.x})
    assert file.read_bytes() == b"mine"
    with pytest.raises(ExportError, match="is damaged or of another jax"):
        load_stablehlo(file)
    save_stablehlo(file, points, PARAMS, {"x": BATCH.x}, overwrite=True)
    for inputs in ((), (BATCH.x, BATCH.x), (BATCH.x[:, :2],)):
        with pytest.raises(ExportError, match=r"takes float32\[5,"):
            load_stablehlo(file)(*inputs)
