"""LoKr: the Kronecker product of every pair of dense and decomposed matrices, factored as PEFT factors them."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.core.method import update_of
from lorax_kit.methods.lokr import factorization, sizes
from lorax_kit.study.programs.forms import kinds, union_plan
from lorax_kit.study.programs.packing import pack
from tests import tiny
from tests.methods import promises

STACKED = {"w1": 0, "w2": 0, "a1": 1, "b1": 1, "a2": 1, "b2": 1}
FACTOR = "it must be -1, for the most square factors, or an integer of at least 1."
# Of the sites' 6 x 8, 4 x 6, 12 x 4 and 3 x 4 x 6: dense and decomposed, rank above and below the short sides.
SETTINGS = {
    "one decomposed": {"rank": 1, "alpha": 2},
    "none decomposed": {"rank": 4, "alpha": 8},
    "both decomposed": {"rank": 1, "alpha": 2, "factor": 4, "decompose_both": True},
    "first decomposed": {"rank": 2, "alpha": 4, "factor": 6, "decompose_both": True},
    "no factor": {"rank": 1, "alpha": 2, "factor": 1, "decompose_both": True},
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    return lk.LoKr(**SETTINGS[request.param])


def formula(w, f, scale):
    def whole(k):
        return f[f"w{k}"] if f"w{k}" in f else f[f"a{k}"].T @ f[f"b{k}"]

    assert scale == 2
    found = scale * np.kron(whole(1), whole(2))
    if w.shape == (12, 6):  # (channels, window) of a convolution, which holds the window first
        found = found.reshape(4, 3, -1).swapaxes(0, 1).reshape(found.shape)
    return w + found


def test_the_update_is_a_kronecker_product(setting):
    promises.check_formula(setting, formula, STACKED)


def test_every_form_is_among_the_settings():
    plans = [
        lk.resolve(lk.Spec({"*": lk.LoKr(**options)}), promises.params(), promises.fn, promises.inputs())
        for options in SETTINGS.values()
    ]
    assert {sizes(site).decomposed for plan in plans for site in plan.sites} == set(product((False, True), repeat=2))


def test_rows_never_exceed_min_of_in_and_out(setting):
    plan, base, factors = promises.prepared(setting)
    for site in plan.sites:
        assert update_of(site, base[site.path], factors[site.path], 1.0).a.shape[0] <= site.max_rank


@pytest.mark.parametrize("name", ["one decomposed", "none decomposed", "both decomposed"])
def test_the_start_changes_no_bit(name):
    promises.check_start(lk.LoKr(**SETTINGS[name]))


@pytest.mark.parametrize("name", ["one decomposed", "none decomposed", "both decomposed"])
def test_gradients_equal_autodiff_through_the_merged_weights(name):
    promises.check_gradients(lk.LoKr(**SETTINGS[name]))


def test_leaves_of_bfloat16():
    promises.check_bfloat16(lk.LoKr(rank=1))


def test_trials_of_equal_form_stack(standard_promotion):
    """8 x 9 and 9 x 8 with factor 2: W2 is (4 or 9) x (9 or 4), decomposed below rank 4.5."""
    promises.check_stacking(variant="lokr", settings={"lokr": {"factor": 2}})


def test_trials_of_different_form_do_not_stack(standard_promotion):
    """Most square, W2 is 4 x 3: decomposed at rank 1, dense at rank 3."""
    promises.check_stacking(False, variant="lokr")


def test_packing_trials_of_different_form_says_so():
    study, problem = tiny.study(rank=[1, 3], seed=[0], probe_lr=(), variant="lokr"), tiny.problem()
    ((trials, _),) = kinds(study, problem, study.trials())
    params = problem.params(jax.random.key(0))
    plan = union_plan(study, problem, trials, params, next(problem.train(0, 0)))
    with pytest.raises(lk.StudyError) as e:
        pack(study, problem, trials, plan, params)
    assert str(e.value) == (
        "trials of these ranks do not fit one stack: w2 at 'down/kernel' is none in one, (3, 4) in another.\n"
        "  pack those apart that `lorax_kit.study.programs.forms.stacks` keeps apart"
    )


def test_the_start_is_pefts():
    """W1 zero; A2 uniform to 1 / sqrt(n), B2 to 1 / sqrt(rank). 400 = 20 x 20, 300 = 15 x 20."""
    f = promises.leaves_of(lk.LoKr(rank=5), jnp.zeros((400, 300)))
    assert f.w1.shape == (20, 15)
    assert not np.any(f.w1)
    for x, bound in ((f.a2, 20**-0.5), (f.b2, 5**-0.5)):
        assert 0.9 * bound < float(jnp.abs(x).max()) <= bound
        assert float(x.std()) == pytest.approx(bound / 3**0.5, rel=0.15)


def test_factors():
    assert [factorization(n, -1) for n in (1, 7, 12, 127, 128, 384, 576)] == [
        (1, 1), (1, 7), (3, 4), (1, 127), (8, 16), (16, 24), (24, 24),
    ]  # fmt: skip
    assert [factorization(128, f) for f in (4, 5, 64, 200)] == [(4, 32), (4, 32), (64, 2), (8, 16)]


@pytest.mark.interop
def test_factors_are_pefts():
    theirs = pytest.importorskip("peft.tuners.lokr.layer").factorization
    for n in range(1, 130):
        for f in (-1, 1, 2, 3, 5, 8, 12, 30):
            assert factorization(n, f) == theirs(n, f), (n, f)


def test_bad_settings():
    promises.check_refused(
        lk.LoKr,
        [
            ({"rank": 2, "factor": 0}, f"factor is 0; {FACTOR}"),
            ({"rank": 2, "factor": 2.0}, f"factor is 2.0; {FACTOR}"),
            ({"rank": 2, "decompose_both": "no"}, "decompose_both is 'no'; it must be true or false."),
            ({"rank": 2, "alpha": "x"}, "alpha is 'x'; it must be a positive number of float32's range."),
        ],
    )
