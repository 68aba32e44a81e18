"""Every method and start on every kind of model: what DESIGN promises of split, merge, adapt and the checkpoint."""

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.core.method import frozen_leaves, trained_leaves
from lorax_kit.core.paths import flatten
from tests.methods.table import EXCUSED, MODELS, WAYS, Cell, cell, normal_form, numbers

TABLE = [(way, model) for model in MODELS for way in WAYS]
each = pytest.mark.parametrize(("way", "model"), TABLE, ids=[f"{way}, {model}" for way, model in TABLE])


def found(way, model, contract, record_property):
    """The cell; a cell that does not apply must be excused, in the words of the plan's error."""
    c = cell(way, model)
    record_property("contract", (contract, way, model, isinstance(c, Cell)))
    if isinstance(c, Cell):
        assert (way, model) not in EXCUSED, "it applies, though it is excused"
        return c
    assert EXCUSED.get((way, model), "no excuse") in c, c
    pytest.skip(c.splitlines()[0])


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]


def largest(tree):
    return max([float(np.abs(np.asarray(x, np.float64)).max()) for x in jax.tree.leaves(tree)] + [1e-6])


def tolerance(model):
    # Sums of fp32 in another order; of bf16 (8 bits) two roundings of outputs that pass through two layers.
    return 0.05 if model == "bf16" else 3e-5


@each
def test_the_start_changes_nothing(way, model, record_property):
    c = found(way, model, "start", record_property)
    merged = lk.merge(c.base, c.start, c.plan)
    whole = flatten(c.case.params)[0]
    for path, x in flatten(merged)[0].items():
        if hasattr(x, "dtype"):
            before = whole[path].restore() if hasattr(whole[path], "restore") else whole[path]
            assert np.asarray(x).tobytes() == np.asarray(before).tobytes(), path
    adapted = numbers(model)[way].at_start
    plain = c.case.fn(merged, *c.case.inputs)
    np.testing.assert_allclose(*(np.asarray(x, np.float64) for x in (adapted, plain)), rtol=2e-6, atol=2e-6)


@each
def test_the_merged_weight_is_the_normal_form(way, model, record_property):
    c = found(way, model, "oracle", record_property)
    merged, base = flatten(lk.merge(c.base, c.moved, c.plan))[0], flatten(c.base)[0]
    for site in c.plan.sites:
        want = normal_form(site, base[site.path], c.moved[site.path])
        got = np.asarray(merged[site.path], np.float64)
        # fp32 sums, rounded once into the base's dtype.
        bound = 2**-7.9 if model == "bf16" else 1e-5
        assert np.abs(got - want).max() <= bound * np.abs(want).max(), site.path


@each
def test_adapted_equals_merged(way, model, record_property):
    found(way, model, "merged", record_property)
    ours = numbers(model)[way]
    bound = tolerance(model) * max(1.0, largest(ours.merged))
    np.testing.assert_allclose(*(np.asarray(x, np.float64) for x in (ours.adapted, ours.merged)), atol=bound, rtol=0)


@each
def test_gradients_equal_autodiff_through_the_merged_weight(way, model, record_property):
    found(way, model, "gradient", record_property)
    ours = numbers(model)[way]
    bound = (0.1 if model == "bf16" else 2e-4) * largest(ours.merged_gradient)
    for a, b in zip(arrays(ours.gradient), arrays(ours.merged_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=bound, rtol=1e-3)


@each
def test_gradients_reach_every_trained_leaf_and_no_frozen_one(way, model, record_property):
    c = found(way, model, "leaves", record_property)
    gradient = numbers(model)[way].gradient
    for site in c.plan.sites:
        for name in trained_leaves(site):
            assert np.abs(np.asarray(getattr(gradient[site.path], name))).max() > 0, (site.path, name)
        for name in frozen_leaves(site.setting):
            x = getattr(gradient[site.path], name)
            assert x is None or not np.any(np.asarray(x)), (site.path, name)


@each
def test_an_adapter_on_disk_comes_back(way, model, record_property, tmp_path):
    c = found(way, model, "disk", record_property)
    lk.save_adapter(tmp_path / "a", c.plan, c.moved, base=c.base)
    again = lk.load_adapter(tmp_path / "a", base=c.base)
    assert again.plan == c.plan
    assert lk.Spec.from_json(c.plan.spec.to_json()) == c.plan.spec
    assert jax.tree.structure(again.factors) == jax.tree.structure(dict(c.moved))
    for x, y in zip(arrays(again.factors), arrays(dict(c.moved)), strict=True):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes()
