"""Params on disk come back bit for bit: merged, factored, in few bits, of any structure."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.checkpoint.tensors import read_tensors, write_tensors
from lorax_kit.compress import CompressPlan, compress, with_residuals
from lorax_kit.core.lowrank import LowRank
from lorax_kit.serve import ExportError, load_tensors, save_tensors
from tests import tiny

PARAMS = tiny.params(jax.random.key(0))
SITES = lk.resolve(lk.Spec({"{up,down}/kernel": lk.LoRA(rank=1)}), PARAMS, tiny.apply, tiny.points(0, 4))
FACTORED = compress(PARAMS, CompressPlan(method="svd", sites=SITES, ranks={"up/kernel": 2, "down/kernel": 3}))


def same(x, y):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def residual():
    whole = with_residuals(PARAMS, FACTORED)
    return lk.quantize(whole, ["*/kernel/{a,b,residual}"], "nf4", block=4)


CASES = {
    "merged": lambda: PARAMS,
    "factored": lambda: FACTORED,
    "int8": lambda: lk.quantize(PARAMS, ["{up,down}/kernel"], "int8", block=4),
    "nf4, double": lambda: lk.quantize(PARAMS, ["up/kernel"], "nf4", block=2, double=True),
    "factors in four bits": lambda: lk.quantize(FACTORED, ["{up,down}/kernel/{a,b}"], "int4", block=4),
    "residuals in four bits": residual,
    "dtypes and a scalar": lambda: {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.float32(-0.0), "c": jnp.arange(3)},
    "keys and counters": lambda: {"key": jax.random.key(3), "rbg": jax.random.key(1, impl="rbg"), "n": jnp.uint32(7)},
    "transposed on the host": lambda: {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T},
}


@pytest.mark.parametrize("case", CASES)
def test_params_come_back_bit_for_bit(case, tmp_path):
    params = CASES[case]()
    save_tensors(tmp_path / "m.safetensors", params)
    same(load_tensors(tmp_path / "m.safetensors"), params)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_factored_file_holds_the_factors_by_path_and_nothing_whole(tmp_path):
    save_tensors(tmp_path / "m.safetensors", FACTORED)
    found = read_tensors(tmp_path / "m.safetensors")
    assert set(found) == set(lk.paths(FACTORED))
    assert found["up/kernel/a"].shape == (2, 8)
    assert sum(x.nbytes for x in found.values()) == sum(x.nbytes for x in jax.tree.leaves(FACTORED))
    batch = tiny.points(1, 8)
    loaded = load_tensors(tmp_path / "m.safetensors")
    assert isinstance(loaded["up"]["kernel"], LowRank)
    run = lk.compress.compressed(tiny.apply)
    assert (run(loaded, batch) == run(FACTORED, batch)).all()


class Pair(NamedTuple):
    w: jax.Array
    rest: list


def test_like_gives_the_structure_back(tmp_path):
    params = Pair(jnp.ones((2, 3)), [jnp.zeros(4), FACTORED["up"]["kernel"]])
    save_tensors(tmp_path / "m.safetensors", params)
    dense = Pair(jnp.zeros((2, 3)), [jnp.zeros(4), jax.ShapeDtypeStruct((8, 9), jnp.float32)])
    same(load_tensors(tmp_path / "m.safetensors", like=dense), params)
    with pytest.raises(ExportError, match="differ at 'rest/1'"):
        load_tensors(tmp_path / "m.safetensors", like=Pair(dense.w, dense.rest[:1]))


def test_what_exists_is_kept_and_a_failed_export_leaves_nothing(tmp_path):
    file = tmp_path / "m.safetensors"
    for params, message in (
        ({"a": jnp.ones(2), "b": "gelu"}, "'b' is a str"),
        ({}, "hold no arrays"),
        ({"w": FACTORED["up"]["kernel"], "w/a": jnp.ones(2)}, "share the"),
    ):
        with pytest.raises(lk.LoraxError, match=message):
            save_tensors(file, params)
        assert list(tmp_path.iterdir()) == []
    file.write_bytes(b"mine")
    with pytest.raises(lk.AdapterError, match="exists"):
        save_tensors(file, PARAMS)
    with pytest.raises(ExportError):
        save_tensors(file, {"a": None, "b": "gelu"}, overwrite=True)
    assert file.read_bytes() == b"mine"
    save_tensors(file, PARAMS, overwrite=True)
    same(load_tensors(file), PARAMS)
    (tmp_path / "folder").mkdir()
    with pytest.raises(lk.AdapterError, match="is no such file"):
        save_tensors(tmp_path / "folder", PARAMS, overwrite=True)


def test_files_that_are_damaged_or_do_not_hold_what_they_say(tmp_path):
    file = tmp_path / "m.safetensors"
    save_tensors(file, FACTORED)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(lk.AdapterError, match="is damaged"):
        load_tensors(file)
    for metadata in ('{"w": {"kind": "LowRank", "shape": [2, 2], "dtype": "float32"}}', '{"w": 3}', "[", '{"w": {}}'):
        write_tensors(file, {"w/a": np.ones((1, 2), np.float32)}, {"lorax_kit.compact": metadata})
        with pytest.raises(ExportError, match="does not hold what its metadata say"):
            load_tensors(file)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    for params, message in (
        ({"__metadata__": jnp.ones(2)}, "keeps for itself"),
        ({"x": jnp.ones(2, jnp.float8_e4m3fn)}, "of dtype float8_e4m3fn"),
        ({"x": np.array(["a"])}, "cannot be stored"),
        ({"a": jnp.ones(2), "a/b": jnp.ones(2)}, "'a' is the name of an array"),
    ):
        with pytest.raises(ExportError, match=message):
            save_tensors(tmp_path / "x.safetensors", params)
    assert not list(tmp_path.iterdir())
    save_tensors(tmp_path / "x.safetensors", {"x": jnp.ones((2, 3))})
    with pytest.raises(ExportError, match=r"'x' is \(2, 3\) in .* and \(3, 2\) in `like`"):
        load_tensors(tmp_path / "x.safetensors", {"x": jnp.ones((3, 2))})


def test_a_file_of_0_1_with_a_linear_code_of_scales_is_read_as_what_it_meant(tmp_path):
    codes, scales = np.array([[127, -64]], np.int8), np.array([[200]], np.uint8)
    step, offset = np.float32(0.01).reshape(1, 1), np.float32(0.5).reshape(1, 1)
    stored = {"w:codes": codes, "w:scales": scales, "w:step": step, "w:offset": offset, "b": np.ones(2, np.float32)}
    static = '{"w": {"kind": "Quantised", "shape": [1, 2], "dtype": "float32", "method": "int8", "block": 2}}'
    write_tensors(tmp_path / "old.safetensors", stored, {"lorax_kit.compact": static})
    found = load_tensors(tmp_path / "old.safetensors")
    assert sorted(found) == ["b", "w"]
    np.testing.assert_allclose(found["w"].restore(), np.float32(2.5) * np.array([[1, -64 / 127]]), rtol=1e-6)
