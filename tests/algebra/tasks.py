"""A small model of every layout, adapters of it drawn by numpy, and the formulas of their deltas in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import lorax_kit as lk
from lorax_kit.core.method import METHODS, leaf_shapes, update_of

LOW = ("flat", "heads", "layers")


def params(seed=100, dtype=jnp.float32):
    """A matrix, a kernel of heads (in, heads, size), stacked layers (layer, in, out), and a bias."""
    rng = np.random.default_rng(seed)
    shapes = {"bias": (5,), "flat": (6, 5), "heads": (5, 2, 3), "layers": (3, 6, 6), "rest": (6,)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def fn(p, x):
    """(rows, tokens, 6) -> the same."""
    y = x @ p["flat"] + p["bias"].reshape(1, 1, 5)
    y = jnp.tanh(jnp.einsum("nti,ihd->nthd", y, p["heads"]).reshape(*x.shape))
    y, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), y, p["layers"])
    return y * p["rest"].reshape(1, 1, 6)


def inputs(rows=2, tokens=3, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).normal(size=(rows, tokens, 6)), dtype)


_PLANS: dict = {}


def plan_of(setting, full=False, sites=LOW, dtype=jnp.float32):
    """Of one setting at every site; traced once."""
    key = setting, full, sites, jnp.dtype(dtype).name
    if key not in _PLANS:
        rules = {f"{{{','.join(sites)}}}": setting} | ({"bias": lk.Full()} if full else {})
        _PLANS[key] = lk.resolve(lk.Spec(rules), params(dtype=dtype), fn, inputs(dtype=dtype))
    return _PLANS[key]


def adapter(seed, setting=None, full=False, sites=LOW, dtype=jnp.float32):
    """Every leaf drawn from N(0, 0.09), of gains 1 more; leaves of integers are zero."""
    setting = lk.LoRA(rank=2, alpha=3) if setting is None else setting
    plan = plan_of(setting, full, sites, dtype)
    rng = np.random.default_rng(seed)
    factors = {}
    for site in plan.sites:
        gains = METHODS[site.setting.kind].gains
        leaves = {}
        for name, s in leaf_shapes(site)._asdict().items():
            if s is None or not jnp.issubdtype(s.dtype, jnp.floating):
                leaves[name] = s if s is None else jnp.zeros(s.shape, s.dtype)
                continue
            wanted = dtype if dtype == jnp.float64 else s.dtype
            leaves[name] = jnp.asarray(0.3 * rng.normal(size=s.shape) + (name in gains), wanted)
        factors[site.path] = METHODS[site.setting.kind].leaves(**leaves)
    for leaf in plan.full:
        factors[leaf.path] = lk.FullLeaf(jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype))
    return lk.algebra.Adaptation(plan, factors)


def settings():
    """One setting of each registered method."""
    out = {}
    for kind, method in METHODS.items():
        if kind == "rows":  # no rank, and rows that must be named
            out[kind] = method.setting(rows=(0, 1))
            continue
        ranked = "rank" in method.setting.__dataclass_fields__
        out[kind] = method.setting(rank=2) if ranked else method.setting()
    return out


def dense(one, base):
    """Path -> delta in the parameter's layout, float64: the normal form by numpy, W' - W; value - base in full."""
    out = {}
    for site in one.plan.sites:
        w = np.asarray(base[site.path], np.float64)
        update = update_of(site, base[site.path], one.factors[site.path], site.scale)
        axes = site.axes
        letters = "abcdefgh"
        ins, outs = ("".join(letters[i] for i in (*axes.stack, *own)) for own in (axes.inputs, axes.outputs))
        every = letters[: w.ndim]
        total = w
        if update.a is not None:
            a, b = (np.asarray(x, np.float64) for x in (update.a, update.b))
            total = total + site.scale * np.einsum(f"z{ins},z{outs}->{every}", a, b)
        for gain, own in ((update.out_gain, outs), (update.in_gain, ins)):
            if gain is not None:
                total = np.einsum(f"{every},{own}->{every}", total, np.asarray(gain, np.float64))
        out[site.path] = total - w
    for leaf in one.plan.full:
        out[leaf.path] = np.asarray(one.factors[leaf.path].value, np.float64) - np.asarray(base[leaf.path], np.float64)
    return out


def matrices(site, delta):
    """(*stack, in, out) flattened to (S, K, N)."""
    axes = site.axes
    order = (*axes.stack, *axes.inputs, *axes.outputs)
    s, k, n = (int(np.prod(x)) for x in (site.stack_shape, site.in_shape, site.out_shape))
    return np.transpose(delta, order).reshape(s, k, n)


def truncated(site, delta, rank):
    """The best approximation of each stacked matrix, back in the parameter's layout, and the relative error of all."""
    u, s, vt = np.linalg.svd(matrices(site, delta), full_matrices=False)
    cut = (u[..., :rank] * s[:, None, :rank]) @ vt[:, :rank]
    axes = site.axes
    order = (*axes.stack, *axes.inputs, *axes.outputs)
    shaped = cut.reshape(tuple(delta.shape[i] for i in order))
    return np.transpose(shaped, np.argsort(order)), float(np.sqrt(np.sum(s[:, rank:] ** 2) / np.sum(s**2)))


def close(one, base, wanted, tolerance=1e-5):
    """Assert that an adapter's deltas are those wanted, to a share of their largest entry."""
    found = dense(one, base)
    assert set(found) == set(wanted)
    for path, delta in wanted.items():
        scale = max(np.abs(delta).max(), 1e-30)
        np.testing.assert_allclose(found[path] / scale, delta / scale, rtol=0, atol=tolerance, err_msg=path)
