"""AdaLoRA: triplets of a singular value and its vectors, and the penalty that keeps the vectors orthonormal."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.methods import AdaLoRALeaves
from tests.draws import draw, moved_leaves
from tests.methods import promises


def test_the_update_is_the_papers_at_pefts_scale():
    def formula(w, leaves, scale):
        assert scale == 6 / (4 + 1e-5)
        e = (leaves["e"] * leaves["mask"]).ravel()
        return w + scale * (leaves["a"].T * e) @ leaves["b"]

    def masked(leaves):
        return leaves._replace(mask=leaves.mask.at[(1, 2)[: leaves.mask.ndim]].set(0).at[3].set(0))

    promises.check_formula(lk.AdaLoRA(rank=4, alpha=6), formula, dict.fromkeys(("a", "e", "b", "mask"), 1), masked)
    assert lk.AdaLoRA(rank=4).scale == 4 / (4 + 1e-5)


def test_draws_are_pefts_and_nest():
    params = {"w": jnp.ones((64, 48))}
    first, more = (
        lk.split(params, lk.resolve(lk.Spec({"w": lk.AdaLoRA(rank=r)}), params), jax.random.key(0))[1]["w"]
        for r in (3, 40)
    )
    for name in ("a", "b"):
        x = np.asarray(getattr(more, name))
        np.testing.assert_array_equal(x[:3], getattr(first, name))
        assert x.std() == pytest.approx(0.02, rel=0.07)
    assert abs(np.corrcoef(np.asarray(more.a)[:, :48].ravel(), np.asarray(more.b).ravel())[0, 1]) < 0.1
    assert not np.any(more.e)
    np.testing.assert_array_equal(more.mask, np.ones(40))


def test_the_penalty_is_the_papers():
    plan, _, factors = promises.prepared(lk.AdaLoRA(rank=4, orthogonal=0.3))
    factors, want = moved_leaves(plan, factors), 0.0
    for site in plan.sites:
        f = factors[site.path]
        for x in (f.a.reshape(4, -1, prod(site.in_shape)), f.b.reshape(4, -1, prod(site.out_shape))):
            p = np.asarray(x, np.float64)
            want += 0.3 * np.sum((np.einsum("rsi,qsi->srq", p, p) - np.eye(4)) ** 2)
    assert float(lk.penalty(plan, factors)) == pytest.approx(want, rel=1e-5)
    none, _, _ = promises.prepared(lk.AdaLoRA(rank=4, orthogonal=0))
    assert float(lk.penalty(none, factors)) == 0


def test_the_penalty_leaves_zero_rows_out():
    params = {"w": jnp.ones((8, 6))}
    two, four = (lk.resolve(lk.Spec({"w": lk.AdaLoRA(rank=r)}), params) for r in (2, 4))
    small = AdaLoRALeaves(draw(0, 2, 8), draw(1, 2), draw(2, 2, 6), jnp.ones(2))
    large = jax.tree.map(lambda x: jnp.pad(x, [(0, 2)] + [(0, 0)] * (x.ndim - 1)), small)
    few, many = (float(lk.penalty(plan, {"w": f})) for plan, f in ((two, small), (four, large)))
    assert many == pytest.approx(few, rel=1e-6)
    grads = jax.grad(lambda f: lk.penalty(four, {"w": f}))(large)
    for x in (grads.a, grads.b):
        assert not np.any(x[2:])
        assert np.all(np.any(np.asarray(x[:2]), axis=1))


def test_trials_of_different_rank_stack(standard_promotion):
    """With the penalty, which the study adds to the loss."""
    promises.check_stacking(variant="adalora", weight_decay=0.1)


def test_dtypes():
    promises.check_bfloat16(lk.AdaLoRA(rank=3))


def test_bad_settings():
    promises.check_refused(
        lk.AdaLoRA,
        [
            ({"rank": 2, "alpha": 0}, "alpha is 0; it must be a positive number of float32's range."),
            ({"rank": 2, "alpha": "8"}, "alpha is '8'; it must be a positive number of float32's range."),
            ({"rank": 2, "orthogonal": -1}, "orthogonal is -1; it must be a number of at least 0, of float32's range."),
            (
                {"rank": 2, "orthogonal": None},
                "orthogonal is None; it must be a number of at least 0, of float32's range.",
            ),
        ],
    )
