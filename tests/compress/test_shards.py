"""Compression of a function that runs within shard_map: calibration sums over devices, products run in shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import lorax_kit as lk
from lorax_kit.compress import CompressError, LowRank, calibrate, compress, compressed, plan_ranks
from tests.draws import draw

MESH = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
PARAMS = {"table": draw(0, 9, 8), "up": draw(1, 8, 12), "down": draw(2, 12, 6), "layers": draw(3, 3, 6, 6)}
IDS = np.random.default_rng(0).integers(0, 9, (4, 5)).astype(np.int32)
ALL = dict.fromkeys(PARAMS, P())


def body(p, ids):
    x = jnp.tanh(p["table"][ids] @ p["up"]) @ p["down"]
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]


def mapped(fn=body, specs=None, **options):
    """The function over both devices of the data axis."""
    return jax.shard_map(fn, mesh=MESH, in_specs=(specs or ALL, P("data")), out_specs=P("data"), **options)


def two_layers(p, ids):
    return jnp.tanh(p["table"][ids] @ p["up"]) @ p["down"]


def outputs_over_devices(p, ids):
    """Tensor parallelism: each device has some outputs of `up`, and the rows of `down` that read them."""

    def one(p, ids):
        return jax.lax.psum(two_layers(p, ids), "model")

    specs = ALL | {"up": P(None, "model"), "down": P("model", None)}
    return mapped(one, specs)(p, ids)


def resolved(fn, names=tuple(PARAMS)):
    return lk.resolve(lk.Spec(dict.fromkeys(names, lk.LoRA(rank=2))), PARAMS, fn, IDS)


def test_calibration_within_shards_sums_what_one_device_would():
    fn = mapped()
    plan = resolved(body)
    ours = calibrate(fn, PARAMS, plan, [IDS, IDS[::-1]], loss=lambda y, _: jnp.sum(y**2), progress=False)
    wanted = calibrate(body, PARAMS, plan, [IDS, IDS[::-1]], loss=lambda y, _: jnp.sum(y**2), progress=False)
    assert ours["table"].counts.sum() == 2 * IDS.size
    for path in PARAMS:
        for name, x in wanted[path]._asdict().items():
            if x is not None:
                np.testing.assert_allclose(getattr(ours[path], name), x, rtol=2e-5, atol=1e-6, err_msg=f"{path} {name}")


def test_inputs_that_devices_share_count_once():
    found = calibrate(outputs_over_devices, PARAMS, resolved(body, ["up"]), [IDS], progress=False)["up"]
    rows = np.asarray(PARAMS["table"], np.float64)[IDS].reshape(-1, 8)
    assert found.tokens == IDS.size
    np.testing.assert_allclose(found.gram[0], rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_told_is_refused():
    with pytest.raises(CompressError, match="'down': a device of a shard_map holds a part of its inputs"):
        calibrate(outputs_over_devices, PARAMS, resolved(body, ["down"]), [IDS], progress=False)
    with pytest.raises(CompressError, match=r"shard_map\(check_vma=False\) does not tell along which axes"):
        calibrate(mapped(check_vma=False), PARAMS, resolved(body, ["up"]), [IDS], progress=False)
    with pytest.raises(CompressError, match=r"which of its .* count is not known"):
        calibrate(mapped(), PARAMS, resolved(body, ["up"]), [IDS], weight=np.ones_like, progress=False)


@pytest.mark.parametrize("fn", [mapped(), mapped(check_vma=False), outputs_over_devices], ids=["data", "old", "model"])
@pytest.mark.parametrize("bits", [None, "int8"])
def test_products_run_in_shards_and_equal_the_restored(fn, bits):
    names = [name for name in PARAMS if fn is not outputs_over_devices or name != "layers"]
    plan = resolved(body, [name for name in names if name != "table"])
    stats = calibrate(body, PARAMS, plan, [IDS], progress=False)
    small = compress(PARAMS, plan_ranks(PARAMS, plan, keep=0.6, stats=stats, allocation="uniform"), stats)
    if bits:
        small = lk.quantize(small, ["up/*"], bits)
    restored = {name: x.restore() if isinstance(x, LowRank) and not bits else x for name, x in small.items()}
    run = jax.jit(compressed(fn))
    found = run(small, IDS)
    if not bits:
        np.testing.assert_allclose(found, fn(restored, IDS), atol=2e-5)
    own = two_layers if fn is outputs_over_devices else body
    np.testing.assert_allclose(found, compressed(own)(small, IDS), atol=2e-5)
    if bits:  # scales of codes have no gradient of use
        return
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(run(s, IDS) ** 2), allow_int=True))(small)
    wanted = jax.jit(jax.grad(lambda s: jnp.sum(compressed(own)(s, IDS) ** 2), allow_int=True))(small)
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-3)
