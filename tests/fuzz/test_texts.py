"""Texts, dicts and patterns of specs and settings, and JSON of any origin."""

import json
from dataclasses import fields

import jax
from hypothesis import strategies as st

import lorax_kit as lk
from lorax_kit.core.method import METHODS
from lorax_kit.core.paths import flatten
from lorax_kit.core.plan import match
from lorax_kit.core.specs.patterns import expand_braces, literal, matches
from lorax_kit.core.specs.spec import setting_from
from lorax_kit.json_text import parse_json, sealed_json
from tests import tiny
from tests.fuzz.inputs import NUMBERS, WORDS, changed, json_text, leaves, mutated, values
from tests.fuzz.verdict import NOTHING, run, taken

SPEC = lk.Spec(
    {"{up,down}/kernel": lk.LoRA(rank=2, alpha=4), "first/*": lk.DoRA(rank=1), "head/bias": lk.Full()},
    exclude=["first/b*"],
    compute_dtype="float32",
    cap_ranks=True,
)
PARAMS = tiny.params(jax.random.key(0))
ALPHABET = "ab/*?{},.019()[]+|\\^$-:re"


def test_json_of_any_origin(tried):
    def check(draw, said):
        text = mutated(draw, sealed_json({"a": [1, {"b": None}], "c": "é", "d": 0.5}, indent=2).encode())
        said += [text]
        taken(lambda: parse_json(text))

    run(check, 3000, tried, "JSON texts")


def test_sealed_json_is_read_as_it_was(tried):
    def check(draw, said):
        tree = draw(st.dictionaries(st.text(max_size=5), values(3), max_size=4))
        said += [tree]
        tree = json.loads(json.dumps(tree))
        found = taken(lambda: parse_json(sealed_json(tree)))
        assert found is NOTHING or json.dumps(found) == json.dumps(tree)

    run(check, 700, tried, "trees written and read")


def test_texts_of_specs(tried):
    def check(draw, said):
        text = mutated(draw, SPEC.to_json().encode())
        text = text if draw(st.booleans()) else json_text(changed(draw, SPEC.to_dict()))
        said += [text]
        found = taken(lambda: lk.Spec.from_json(text))
        if found is not NOTHING:
            assert lk.Spec.from_json(found.to_json()) == found
            taken(lambda: lk.resolve(found, PARAMS))

    run(check, 1500, tried, "texts of specs")


def test_dicts_of_specs(tried):
    def check(draw, said):
        tree = changed(draw, SPEC.to_dict())
        said += [tree]
        found = taken(lambda: lk.Spec.from_dict(tree))
        if found is not NOTHING:
            assert lk.Spec.from_json(found.to_json()) == found

    run(check, 1500, tried, "dicts of specs")


def test_settings_of_every_method(tried):
    kinds = [*METHODS, "full"]

    def check(draw, said):
        kind = draw(st.sampled_from(kinds))
        names = [f.name for f in fields(METHODS[kind].setting)] if kind in METHODS else ["dtype", "trained"]
        chosen = draw(st.dictionaries(st.sampled_from(names), leaves() | values(), max_size=4))
        data = {"kind": kind, **({"rank": 2} if "rank" in names else {}), **chosen}
        said += [data]
        found = taken(lambda: setting_from(data, "the setting"))
        if found is not NOTHING:
            spec = lk.Spec({"up/kernel": found})
            assert lk.Spec.from_json(spec.to_json()) == spec
            taken(lambda: lk.resolve(spec, PARAMS))

    run(check, 1200, tried, "settings of methods")


def test_patterns(tried):
    def check(draw, said):
        pattern = draw(st.text(ALPHABET, min_size=1, max_size=24))
        pattern = draw(st.sampled_from(["", "re:"])) + pattern * draw(st.sampled_from([1, 1, 1, 2, 12]))
        said += [pattern]
        spec = taken(lambda: lk.Spec([(pattern, lk.LoRA(rank=1))], exclude=[pattern]))
        if spec is not NOTHING:
            taken(lambda: match(spec, PARAMS))

    run(check, 2500, tried, "patterns")


def test_hard_patterns(tried):
    """Those that spell out into many, or that a matcher could try for long."""
    parts = [
        "{a,b}",
        "{0..9999}",
        "{",
        "}",
        "**",
        "*a",
        "**/",
        "?",
        "a",
        "{a,",
        "re:",
        "(a+)+",
        "a{9999999999}",
        "x" * 300,
    ]

    def check(draw, said):
        pattern = "".join(draw(st.lists(st.sampled_from(parts), min_size=1, max_size=3)))
        pattern = pattern * draw(st.sampled_from([1, 8, 40, 1000]))
        if pattern.startswith("re:"):
            pattern = pattern.replace("(a+)+", "a+")  # a user's own expression may be as slow as the user writes it
        said += [pattern[:200], len(pattern)]
        spec = taken(lambda: lk.Spec({pattern: lk.LoRA(rank=1)}))
        if spec is not NOTHING:
            taken(lambda: match(spec, {"a" * 40: {"kernel": PARAMS["up"]["kernel"]}}))

    run(check, 1000, tried, "hard patterns")


def test_a_literal_pattern_matches_its_path_alone(tried):
    def check(draw, said):
        path, other = (draw(st.text(ALPHABET + "\n é", min_size=1, max_size=12)) for _ in range(2))
        said += [path, other]
        (pattern,) = expand_braces(literal(path))
        assert matches(pattern, path)
        assert matches(pattern, other) == (path == other)

    run(check, 1000, tried, "literal patterns")


def test_params_of_any_keys(tried):
    def check(draw, said):
        keys = st.sampled_from([*WORDS[:-1], "kernel", "0"]) | st.integers(0, 3)
        params = draw(st.dictionaries(st.sampled_from(["a", "b/c", "é"]), st.dictionaries(keys, leaves(), max_size=3)))
        said += [params]
        taken(lambda: flatten(params))
        taken(lambda: lk.resolve(lk.Spec({"**": lk.Full()}), params))

    run(check, 300, tried, "params of odd keys and leaves")


def test_constructors_take_python_values(tried):
    def check(draw, said):
        more = {name: draw(leaves()) for name in draw(st.sets(st.sampled_from(["rank", "alpha", "dropout", "inputs"])))}
        said += [more]
        taken(lambda: lk.LoRA(**({"rank": 2} | more)))
        taken(
            lambda: lk.Spec(
                {"a": lk.LoRA(rank=1)}, compute_dtype=draw(leaves()), cap_ranks=draw(st.sampled_from(NUMBERS))
            )
        )

    run(check, 700, tried, "Python values of settings")
