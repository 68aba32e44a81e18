"""What a merge loses: counted by hand, in float64 numpy, and printed as a table."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit import algebra
from tests.algebra.tasks import adapter, dense, params

BASE = params()
ONE = algebra.scale(adapter(1, full=True), 0.01, base=BASE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_narrow_dtype_against_numpy(dtype):
    found = algebra.merge_loss(BASE, ONE, dtype=dtype)
    for row in found.rows:
        w, delta = np.asarray(BASE[row.path], np.float64), dense(ONE, BASE)[row.path]
        narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        error = (w + delta).astype(np.float32).astype(narrow).astype(np.float64) - (w + delta)
        assert row.update == pytest.approx(np.linalg.norm(delta), rel=1e-4)
        assert row.stored == dtype
        if dtype == "float32":
            assert row.ratio < 1e-4
            continue
        assert row.error == pytest.approx(np.linalg.norm(error), rel=1e-2)
        assert row.changed == delta.size
        assert row.lost == pytest.approx(np.sum(np.abs(error) >= np.abs(delta)), abs=1)


def test_lost_entries_of_a_base_in_that_dtype_are_those_that_the_merge_leaves_as_they_were():
    base = params(dtype=jnp.bfloat16)
    one = algebra.scale(adapter(1, dtype=jnp.bfloat16), 0.01)
    merged = lk.merge(base, one.factors, one.plan)
    for row in algebra.merge_loss(base, one).rows:
        same = np.sum(np.asarray(merged[row.path] == base[row.path]))
        assert row.stored == "bfloat16"
        assert 0 < same < row.changed
        assert row.lost == pytest.approx(same, abs=1)


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_a_quantised_merge_against_what_it_restores(method):
    found = algebra.merge_loss(BASE, ONE, quantise=method, block=4)
    merged = {k: v for k, v in lk.merge(BASE, ONE.factors, ONE.plan).items() if k != "bias"}
    again = lk.quantize(merged, ["{flat,heads,layers}"], method, block=4)
    for row in found.rows:
        if row.path == "bias":
            assert row.stored == "float32"
            continue
        wanted = np.asarray(BASE[row.path], np.float64) + dense(ONE, BASE)[row.path]
        error = np.linalg.norm(np.asarray(again[row.path].restore(), np.float64) - wanted)
        assert row.stored == f"{method}/4"
        assert row.error == pytest.approx(error, rel=1e-4)
    sums = found.total
    assert sums.error == pytest.approx(np.sqrt(sum(x.error**2 for x in found.rows)))
    assert sums.stored == "mixed"
    assert found.to_dict()["total"]["lost"] == sum(x.lost for x in found.rows)


def test_a_quantised_base_is_quantised_again_as_it_was():
    base = lk.quantize(BASE, ["flat"], "nf4", block=4, double=False)
    one = adapter(1, sites=("flat",))
    (row,) = algebra.merge_loss(base, one).rows
    assert row.stored == "nf4/4"
    restored = base["flat"].restore()
    merged = {"w": restored + dense(one, {"flat": restored})["flat"].astype(np.float32)}
    again = lk.quantize(merged, ["w"], "nf4", block=4, double=False)["w"].restore()
    assert row.error == pytest.approx(float(np.linalg.norm(again - merged["w"])), rel=1e-4)


def test_no_update_loses_nothing():
    (row,) = algebra.merge_loss(BASE, algebra.scale(adapter(1, sites=("flat",)), 0.0), dtype="bfloat16").rows
    assert (row.ratio, row.share, row.changed) == (0.0, 0.0, 0)


def test_it_prints_a_table():
    lines = str(algebra.merge_loss(BASE, ONE, dtype="bfloat16")).splitlines()
    assert lines[0].split("  ")[0] == "parameter"
    assert [line.split()[0] for line in lines[1:]] == ["flat", "heads", "layers", "bias", "all"]
    assert lines[1].endswith("%")
    assert '"total"' in algebra.merge_loss(BASE, ONE).to_json()


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"dtype": "bfloat16", "quantise": "nf4"}, lk.AdapterError, "both a dtype and a quantisation"),
        ({"dtype": "int8"}, lk.SpecError, "dtype is 'int8'; it must name a float dtype"),
        ({"quantise": "int3"}, lk.PlanError, "method 'int3' is unknown"),
        ({"quantise": "nf4", "block": 3}, lk.PlanError, "block is 3"),
    ],
)
def test_bad_input_says(more, error, says):
    with pytest.raises(error) as e:
        algebra.merge_loss(BASE, ONE, **more)
    assert says in str(e.value)


def large(value, dtype=jnp.float32):
    one = adapter(1, sites=("flat",))
    return {name: x.astype(dtype) for name, x in (BASE | {"flat": BASE["flat"].at[0].set(value)}).items()}, one


def test_what_a_narrow_dtype_cannot_hold_is_no_small_loss():
    base, one = large(-1e6)
    with pytest.raises(lk.AdapterError, match=r"'flat' has values up to 1e\+06 once merged, which float16 cannot"):
        algebra.merge_loss(base, one, dtype="float16")
    assert np.isfinite(algebra.merge_loss(base, one, dtype="bfloat16").total.error)


def test_a_merge_into_a_narrow_base_says_where_it_leaves_its_range():
    base, _ = large(65500, jnp.float16)
    plan = lk.resolve(lk.Spec({"flat": lk.LoRA(rank=1), "bias": lk.Full(dtype="float32")}), base)
    _, factors = lk.split(base, plan, jax.random.key(0))
    lk.merge(base, factors, plan)
    a, b, *_ = factors["flat"]
    moved = factors | {"flat": factors["flat"]._replace(a=jnp.ones_like(a), b=jnp.full_like(b, 9e4))}
    for call in (lk.merge, lambda *x: algebra.merge_loss(x[0], algebra.Adaptation(x[2], x[1]))):
        with pytest.raises(lk.AdapterError, match=r"'flat' has values up to .* once merged, which float16 cannot"):
            call(base, moved, plan)
    moved = factors | {"bias": lk.FullLeaf(factors["bias"].value + 1e5)}
    with pytest.raises(lk.AdapterError, match=r"'bias' has values up to 1e.05 once merged, which float16 cannot"):
        lk.merge(base, moved, plan)
    assert jnp.isinf(jax.jit(lambda f: lk.merge(base, f, plan))(moved)["bias"]).all()


def test_an_update_that_is_not_finite_says_so():
    base, one = large(1.0)
    huge = one.factors["flat"]._replace(a=jnp.full_like(one.factors["flat"].a, 1e30))
    huge = huge._replace(b=jnp.full_like(huge.b, 1e30))
    with pytest.raises(lk.AdapterError, match="'flat' holds values that are not finite once merged"):
        algebra.merge_loss(base, algebra.Adaptation(one.plan, {"flat": huge}))


def test_json_holds_no_infinity():
    row = algebra.merge_loss(BASE, ONE).rows[0]
    found = algebra.MergeLoss((replace(row, error=1e300, update=1e-300), replace(row, error=np.nan, update=np.inf)))
    data = json.loads(found.to_json(), parse_constant=lambda x: pytest.fail(x))
    assert [site["ratio"] for site in data["sites"]] == [None, None]
