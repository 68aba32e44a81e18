"""HRA: a product of reflections, the identity at the start, in W's own form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.core.method import update_of
from lorax_kit.methods import HRALeaves
from tests.draws import draw, moved_leaves
from tests.methods import promises

STACKED = {"u": 1}


def formula(w, leaves, scale):
    """The reflections one after the other, row 0 first; a zero row reflects nothing."""
    assert scale == 1
    for u in leaves["u"]:
        if np.any(u):
            w = w - 2 * np.outer(u, u @ w) / (u @ u)
    return w


def test_the_update_is_the_product_of_reflections():
    promises.check_formula(lk.HRA(rank=4), formula, STACKED)


@pytest.mark.parametrize("rows", [(2,), (1,), (2, 3), (0, 3)])
def test_zero_rows_reflect_nothing(rows):
    def zeros(leaves):
        return leaves._replace(u=leaves.u.at[np.array(rows)].set(0))

    promises.check_formula(lk.HRA(rank=4), formula, STACKED, zeros)


def test_opposite_and_unequal_vectors():
    def scaled(leaves):
        u = leaves.u.at[1].set(-leaves.u[0])  # H_u H_-u = I
        return leaves._replace(u=u.at[2].multiply(1e-5).at[3].multiply(1e5))

    promises.check_formula(lk.HRA(rank=4), formula, STACKED, scaled)


def test_near_the_start_the_update_keeps_its_digits():
    """Unit vectors that differ by 1e-6: subtracting rounded ones would leave one digit of the update."""
    params = {"w": draw(0, 8, 6)}
    plan = lk.resolve(lk.Spec({"w": lk.HRA(rank=2)}), params)
    u = lk.split(params, plan, jax.random.key(0))[1]["w"].u.at[1].add(1e-6 * draw(1, 8))
    update = jax.jit(lambda w, u: update_of(plan.sites[0], w, HRALeaves(u), 1.0))(params["w"], u)
    got = np.einsum("ri,ro->io", np.asarray(update.a, np.float64), np.asarray(update.b, np.float64))
    w = np.asarray(params["w"], np.float64)
    want = formula(w, {"u": np.asarray(u, np.float64)}, 1) - w
    assert 1e-6 < np.abs(want).max() < 1e-4
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_angles_and_lengths_of_columns_stay():
    plan, params, factors = promises.prepared(lk.HRA(rank=4))
    merged = jax.jit(lambda b, f: lk.merge(b, f, plan))(params, moved_leaves(plan, factors))
    for site in plan.sites:
        before, after = (np.asarray(site.matrices(p[site.path]), np.float64) for p in (params, merged))
        assert np.abs(after - before).max() > 0.1
        grams = [np.einsum("sio,sip->sop", x, x) for x in (before, after)]
        np.testing.assert_allclose(grams[1], grams[0], rtol=1e-5, atol=1e-5)


def test_zero_rows_have_no_gradient():
    params = {"w": draw(0, 8, 6)}
    plan = lk.resolve(lk.Spec({"w": lk.HRA(rank=4)}), params)
    for zeros in ((2, 3), (1,)):
        f = {"w": HRALeaves(draw(1, 4, 8).at[np.array(zeros)].set(0))}
        g = np.asarray(jax.jit(jax.grad(lambda f: jnp.sum(jnp.sin(lk.merge(params, f, plan)["w"]))))(f)["w"].u)
        assert np.isfinite(g).all()
        assert not np.any(g[list(zeros)])
        assert np.abs(g[0]).max() > 1e-3


def test_the_first_rows_of_a_larger_rank_are_the_smaller_ranks_draw():
    params = {"w": draw(0, 8, 6)}
    rows = []
    for rank in (2, 6):
        plan = lk.resolve(lk.Spec({"w": lk.HRA(rank=rank)}), params)
        rows.append(np.asarray(lk.split(params, plan, jax.random.key(0))[1]["w"].u))
    np.testing.assert_array_equal(rows[1][:2], rows[0])
    np.testing.assert_array_equal(rows[1][::2], rows[1][1::2])
    assert np.abs(rows[1]).max() <= 8**-0.5
    assert np.abs(rows[1][0] - rows[1][2]).max() > 0.01


def test_trials_of_different_rank_stack(standard_promotion):
    promises.check_stacking(variant="hra", alpha=None, rank=[2, 4], weight_decay=0.1)


def test_dtypes():
    promises.check_bfloat16(lk.HRA(rank=4))


def test_ranks_up_to_the_inputs():
    params = {"w": jnp.ones((5, 9))}
    with pytest.raises(lk.PlanError) as e:
        lk.resolve(lk.Spec({"w": lk.HRA(rank=6)}), params)
    assert str(e.value).startswith("rank 6 at 'w' is above 4, the most that hra can hold there (in (5,), out (9,)).")
    assert lk.resolve(lk.Spec({"w": lk.HRA(rank=6)}, cap_ranks=True), params).site("w").rank == 4


def test_bad_settings():
    odd = "rank is {}; HRA needs an even number of reflections, which start in pairs that cancel.\n  give {}"
    promises.check_refused(
        lk.HRA,
        [
            ({"rank": 1}, odd.format(1, "rank=2")),
            ({"rank": 7}, odd.format(7, "rank=6 or rank=8")),
            ({"rank": 0}, f"rank is 0; {promises.RANK}"),
        ],
    )
