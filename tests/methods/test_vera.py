"""VeRA: the paper's equation, draws that sites share, and any rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.checkpoint.adapter import read_document
from tests.methods import promises

RANK = 9  # above min(in, out) of every site


SETTING = lk.VeRA(rank=RANK)


def formula(w, f, scale):
    assert scale == 1
    return w + f["a"].T @ np.diag(f["d"]) @ f["b"] @ np.diag(f["v"].ravel())


def test_the_update_is_the_papers():
    promises.check_formula(SETTING, formula, {"d": 1, "v": 0})


def test_dtypes():
    promises.check_bfloat16(SETTING)


def test_stacked_trials_of_different_rank_equal_solo_runs(standard_promotion):
    promises.check_stacking(variant="vera", alpha=None)


def leaves(shape, rank):
    params = {"w": jnp.zeros(shape)}
    plan = lk.resolve(lk.Spec({"w": lk.VeRA(rank=rank)}), params)
    return lk.split(params, plan, jax.random.key(3))[1]["w"]


def test_sites_of_equal_shape_share_draws_that_are_saved_once(tmp_path):
    plan, base, factors = promises.prepared(SETTING)
    np.testing.assert_array_equal(factors["matrix"].a, factors["heads"].a)
    np.testing.assert_array_equal(factors["matrix"].b, factors["heads"].b.reshape(RANK, 8))
    np.testing.assert_array_equal(factors["experts"].b, factors["window"].b)
    lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    same = read_document(tmp_path / "a")["same"]
    assert (same["matrix:a"], same["window:b"]) == ("heads:a", "experts:b")


def test_smaller_draws_are_parts_of_larger_ones():
    """Rows and columns of a 300 x 200 site's draws, times the ratio of the Kaiming bounds."""
    large, narrow, low = leaves((300, 200), 20), leaves((130, 7), 20), leaves((300, 200), 5)
    np.testing.assert_allclose(narrow.a * (130 / 300) ** 0.5, large.a[:, :130], rtol=1e-6)
    np.testing.assert_array_equal(narrow.b, large.b[:, :7])
    np.testing.assert_array_equal(low.a, large.a[:5])
    np.testing.assert_allclose(low.b * (5 / 20) ** 0.5, large.b[:5], rtol=1e-6)


def test_draws_are_kaiming_uniform():
    """PEFT's bounds, sqrt(6 / in) and sqrt(6 / rank); the standard deviation of 6000 uniform draws to 2 %."""
    f = leaves((300, 200), 20)
    for x, bound in ((f.a, (6 / 300) ** 0.5), (f.b, (6 / 20) ** 0.5)):
        x = np.asarray(x, np.float64)
        assert 0.99 * bound < np.abs(x).max() <= bound
        assert abs(x.mean()) < 0.03 * bound
        assert x.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert np.unique(np.asarray(f.a)).size > 5990
    assert float(f.d[0]) == np.float32(0.1)


def test_bad_settings():
    promises.check_refused(
        lk.VeRA,
        [
            ({"rank": 0}, f"rank is 0; {promises.RANK}"),
            ({"rank": 2, "d_initial": 0}, "d_initial is 0; it must be a number of float32's range, other than 0."),
            (
                {"rank": 2, "d_initial": True},
                "d_initial is True; it must be a number of float32's range, other than 0.",
            ),
            (
                {"rank": 2, "d_initial": float("nan")},
                "d_initial is nan; it must be a number of float32's range, other than 0.",
            ),
            ({"rank": 2, "dropout": 1}, "dropout is 1; it must lie in [0, 1)."),
        ],
    )
