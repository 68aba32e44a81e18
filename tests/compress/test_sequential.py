"""Compression in turn: each group is best for the inputs that the compressed groups before it give."""

import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.compress import CompressError, CompressPlan, calibrate, compress, compress_sequentially
from tests.draws import draw


def fn(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


@pytest.fixture(scope="module")
def model():
    params, batches = {"up": draw(0, 12, 20) / 2, "down": draw(1, 20, 9)}, list(draw(2, 3, 40, 12))
    sites = lk.resolve(lk.Spec({"*": lk.LoRA(rank=1)}), params, fn, batches[0])
    return params, batches, CompressPlan(method="whitened", sites=sites, ranks={"up": 3, "down": 4})


def test_the_second_group_is_best_for_the_inputs_it_gets(model):
    params, batches, plan = model
    stats = calibrate(fn, params, plan.sites, batches, progress=False)
    at_once = compress(params, plan, stats)
    in_turn = compress_sequentially(fn, params, plan, batches, ["up", "down"], progress=False)
    np.testing.assert_allclose(in_turn["up"].restore(), at_once["up"].restore(), atol=1e-5)
    given = jnp.tanh(jnp.concatenate(batches) @ at_once["up"].restore())

    def error(small):
        return float(jnp.sum((given @ (params["down"] - small["down"].restore())) ** 2))

    # The least error of rank 4, by an independent formula.
    s = np.linalg.svd(np.asarray(given @ params["down"], np.float64), compute_uv=False)
    assert error(in_turn) == pytest.approx(np.sum(s[4:] ** 2), rel=1e-3)
    assert error(in_turn) < 0.98 * error(at_once)


def test_what_stays_dense_is_shared(model):
    params, batches, plan = model
    only = CompressPlan(method="whitened", sites=plan.sites, ranks={"down": 2})
    small = compress_sequentially(fn, params, only, batches, ["up", "down"], progress=False)
    assert small["up"] is params["up"]
    assert small["down"].rank == 2


def test_groups_must_hold_every_site_once(model):
    params, batches, plan = model
    for groups, message in (
        (["up"], "'down' is in no group"),
        (["up", "*"], "'up' is in 2 groups, first 'up' and '\\*'"),
        (["up", "down", "left"], "'left' holds none"),
    ):
        with pytest.raises(CompressError, match=message):
            compress_sequentially(fn, params, plan, batches, groups, progress=False)
    with pytest.raises(CompressError, match="no calibration batches"):
        compress_sequentially(fn, params, plan, [], ["up", "down"], progress=False)


def test_padding_counts_in_no_group(model):
    """Padded batches with weights are compressed as those without padding are."""
    params, batches, plan = model
    padded = [{"x": jnp.pad(x, [(0, 24), (0, 0)], constant_values=3), "mask": np.arange(64) < 40} for x in batches]
    whole = lambda p, batch: fn(p, batch["x"])  # noqa: E731
    ours = compress_sequentially(whole, params, plan, padded, ["up", "down"], weight="mask", progress=False)
    theirs = compress_sequentially(fn, params, plan, batches, ["up", "down"], progress=False)
    for path in ("up", "down"):
        np.testing.assert_allclose(ours[path].restore(), theirs[path].restore(), atol=1e-4)
