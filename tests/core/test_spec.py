"""Specs and patterns: which rule gets which parameter, and the same spec back from JSON."""

import itertools

import jax
import jax.numpy as jnp
import pytest

import lorax_kit as lk
from lorax_kit.core import match
from lorax_kit.core.specs.patterns import _matches_stepwise, compile_pattern, expand_braces, matches

PARAMS = {
    "encoder": {
        f"layer_{i}": {
            "attention": {name: {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)} for name in ("query", "value")},
            "norm": {"scale": jnp.ones(4)},
        }
        for i in (0, 1, 10)
    },
    "head": {"kernel": jnp.ones((4, 2))},
}


@pytest.mark.parametrize(
    ("pattern", "path", "hit"),
    [
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/b/kernel", True),
        ("**/kernel", "a/kernel/b", False),
        ("*/kernel", "a/kernel", True),
        ("*/kernel", "a/b/kernel", False),
        ("a/**", "a/b/c", True),
        ("a/**", "a", False),
        ("layer_?", "layer_1", True),
        ("layer_?", "layer_10", False),
        ("layer_*", "layer_10", True),
        ("a.b", "axb", False),
        ("a+(b)[0]", "a+(b)[0]", True),
        ("re:layer_[0-9]+/.*", "layer_10/x/y", True),
        ("re:layer", "layer_1", False),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/x/y/b", True),
        ("a/**/b", "axb", False),
    ],
)
def test_patterns_match_whole_paths(pattern, path, hit):
    assert matches(pattern, path) is hit


def test_braces_spell_out():
    assert expand_braces("a/{b,c/{d,e}}/f") == ("a/b/f", "a/c/d/f", "a/c/e/f")
    assert expand_braces("re:a{2}") == ("re:a{2}",)


def test_the_first_rule_that_matches_wins_and_exclude_wins_over_all():
    low, high, full = lk.LoRA(rank=1), lk.LoRA(rank=2), lk.Full()
    spec = lk.Spec(
        {"**/layer_10/**/kernel": low, "**/{query,value}/kernel": high, "**/scale": full},
        exclude=["encoder/layer_0/attention/query/*"],
    )
    found = match(spec, PARAMS)
    assert found["encoder/layer_10/attention/query/kernel"] == low
    assert found["encoder/layer_1/attention/query/kernel"] == high
    assert "encoder/layer_0/attention/query/kernel" not in found
    assert found["encoder/layer_0/norm/scale"] == full
    assert "head/kernel" not in found
    assert len(found) == 2 + 3 + 3


def test_json_round_trip_is_equal_and_hash_agrees():
    spec = lk.Spec(
        {"**/query/kernel": lk.DoRA(rank=8, alpha=16, rslora=True, dropout=0.1), "head/**": lk.Full()},
        exclude=["encoder/layer_0/**"],
        compute_dtype="bfloat16",
    )
    again = lk.Spec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)
    assert lk.Spec.from_dict({"rules": {"head/*": {"rank": 1}}}) == lk.Spec({"head/*": lk.LoRA(rank=1)})


def test_scales():
    assert lk.LoRA(rank=8, alpha=16).scale == 2
    assert lk.LoRA(rank=8).scale == 1
    assert lk.LoRA(rank=16, alpha=16, rslora=True).scale == 4


def test_a_plan_is_static_and_hashable():
    spec = lk.Spec({"head/kernel": lk.LoRA(rank=1)})
    plans = [lk.resolve(spec, PARAMS) for _ in range(2)]
    assert plans[0] == plans[1]
    assert hash(plans[0]) == hash(plans[1])
    doubled = jax.jit(lambda x, plan: x * plan.sites[0].setting.rank * 2, static_argnums=1)
    assert float(doubled(jnp.float32(3), plans[0])) == 6


def test_an_error_names_the_closest_parameter_and_how_many_are_like_it():
    with pytest.raises(lk.PlanError) as e:
        lk.resolve(lk.Spec({"**/attn/query/kernel": lk.LoRA(rank=1)}), PARAMS)
    assert "'**/attn/query/kernel' matches no parameter" in str(e.value)
    assert "attention/query/kernel' (6 more end in 'kernel')" in str(e.value)


