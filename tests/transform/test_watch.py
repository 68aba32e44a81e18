"""`watch`: a function shows what its parameters are multiplied with, and returns what it returned."""

import jax
import jax.numpy as jnp
import numpy as np

import lorax_kit as lk
from lorax_kit.transform import watch
from tests.draws import draw


def test_shows_every_use_and_why_it_cannot_show_the_others():
    params, x = {"w": draw(0, 6, 6), "table": draw(1, 7, 6)}, draw(2, 5, 6)
    ids = jnp.asarray([1, 4])

    def fn(p, x, ids):
        return jnp.tanh(x @ p["w"]) @ p["w"][::-1], p["table"][ids] @ p["w"]

    plan = lk.resolve(lk.Spec({"*": lk.LoRA(rank=1)}), params, lambda p, x, i: (x @ p["w"], p["table"][i]), x, ids)
    seen, missed = [], []

    def sink(site, given):
        seen.append((site, given.inputs, given.layer))

    run = watch(fn, plan, sink, lambda site, why: missed.append((site.path, why)))
    out = run(params, x, ids)
    for mine, theirs in zip(out, fn(params, x, ids), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert [(site.path, given.shape, layer) for site, given, layer in seen] == [
        ("w", (5, 6), None),
        ("table", (2,), None),
        ("w", (2, 6), None),
    ]
    np.testing.assert_array_equal(seen[0][1], x)
    np.testing.assert_array_equal(seen[1][1], ids)
    np.testing.assert_array_equal(seen[2][1], params["table"][ids])
    assert missed == [("w", "it goes through 'rev' before it is multiplied")]


def test_inputs_within_a_scan_leave_through_a_callback_with_their_layer():
    params, x = {"w": 0.4 * draw(0, 3, 4, 4)}, draw(1, 5, 4)
    fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]  # noqa: E731
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params, fn, x)
    sums = {}

    def sink(site, given):
        jax.debug.callback(lambda n, s: sums.__setitem__(int(n), float(s)), given.layer, jnp.sum(given.inputs))

    jax.block_until_ready(jax.jit(watch(fn, plan, sink))(params, x))
    jax.effects_barrier()
    h, want = x, {}
    for i in range(3):
        want[i] = float(jnp.sum(h))
        h = jnp.tanh(h @ params["w"][i])
    assert sums.keys() == want.keys()
    np.testing.assert_allclose([sums[i] for i in range(3)], [want[i] for i in range(3)], rtol=1e-5, atol=1e-5)
