"""What compression refuses: a table of bad arguments, each an error that names the thing in at most four lines."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.compress import (
    CompressError,
    CompressPlan,
    Moments,
    allocate,
    calibrate,
    compress,
    distillation,
    heal,
    plan_ranks,
    prune,
    solve,
    solve_by_gradient,
)
from lorax_kit.compress.decompose import damping
from tests.draws import draw

KEY = jax.random.key(0)
PARAMS = {"w": draw(0, 8, 6)}
X = draw(1, 10, 8)


def fn(p, x):
    return x @ p["w"]


SITES = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), PARAMS, fn, X)
SMALL = compress(PARAMS, CompressPlan(method="svd", sites=SITES, ranks={"w": 2}))
OTHER = {"w": Moments(tokens=1.0, gram=np.eye(5)[None], absolute=np.ones((1, 5)), fisher=np.ones((1, 5)))}
EMPTY = Moments(tokens=1.0)
TINY = np.full((1, 300), 1e-12)


def mean(y, x):
    return jnp.mean(y)


def healed(loss=mean, batches=None, key=KEY, steps=2, **options):
    stream = itertools.repeat(X) if batches is None else batches
    return heal(fn, SMALL, loss, stream, key, steps=steps, progress=False, **options)


def calibrated(fn=fn, params=PARAMS, sites=SITES, batches=(X,), **options):
    return calibrate(fn, params, sites, batches, progress=False, **options)


def pruned(**options):
    return prune(PARAMS, SITES, **{"keep": 0.5, **options})


def half():
    """Singular values above what the parameter's dtype holds."""
    params = {"w": jnp.full((300, 300), 6e4, jnp.float16)}
    sites = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1, inputs=(0,))}), params)
    compress(params, CompressPlan(method="asvd", sites=sites, ranks={"w": 1}), {"w": EMPTY._replace(absolute=TINY)})


