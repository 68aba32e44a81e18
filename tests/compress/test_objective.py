"""The exact solver against many starts of a general one, and against what the formulas say."""

import numpy as np
import pytest
from scipy.optimize import minimize

import lorax_kit as lk
from lorax_kit.compress import objective, solve, solve_by_gradient


def problems(seed, n):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        m, k = rng.integers(1, 8, 2)
        rank = int(rng.integers(1, min(m, k) + 1))
        w = rng.normal(size=(m, k)) * 10 ** rng.uniform(-1, 1)
        if rng.random() < 0.3:  # values far apart: several stationary points
            u, s, vt = np.linalg.svd(w, full_matrices=False)
            w = (u * s.max() * np.where(np.arange(len(s)) == 0, 10.0, 1.0)) @ vt
        lam, mu = np.linalg.norm(w) * 10 ** rng.uniform(-3, 0.5, 2)
        yield w, rank, lam, mu


def value_and_grad(w, rank, lam, mu, squared):
    m, k = w.shape

    def fn(z):
        a, b = z[: m * rank].reshape(m, rank), z[m * rank :].reshape(rank, k)
        rest = a @ b - w
        na, nb = np.linalg.norm(a), np.linalg.norm(b)
        if squared:
            value, da, db = lam * na**2 + mu * nb**2, 2 * lam * a, 2 * mu * b
        else:
            value, da, db = lam * na + mu * nb, lam * a / max(na, 1e-300), mu * b / max(nb, 1e-300)
        return 0.5 * (rest**2).sum() + value, np.concatenate([(rest @ b.T + da).ravel(), (a.T @ rest + db).ravel()])

    return fn


@pytest.mark.parametrize("squared", [False, True])
def test_never_above_the_best_of_many_starts(squared):
    rng = np.random.default_rng(1)
    for w, rank, lam, mu in problems(0, 10):  # experiments/solver.py has 500
        found = solve(w, rank, lam, mu, squared=squared)
        fn = value_and_grad(w, rank, lam, mu, squared)
        own = fn(np.concatenate([found.a.ravel(), found.b.ravel()]))[0]
        assert own == pytest.approx(found.objective, rel=1e-9, abs=1e-12)
        starts = [np.linalg.norm(w) ** 0.5 * rng.normal(size=(sum(w.shape)) * rank) for _ in range(4)]
        options = {"maxiter": 3000, "ftol": 1e-15, "gtol": 1e-10}
        best = min(minimize(fn, z, jac=True, method="L-BFGS-B", options=options).fun for z in starts)
        assert found.objective <= best * (1 + 1e-8)


def test_without_a_penalty_it_is_the_truncated_decomposition():
    w = np.random.default_rng(0).normal(size=(9, 6))
    a, b, value = solve(w, 2)
    s = np.linalg.svd(w, compute_uv=False)
    assert value == pytest.approx(0.5 * (s[2:] ** 2).sum(), rel=1e-12)
    assert 0.5 * ((w - a @ b) ** 2).sum() == pytest.approx(value, rel=1e-12)


def test_a_penalty_too_high_gives_zero_and_small_values_are_dropped():
    w = np.diag([3.0, 2.0, 0.01])
    assert not solve(w, 3, 50.0, 50.0).a.any()
    kept = solve(w, 3, 0.05, 0.05)
    assert (np.abs(kept.a).sum(0) > 0).tolist() == [True, True, False]


def test_factors_share_the_penalty_evenly_and_keep_the_dtype():
    w = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    a, b, value = solve(w, 4, 0.3, 1.2)
    assert a.dtype == b.dtype == np.float32
    assert 0.3 * np.linalg.norm(a) == pytest.approx(1.2 * np.linalg.norm(b), rel=1e-5)
    assert float(objective(w, a, b, 0.3, 1.2)) == pytest.approx(value, rel=1e-5)


def test_the_gradient_solver_comes_close_from_above(key, standard_promotion):
    w = np.random.default_rng(0).normal(size=(12, 10)).astype(np.float32)
    exact = solve(w, 3, 0.5, 0.5)
    near = solve_by_gradient(w, 3, 0.5, 0.5, key, steps=2000)
    assert exact.objective * (1 - 1e-6) <= near.objective <= exact.objective * 1.001


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("scale", [1e-120, 1e-30, 1e30, 1e120])
def test_any_scale_is_the_same_problem(scale, squared):
    w = np.random.default_rng(0).normal(size=(6, 5))
    own = scale ** (1.0 if squared else 1.5)
    one, other = solve(w, 3, 0.3, 0.7, squared=squared), solve(w * scale, 3, 0.3 * own, 0.7 * own, squared=squared)
    assert other.objective == pytest.approx(one.objective * scale**2, rel=1e-9)
    np.testing.assert_allclose(other.a @ other.b / scale, one.a @ one.b, atol=1e-9)


@pytest.mark.parametrize("spectrum", [[1.0, 1e-7, 1e-12], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
def test_a_small_objective_of_large_numbers_is_that_of_the_factors(spectrum):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in (7, 5))
    w = (u * spectrum) @ v.T
    for rank in (1, 2, 3):
        a, b, value = solve(w, rank, 1e-7, 2e-7)
        own = 0.5 * ((w - a @ b) ** 2).sum() + 1e-7 * np.linalg.norm(a) + 2e-7 * np.linalg.norm(b)
        assert value == pytest.approx(own, rel=1e-9)


def test_the_gradient_solver_takes_the_steps_it_is_told(key, standard_promotion):
    w = np.random.default_rng(0).normal(size=(12, 10)).astype(np.float32)
    found = [solve_by_gradient(w, 3, 0.5, 0.5, key, steps=steps).objective for steps in (1, 30, 1000)]
    assert found == sorted(found, reverse=True)
    assert found[-1] <= solve(w, 3, 0.5, 0.5).objective * (1 + 1e-4)  # the defaults


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(3), 1), "must be a matrix"),
        ((np.array([[np.nan, 1.0]]), 1), "not finite"),
        ((np.ones((3, 2)), 3), "rank is 3; it must be 1 to min"),
        ((np.ones((3, 2)), True), "rank is True"),
        ((np.ones((3, 2)), 1, -1.0, 1.0), "lam is -1.0"),
        ((np.ones((3, 2)), 1, 1.0, float("nan")), "mu is nan"),
        ((np.ones((3, 2)), 1, 0.0, 1.0), "grows for ever"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(lk.compress.CompressError, match=message):
        solve(*arguments)
