"""Embeddings looked up, tied, transposed, and under magnitudes: the same numbers as the merged table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax

import lorax_kit as lk
from tests.draws import draw

TABLE = draw(0, 7, 5)
IDS = jnp.asarray([[0, 3, 6], [3, 3, 1]])
X = draw(1, 4, 5)

USES = {
    "rows": lambda p, x: p["table"][IDS],
    "rows, then the tied head": lambda p, x: p["table"][IDS] @ p["table"].T,
    "the head, then rows": lambda p, x: (x @ p["table"].T, p["table"][IDS]),
    "columns of the transposed table": lambda p, x: p["table"].T[:, IDS],
    "clipped": lambda p, x: jnp.take(p["table"], IDS + 5, axis=0, mode="clip"),
    "by vmap": lambda p, x: jax.vmap(lambda i: p["table"][i])(IDS[0] + 3),  # a dynamic_slice, which clips
    "by vmap of vmap": lambda p, x: jax.vmap(jax.vmap(lambda i: p["table"][i]))(IDS),
    "by vmap, an axis kept": lambda p, x: jax.vmap(lambda i: lax.dynamic_index_in_dim(p["table"], i, 0))(IDS[0]),
    "by vmap along the second axis": lambda p, x: jax.vmap(lambda i: p["table"].T[:, i], out_axes=1)(IDS[0]),
    "by vmap, then the tied head": lambda p, x: jax.vmap(lambda i: p["table"][i])(IDS[0]) @ p["table"].T,
    "filled by vmap": lambda p, x: jax.vmap(lambda i: jnp.take(p["table"], i, axis=0, fill_value=2.0))(IDS[0] + 5),
    "filled with NaN": lambda p, x: jnp.nan_to_num(jnp.take(p["table"], IDS + 5, axis=0)),
    "filled": lambda p, x: jnp.take(p["table"], IDS + 5, axis=0, mode="fill", fill_value=2.0),
    "scalars": lambda p, x: p["table"][IDS, IDS % 5] + (x @ p["table"].T).sum(),
}


@pytest.mark.parametrize("method", [lk.LoRA, lk.DoRA])
@pytest.mark.parametrize("use", USES)
def test_lookups_equal_the_merged_table_with_gradients(use, method):
    fn, params = USES[use], {"table": TABLE}
    plan = lk.resolve(lk.Spec({"table": method(rank=2, alpha=3)}), params, fn, X)
    base, start = lk.split(params, plan, jax.random.key(2))
    f = start["table"]
    factors = {"table": f._replace(a=f.a + draw(3, *f.a.shape), b=f.b + draw(4, *f.b.shape))}
    adapted = lk.adapt(fn, plan)
    ours, theirs = adapted(base, factors, X), fn(lk.merge(base, factors, plan), X)
    for y, z in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(y, z, atol=1e-5 * float(jnp.abs(z).max()))

    def loss(outputs):
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(outputs))

    ours = jax.grad(lambda f: loss(adapted(base, f, X)))(factors)["table"]
    if method is lk.LoRA:  # DoRA detaches its norm, which merge does not
        theirs = jax.grad(lambda f: loss(fn(lk.merge(base, f, plan), X)))(factors)["table"]
        for g, h in ((ours.a, theirs.a), (ours.b, theirs.b)):
            np.testing.assert_allclose(g, h, atol=3e-5 * float(jnp.abs(h).max()))  # a sine of numbers near 100
    assert float(jnp.abs(ours.a).max()) > 0
    assert float(jnp.abs(ours.b).max()) > 0


def test_only_the_rows_looked_up_are_multiplied():
    params = {"table": jnp.ones((50_000, 8))}
    fn = USES["rows"]
    plan = lk.resolve(lk.Spec({"table": lk.LoRA(rank=4)}), params, fn, X)
    base, factors = lk.split(params, plan, jax.random.key(0))
    cost = jax.jit(lk.adapt(fn, plan)).lower(base, factors, X).compile().cost_analysis()
    # 6 rows x 2 x rank 4 x 8 wide, the scaling and the sum; the whole delta would take 3.2 million.
    assert cost["flops"] < 1000
    row = lk.explain(lk.adapt(fn, plan), base, factors, X).rows[0]
    assert (row.how, row.primitive) == ("lookup", "gather")


EMBED = linen.Embed(20_000, 16)
OF_LARGE_TABLES = {
    "indexed": lambda p, ids: p["embedding"][ids],
    "by vmap": lambda p, ids: jax.vmap(lambda i: p["embedding"][i])(ids),
    "Flax": lambda p, ids: EMBED.apply({"params": p}, ids),
}


@pytest.mark.parametrize("method", [lk.LoRA, lk.DoRA])
@pytest.mark.parametrize("use", OF_LARGE_TABLES)
def test_no_table_is_materialised(use, method):
    """Neither the sum nor, for magnitudes, another copy: temporaries of a step are those of the rows and of A."""
    fn, params, ids = OF_LARGE_TABLES[use], {"embedding": jnp.ones((20_000, 16))}, jnp.arange(6)
    plan = lk.resolve(lk.Spec({"embedding": method(rank=2)}), params, fn, ids)
    base, factors = lk.split(params, plan, jax.random.key(0))
    step = jax.jit(jax.grad(lambda f, base: jnp.sum(lk.adapt(fn, plan)(base, f, ids) ** 2)))
    temporary = step.lower(factors, base).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 0.3 * 20_000 * 16 * 4
    assert lk.explain(lk.adapt(fn, plan), base, factors, ids).rows[0].how == "lookup"