def planned(stats, method="whitened"):
    return plan_ranks(PARAMS, SITES, keep=0.5, method=method, stats=stats)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve("abc", 1), "w is 'abc'; only real matrices"),
        (lambda: solve(None, 1), "w is None"),
        (lambda: solve(np.ones((3, 2), complex), 1), "dtype complex128; only real"),
        (lambda: jax.jit(lambda w: solve(w, 1).a)(jnp.ones((3, 2))), "w is traced"),
        (lambda: solve(np.ones((3, 2)), 0), "rank is 0; it must be an integer of at least 1"),
        (lambda: solve(np.ones((3, 2)), 1.0), "rank is 1.0"),
        (lambda: solve(np.ones((3, 2)), "1"), "rank is '1'"),
        (lambda: solve(np.ones((3, 2)), 1, "a", 1.0), "lam is 'a'; it must be a finite number of at least 0"),
        (lambda: solve(np.ones((3, 2)), 1, 1.0, None), "mu is None"),
        (lambda: solve(np.ones((3, 2)), 1, 1.0, 1j), "mu is 1j"),
        (lambda: solve(np.full((3, 2), 1e200), 1), "too large to be summed"),
        (lambda: solve_by_gradient(jnp.ones((3, 2)), 1, 1.0, 1.0, 7), "key is 7; it must be one random key"),
        (lambda: solve_by_gradient(jnp.ones((3, 2)), 1, 1.0, 1.0, KEY, steps=0), "steps is 0"),
        (lambda: solve_by_gradient([[1, 2]], 1, 1.0, 1.0, KEY, rate=0), "rate is 0; it must be a positive number"),
        (lambda: calibrated(fn="f"), "fn is 'f'; it must be a function"),
        (lambda: calibrated(loss=3), "loss is 3; it must be a function"),
        (lambda: calibrated(batches=None), "batches are None; give an iterable"),
        (lambda: calibrated(batches=X), r"an array of shape \(10, 8\)"),
        (lambda: calibrated(batches={"x": X}), r"for one batch: \[batch\]"),
        (lambda: calibrated(sites=["w"]), r"the sites are \['w'\]; they come from lk.resolve"),
        (lambda: calibrated(params={"w": "abc"}), "'w' is 'abc'; it must be an array"),
        (lambda: calibrated(loss=lambda y, x: None), "the loss returned None"),
        (lambda: calibrated(loss=lambda y, x: y), r"the loss has shape \(10, 6\)"),
        (lambda: jax.jit(lambda p: calibrated(params=p))(PARAMS), "the params are being traced"),
        (lambda: calibrated(batches=[X, X * jnp.nan]), "calibration data of 'w' are not finite"),
        (lambda: healed(loss=None), "loss is None; it must be a function"),
        (lambda: healed(loss=lambda y, x: None), "the loss returned None"),
        (lambda: healed(loss=lambda y, x: y), "must be a float scalar"),
        (lambda: healed(loss=lambda y, x: jnp.argmax(y)), "dtype int32; it must be a float scalar"),
        (lambda: healed(key=0), "key is 0"),
        (lambda: healed(key=jax.random.split(KEY)), "key is an array of shape"),
        (lambda: healed(batches=5), "batches are 5"),
        (lambda: healed(steps=2.5), "steps is 2.5"),
        (lambda: healed(rank=0), "rank is 0"),
        (lambda: healed(rounds="two"), "rounds is 'two'"),
        (lambda: healed(lr="fast"), "lr is 'fast'"),
        (lambda: healed(lr=0.0), "lr is 0"),
        (lambda: jax.jit(lambda p: heal(fn, p, mean, [X], KEY, steps=2))(SMALL), "the params are being traced"),
        (lambda: healed(full=None), "full is None; it must be patterns"),
        (lambda: healed(distillation(lambda x: [1.0], mean)), r"teacher\(batch\) is \[1.0\]; it must be an array"),
        (lambda: healed(distillation(lambda x: x[:, :6], mean, weight=lambda x: 1)), r"weight\(batch\) is 1"),
        (lambda: heal(fn, "params", mean, [X], KEY, steps=2), "no parameter is low-rank"),
        (lambda: distillation(mean, None), "loss is None"),
        (lambda: distillation(mean, mean, share="half"), "share is 'half'"),
        (lambda: pruned(keep="half"), "keep is 'half'"),
        (lambda: pruned(keep=float("nan")), r"keep is nan; it must lie in \(0, 1\]"),
        (lambda: pruned(method=None), "pruning method None is unknown"),
        (lambda: pruned(stats="stats"), "stats are 'stats'; they must be what"),
        (lambda: pruned(stats={"w": 3}), "the stats of 'w' are 3"),
        (lambda: pruned(stats={"w": EMPTY}), "lack what 'wanda' needs"),
        (lambda: pruned(stats=OTHER), r"'w' are of \(stacked, inputs\) \(1, 5\), the parameter \(8, 6\) has \(1, 8\)"),
        (lambda: prune(PARAMS, None, keep=0.5), "the sites are None"),
        (lambda: planned(OTHER), r"of 'w' have 5 inputs, its matrix \(8, 6\) has 8"),
        (lambda: planned(OTHER, "asvd"), "'w' have 5 inputs"),
        (lambda: planned(OTHER, "fisher"), "'w' have 5 inputs"),
        (lambda: planned({"w": Moments(tokens=1.0, fisher=np.zeros((1, 8)))}, "fisher"), "all gradients of 'w'"),
        (lambda: planned({"w": Moments(tokens=1.0, absolute=np.zeros((0, 8)))}, "asvd"), "of 0 stacked matrices"),
        (half, "factors of 'w' do not fit into float16"),
        (lambda: allocate({}, 0.5), "no candidates"),
        (lambda: allocate({}, "half"), "keep is 'half'"),
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_says_what_is_wrong(call, message):
    with pytest.raises(CompressError, match=message) as e:
        call()
    assert len(str(e.value).splitlines()) <= 4


def test_numbers_and_old_keys_are_taken_as_they_come():
    assert solve(np.ones((3, 2)), np.int64(1), np.float32(0.1), jnp.float32(0.1)).objective > 0
    assert lk.paths(healed_with_an_old_key()) == lk.paths(SMALL)


def healed_with_an_old_key():
    with jax.numpy_dtype_promotion("standard"):
        return healed(key=jax.random.PRNGKey(0))


def test_damping_tells_where_the_data_are_singular():
    few = calibrated(batches=[X[:3]])  # three inputs for eight dimensions
    assert damping(few)["w"] >= 1e-6
    assert damping(calibrated()) == {"w": 1e-6}
    rows = {"t": Moments(tokens=3.0, counts=np.ones(4))}
    assert damping(rows) == {"t": 0.0}
    indefinite = {"w": Moments(tokens=1.0, gram=np.diag([1.0, 1.0, -1e-4])[None])}
    assert damping(indefinite)["w"] == pytest.approx(1e-3)