def test_ambiguous_paths_are_refused():
    with pytest.raises(lk.PlanError, match="two leaves of the params share the path 'a/b'"):
        lk.paths({"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)})


def test_n_d_targets_need_the_function():
    with pytest.raises(lk.PlanError, match="which axes are contracted is known only to the function"):
        lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), {"w": jnp.ones((2, 3, 4))})


@pytest.mark.parametrize(
    ("rules", "options", "says"),
    [
        ({}, {}, "no rules"),
        ({"": lk.Full()}, {}, "must be a string"),
        ({"a": 3}, {}, "must map to LoRA"),
        ({"a}": lk.Full()}, {}, "'}' without '{'"),
        ({"a": lk.Full()}, {"exclude": "b"}, "give a list of patterns"),
        ({"a": lk.Full()}, {"compute_dtype": "int8"}, "float dtype"),
    ],
)
def test_bad_specs_say(rules, options, says):
    with pytest.raises(lk.SpecError) as e:
        lk.Spec(rules, **options)
    assert says in str(e.value)


def test_the_older_init_beside_an_equal_start_is_taken():
    for spelt in ({"init": "kaiming_uniform", "start": "kaiming"}, {"init": "pissa", "start": "pissa"}):
        assert lk.LoRA(rank=1, **spelt) == lk.LoRA(rank=1, start=spelt["start"])
        assert lk.LoRA(rank=1, variant="dora", **spelt) == lk.DoRA(rank=1, start=spelt["start"])
    text = '{"rules": {"w": {"rank": 1, "init": "pissa", "start": "eva"}}}'
    with pytest.raises(lk.SpecError, match="start is 'eva' and init is 'pissa'"):
        lk.Spec.from_json(text)


def capped(setting, shape):
    """The rank of one kernel of this shape."""
    return lk.resolve(lk.Spec({"a/kernel": setting}, cap_ranks=True), {"a": {"kernel": jnp.ones(shape)}}).sites[0].rank


@pytest.mark.parametrize("method", [lk.LoRA, lk.DoRA])
def test_a_rank_is_capped_to_what_the_start_holds(method):
    assert capped(method(rank=6, start="orthogonal"), (5, 8)) == 4
    assert capped(method(rank=6, start="pissa"), (5, 8)) == 5
    with pytest.raises(lk.PlanError, match=r"cannot adapt 'a/kernel' at rank 1, .* splits the rank into halves"):
        capped(method(rank=6, start="orthogonal"), (1, 8))


def test_a_method_that_holds_no_rank_at_a_parameter_says_so():
    assert capped(lk.HRA(rank=6), (5, 8)) == 4
    says = r"hra cannot adapt 'a/kernel': the highest rank that it holds there is 0 \(in \(1,\), out \(3,\)\)"
    for cap in (True, False):
        with pytest.raises(lk.PlanError, match=says):
            lk.resolve(lk.Spec({"**": lk.HRA(rank=2)}, cap_ranks=cap), {"a": {"kernel": jnp.ones((1, 3))}})


@pytest.mark.parametrize(
    "pattern", ["{a,b}" * 40, "{0..9999}{a,b}", "{a}" * 101, "re:a{9999999999}", "re:" + "(" * 9999]
)
def test_a_pattern_beyond_measure_is_refused_at_once(pattern):
    with pytest.raises(lk.SpecError) as e:
        lk.Spec({pattern: lk.LoRA(rank=1)})
    assert len(str(e.value)) < 400


def test_many_wildcards_match_as_few_do():
    names = ["", "a", "b", "ab", "aab", "a/b", "a/ab/b", "/a", "a/", "a//b", "b/a/b/a", "a\n/b"]
    for parts in itertools.product(["a", "b", "/", "*", "?", "**", "**/"], repeat=4):
        pattern = "".join(parts)
        for name in names:
            assert _matches_stepwise(pattern, name) == bool(compile_pattern(pattern).fullmatch(name)), (pattern, name)
    assert matches("*a" * 40 + "b", "a" * 60) is False
    assert matches("**/a*" * 20, "/".join(["ab"] * 20)) is True


def test_a_dict_of_keys_that_cannot_be_sorted_is_refused():
    with pytest.raises(lk.PlanError, match="keys cannot be sorted"):
        lk.paths({"a": {"b": jnp.ones(3), 2: jnp.ones(3)}})
