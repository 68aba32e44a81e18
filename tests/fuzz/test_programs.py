"""Random programs: the adapted function equals the function of the merged parameters, gradients, too."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, seed
from hypothesis import strategies as st

import lorax_kit as lk
from lorax_kit.core.method import leaf_shapes
from tests.fuzz.programs import Maker
from tests.fuzz.verdict import examples, in_time, in_words, noted

SETTINGS = [lk.LoRA(rank=1, alpha=3), lk.LoRA(rank=2, alpha=3), lk.LoRA(rank=2, alpha=3), lk.DoRA(rank=2)]
FULL, PARTS = 2100, 14
EXACT, ROUNDED = 2.0**-13, 2.0**-4
"""Largest difference over the largest value (at least 1): of sums in float32, and of weights rounded to bfloat16."""


def planned(draw, program):
    """The plan of a program; None where it uses a parameter in ways that do not agree."""
    setting = SETTINGS[draw(st.integers(0, len(SETTINGS) - 1))]
    spec = lk.Spec(dict.fromkeys(program.params, setting), cap_ranks=True)
    try:
        return lk.resolve(spec, program.params, program.fn, program.inputs)
    except lk.PlanError as e:
        assert in_words(e)
    said = {}
    for name, x in program.params.items():
        axes = range(x.ndim)
        ways = [c for n in range(1, x.ndim) for c in itertools.combinations(axes, n)]
        said[name] = type(setting)(
            rank=setting.rank, alpha=setting.alpha, inputs=ways[draw(st.integers(0, len(ways) - 1))]
        )
    try:
        return lk.resolve(lk.Spec(said, cap_ranks=True), program.params, program.fn, program.inputs)
    except lk.PlanError as e:
        assert in_words(e)
    return None


def factors_of(plan):
    """Leaves away from their zero update; magnitudes are positive."""
    rng = np.random.default_rng(len(plan.sites))
    out = {}
    for site in plan.sites:
        shapes = leaf_shapes(site)._asdict().items()
        out[site.path] = leaf_shapes(site)._replace(
            **{k: jnp.asarray(rng.uniform(0.3, 1.0, x.shape), x.dtype) for k, x in shapes if x is not None}
        )
    return out


def close(ours, theirs, tolerance):
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    largest = max([1.0, *(float(np.abs(np.asarray(z)).max(initial=0)) for z in theirs)])
    for y, z in zip(ours, theirs, strict=True):
        assert (y.shape, y.dtype) == (z.shape, z.dtype)
        np.testing.assert_allclose(np.asarray(y), np.asarray(z), rtol=0, atol=tolerance * largest)


def compared(program, plan, recompute):
    """(base, factors, inputs) -> what the adapted function gives and what that of the merged does, with gradients."""
    adapted = lk.adapt(program.fn, plan, recompute=recompute)

    def with_gradients(fn, factors):
        def run(factors):
            out = fn(factors)
            return sum(jnp.sum(jnp.sin(y)) for y in out), out

        return jax.value_and_grad(run, has_aux=True)(factors) if program.reverse else run(factors)

    def both(base, factors, inputs):
        ours = with_gradients(lambda f: adapted(base, f, inputs), factors)
        return ours, with_gradients(lambda f: program.fn(lk.merge(base, f, plan), inputs), factors)

    return jax.jit(both)


def check(program, plan, recompute, tried):
    given = program.params, factors_of(plan), program.inputs
    try:
        traced = compared(program, plan, recompute).trace(*given)
    except lk.PlanError as e:
        assert "is carried through" in str(e) or "does not use" in str(e)
        tried("programs that no plan fits")
        return
    tolerance = ROUNDED if program.rounds else EXACT
    try:
        close(*traced.lower().compile()(*given), tolerance)
    except AssertionError:  # XLA clamps the start of a slice of a slice too late: jit gives others than the operations
        with jax.disable_jit():
            close(*compared(program, plan, recompute)(*given), tolerance)
        tried("programs equal to the merged, though not as XLA compiles them")
    tried("programs equal to the merged, gradients too" if program.reverse else "programs equal to the merged")


@pytest.mark.parametrize("part", range(PARTS))
def test_programs_equal_the_merged(part, tried, monkeypatch):
    if part % 2:  # products of one input run as one, which they do not where they are as small as here
        monkeypatch.setattr("lorax_kit.transform.context.together", lambda products, trials: trials == 1)
    failures = []

    @examples(FULL // PARTS)
    @seed(part)
    @given(data=st.data())
    def run(data):
        program = Maker(data.draw).program()
        tried("programs")
        with noted(failures, program):
            with in_time():
                plan = planned(data.draw, program)
            if plan is None:
                tried("programs that no plan fits")
            else:
                check(program, plan, data.draw(st.booleans()), tried)

    run()
    jax.clear_caches()  # compiled programs of one part, which no other uses
    assert not failures, f"{len(failures)} failed\n" + "\n\n".join(failures)
