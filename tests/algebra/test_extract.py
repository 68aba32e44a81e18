"""An adapter from two checkpoints: what it holds, what it leaves, and that it says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit import algebra
from tests.algebra.tasks import LOW, adapter, close, dense, params, plan_of, truncated

BASE = params()
HIDDEN = adapter(1, lk.LoRA(rank=2), full=True)
TUNED = lk.merge(BASE, HIDDEN.factors, HIDDEN.plan)
PLAN = plan_of(lk.DoRA(rank=3))


def change(tuned, path):
    return np.asarray(tuned[path], np.float64) - np.asarray(BASE[path], np.float64)


def test_a_low_rank_difference_is_found_again():
    found = algebra.extract(BASE, TUNED, PLAN, rank=2)
    close(found, BASE, {path: change(TUNED, path) for path in LOW}, 1e-5)
    assert max(found.errors[path] for path in LOW) < 1e-5
    assert algebra.extract(BASE, TUNED, PLAN).plan.site("flat").rank == 3  # the plan's
    assert algebra.extract(BASE, TUNED, PLAN, energy=0.999999).plan.site("flat").rank == 2


def test_a_full_rank_difference_is_cut_and_the_error_said():
    other = params(7)
    found = algebra.extract(BASE, other, PLAN, rank=2)
    for site in PLAN.sites:
        cut, error = truncated(site, change(other, site.path), 2)
        assert found.errors[site.path] == pytest.approx(error, rel=1e-6)
        np.testing.assert_allclose(dense(found, BASE)[site.path], cut, atol=1e-5)


def test_what_the_plan_leaves_out_is_reported_or_kept(tmp_path):
    found = algebra.extract(BASE, TUNED, PLAN, rank=2)
    assert found.errors["bias"] == 1.0
    assert "rest" not in found.errors  # it does not differ
    kept = algebra.extract(BASE, TUNED, PLAN, rank=2, keep=True)
    assert kept.errors["bias"] == 0.0
    merged = lk.merge(BASE, kept.factors, kept.plan)
    for path, x in TUNED.items():
        np.testing.assert_allclose(merged[path], x, atol=1e-5)
    lk.save_adapter(tmp_path / "a", kept.plan, kept.factors, base=BASE)
    assert lk.load_adapter(tmp_path / "a", base=BASE).plan == kept.plan


def test_a_plan_that_trains_in_full_takes_the_tuned_value():
    found = algebra.extract(BASE, TUNED, plan_of(lk.LoRA(rank=2), full=True))
    np.testing.assert_array_equal(found.factors["bias"].value, TUNED["bias"])


def test_a_spec_will_do_where_shapes_tell_and_dtypes_may_differ():
    tuned = {"flat": TUNED["flat"].astype(jnp.bfloat16)}
    found = algebra.extract({"flat": BASE["flat"]}, tuned, lk.Spec({"flat": lk.LoRA(rank=5)}))
    merged = lk.merge({"flat": BASE["flat"]}, found.factors, found.plan)
    np.testing.assert_allclose(merged["flat"], tuned["flat"].astype(jnp.float32), atol=1e-5)


def test_x64():
    with jax.enable_x64(True):
        base, tuned = params(dtype=jnp.float64), params(7, dtype=jnp.float64)
        found = algebra.extract(base, tuned, plan_of(lk.LoRA(rank=5), dtype=jnp.float64), rank=5)
        np.testing.assert_allclose(lk.merge(base, found.factors, found.plan)["flat"], tuned["flat"], atol=1e-12)


@pytest.mark.parametrize(
    ("base", "tuned", "plan", "more", "says"),
    [
        (BASE, {k: v for k, v in TUNED.items() if k != "rest"}, PLAN, {}, "'rest' is in the base and not in the tuned"),
        (BASE, TUNED | {"more": TUNED["rest"]}, PLAN, {}, "'more' is in the tuned params and not in the base"),
        (BASE, TUNED | {"rest": TUNED["bias"]}, PLAN, {}, "'rest' is (6,) in the base and (5,) in the tuned params"),
        (BASE, TUNED | {"rest": TUNED["rest"] * np.nan}, PLAN, {}, "'rest' of the tuned params holds values"),
        (BASE, TUNED, "flat", {}, "the plan is a str; it comes from lk.resolve, or is a spec"),
        (BASE, TUNED, PLAN, {"rank": 6}, "rank 6 at 'flat' is above min(in, out) = 5"),
        (BASE, TUNED, PLAN, {"energy": 0}, "energy is 0; it must lie in (0, 1]"),
    ],
)
def test_bad_checkpoints_say(base, tuned, plan, more, says):
    with pytest.raises(lk.AdapterError) as e:
        algebra.extract(base, tuned, plan, **more)
    assert says in str(e.value)
