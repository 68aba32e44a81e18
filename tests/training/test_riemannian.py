"""Riemannian preconditioning: the paper's formula, its invariance, and zero rows that stay zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from tests.draws import draw, moved

PARAMS = {"w": draw(0, 6, 5), "experts": draw(1, 3, 4, 6), "dora": draw(2, 6, 5), "vera": draw(3, 6, 5)}
SPEC = lk.Spec({"{w,experts}": lk.LoRA(rank=3), "dora": lk.DoRA(rank=3), "vera": lk.VeRA(rank=3)})
DELTA = 1e-3


def fn(p, x):
    return x @ p["w"] + x @ p["dora"] + x @ p["vera"], jnp.einsum("end,edh->enh", jnp.ones((3, 2, 4)), p["experts"])


def prepared(spec=SPEC):
    plan = lk.resolve(spec, PARAMS, fn, jnp.ones((2, 6)))
    return plan, moved(lk.split(PARAMS, plan, jax.random.key(0))[1])


def draws_like(tree, seed=5):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def formula(a, b, da, db):
    """One matrix in float64: (r, in), (r, out) and their gradients."""
    a, b, da, db = (np.asarray(x, np.float64) for x in (a, b, da, db))
    eye = DELTA * np.eye(len(a))
    return np.linalg.solve(b @ b.T + eye, da), np.linalg.solve(a @ a.T + eye, db)


def test_the_gradients_are_the_papers():
    plan, factors = prepared()
    grads = draws_like(factors)
    tx = lk.riemannian(plan, delta=DELTA)
    got, _ = jax.jit(tx.update)(grads, tx.init(factors), factors)
    for path in ("w", "dora"):
        f, g = factors[path], grads[path]
        for x, want in zip((got[path].a, got[path].b), formula(f.a, f.b, g.a, g.b), strict=True):
            np.testing.assert_allclose(x, want, rtol=1e-3, atol=1e-4)
    for s in range(3):
        f, g, mine = factors["experts"], grads["experts"], got["experts"]
        wants = formula(f.a[:, s], f.b[:, s], g.a[:, s], g.b[:, s])
        for x, want in zip((mine.a[:, s], mine.b[:, s]), wants, strict=True):
            np.testing.assert_allclose(x, want, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(got["dora"].magnitude, grads["dora"].magnitude)
    np.testing.assert_array_equal(got["vera"].v, grads["vera"].v)


def test_a_step_does_not_depend_on_how_the_factors_share_the_update():
    """(c A)^T (B / c) for c = 1 and 10: the same update, and by SGD the same change of it."""
    plan, factors = prepared(lk.Spec({"w": lk.LoRA(rank=3)}))
    x = draw(7, 4, 6)
    adapted, tx = lk.adapt(lambda p, x: jnp.sum(jnp.sin(x @ p["w"])), plan), lk.riemannian(plan, delta=1e-9)

    @jax.jit
    def change(factors):
        grads = jax.grad(lambda f: adapted(PARAMS, f, x))(factors)
        updates, _ = tx.update(grads, tx.init(factors), factors)
        f, u = factors["w"], updates["w"]
        return f.a.T @ u.b + u.a.T @ f.b  # to first order in the rate

    one = factors
    other = {"w": one["w"]._replace(a=10 * one["w"].a, b=one["w"].b / 10)}
    want = change(one)
    np.testing.assert_allclose(change(other), want, atol=2e-3 * float(jnp.abs(want).max()))


def test_zero_rows_stay_zero_and_a_zero_factor_gives_no_nan():
    """A rank-2 trial in a stack of rank 3, one with B = 0, one that leaves the site out; trained by scaled AdamW."""
    plan, factors = prepared(lk.Spec({"w": lk.LoRA(rank=3)}))
    one = factors["w"]
    keep = jnp.asarray([[1.0, 1, 0], [1, 1, 1], [0, 0, 0]])
    a, b = (jnp.einsum("tr,rn->trn", keep, x) for x in (one.a, one.b))
    b = b.at[1].set(0)
    x = draw(7, 4, 6)
    adapted = lk.adapt(lambda p, x: jnp.sum(jnp.sin(x @ p["w"])), plan)
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.chain(lk.riemannian(plan), lk.partition(optax.adamw(1e-2, weight_decay=0.1), plan))

        def trained(a, b):
            f = {"w": one._replace(a=a, b=b)}
            state = tx.init(f)
            for _ in range(3):
                updates, state = tx.update(jax.grad(lambda f: adapted(PARAMS, f, x))(f), state, f)
                f = optax.apply_updates(f, updates)
            return f["w"].a, f["w"].b

        new = jax.jit(jax.vmap(trained))(a, b)
    for got, old in zip(new, (a, b), strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got[keep == 0], 0)
        assert float(jnp.abs(got - old)[:2, :2].max()) > 1e-3


def test_a_frozen_factor_still_preconditions_the_other():
    plan, factors = prepared(lk.Spec({"w": lk.LoRA(rank=3, freeze_a=True)}))
    grads = draws_like(factors)
    grads = {"w": grads["w"]._replace(a=jnp.zeros((3, 6)))}
    tx = optax.chain(lk.riemannian(plan, delta=DELTA), lk.partition(optax.sgd(1.0), plan))
    got, _ = tx.update(grads, tx.init(factors), factors)
    f, g = factors["w"], grads["w"]
    np.testing.assert_allclose(-got["w"].b, formula(f.a, f.b, g.a, g.b)[1], rtol=1e-3, atol=1e-4)
    assert not np.any(got["w"].a)


def test_what_it_refuses():
    plan, factors = prepared(lk.Spec({"w": lk.LoRA(rank=3, freeze_a=True)}))
    hidden = lk.partition(lk.riemannian(plan), plan)
    with pytest.raises(lk.PlanError) as e:
        hidden.update(factors, hidden.init(factors), factors)
    assert str(e.value) == (
        "a partition hides factors of 'w' from riemannian.\n"
        "  chain it before: optax.chain(lk.riemannian(plan), lk.partition(tx, plan))"
    )
    tx = lk.riemannian(plan)
    with pytest.raises(lk.PlanError) as e:
        tx.update(factors, tx.init(factors))
    assert str(e.value) == "riemannian needs the factors: tx.update(grads, state, factors)."
    for delta in (0, -1.0, True, "1e-6", float("nan")):
        with pytest.raises(lk.PlanError) as e:
            lk.riemannian(plan, delta=delta)
        assert str(e.value) == f"delta is {delta!r}; it must be a positive number."
    with pytest.raises(lk.PlanError) as e:
        lk.riemannian(prepared(lk.Spec({"w": lk.VeRA(rank=3), "vera": lk.LoHa(rank=2)}))[0])
    assert str(e.value) == "the plan has no site with two factors to precondition; its methods: loha, vera."
