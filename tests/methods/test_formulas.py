"""The formulas hold what their papers promise of them: numbers in float64, no package of ours, no torch."""

import numpy as np
import pytest

from tests.methods import formulas as f

IN, OUT, RANK = 12, 8, 3


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


W = drawn(IN, OUT)
A, B = drawn(RANK, IN, seed=1), drawn(RANK, OUT, seed=2)


def test_each_method_changes_nothing_at_its_zero():
    zero_a, zero_b = np.zeros_like(A), np.zeros_like(B)
    pairs = drawn(2, IN, seed=3).repeat(2, axis=0)  # equal neighbours: two reflections undo each other
    left, right = drawn(3, 2), np.zeros((4, 4))
    at_zero = {
        "lora": f.lora(W, A, zero_b, 2.0),
        "dora": f.dora(W, A, zero_b, np.linalg.norm(W, axis=0), 2.0),
        "vera": f.vera(W, A, B, np.full(RANK, 0.1), np.zeros(OUT)),
        "lora_xs": f.lora_xs(W, A, B, np.zeros((RANK, RANK)), 2.0),
        "delora": f.delora(W, A, zero_b, 15.0),
        "loha": f.loha(W, A, B, A, zero_b, 2.0),
        "lokr": f.lokr(W, left, right, 2.0),
        "miss": f.miss(W, zero_b),
        "miss_bat": f.miss_bat(W, np.zeros((2, 4, 4))),
        "hra": f.hra(W, pairs),
        "hra_of_zero_rows": f.hra(W, zero_a),
        "ia3": f.ia3(W, np.ones(OUT), feedforward=False)[0],
        "adalora": f.adalora(W, A, np.zeros(RANK), B, 2.0),
    }
    for name, w in at_zero.items():
        np.testing.assert_allclose(w, W, atol=1e-14, err_msg=name)


def test_ranks_of_updates_are_what_the_papers_say():
    def rank(w):
        return np.linalg.matrix_rank(w - W)

    assert rank(f.loha(W, A[:2], B[:2], A[1:], B[1:], 1.0)) == 4
    assert rank(f.lokr(W, drawn(3, 2), (drawn(1, 4), drawn(1, 4, seed=5)), 1.0)) == 2
    assert rank(f.miss(W, B)) == RANK
    assert rank(f.hra(W, A)) == RANK
    assert rank(f.miss_bat(W, drawn(2, 4, 4))) == OUT


def test_doras_columns_have_the_length_of_the_magnitude():
    magnitude = 1 + np.arange(OUT) / 3
    np.testing.assert_allclose(np.linalg.norm(f.dora(W, A, B, magnitude, 2.0), axis=0), magnitude, rtol=1e-14)


def test_deloras_update_is_bounded_and_blind_to_the_length_of_its_rows():
    w = f.delora(W, A, B, 0.7, norm="whole", floor=0)
    assert np.linalg.norm(w - W) <= 0.7 * np.linalg.norm(W)
    long = f.delora(W, A * np.array([[2.0], [30.0], [0.1]]), B, 0.7, norm="whole", floor=0)
    np.testing.assert_allclose(long, w, atol=1e-14)


@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_hra_keeps_every_length(gram_schmidt):
    w = f.hra(W, A, gram_schmidt=gram_schmidt)
    np.testing.assert_allclose(w.T @ w, W.T @ W, atol=1e-13)


def test_lokr_of_factors_is_lokr_of_their_products():
    left, right = (drawn(2, 3), drawn(2, 2)), (drawn(2, 4), drawn(2, 4, seed=1))
    whole = f.lokr(W, left[0].T @ left[1], right[0].T @ right[1], 2.0)
    np.testing.assert_allclose(f.lokr(W, left, right, 2.0), whole, atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_pissa_starts_as_the_top_of_the_svd(scale):
    a, b = f.pissa(W, RANK, scale)
    values = np.linalg.svd(W, compute_uv=False)
    np.testing.assert_allclose(scale * a.T @ b, f.svd_part(W, RANK), atol=1e-13)
    np.testing.assert_allclose(np.linalg.svd(W - scale * a.T @ b, compute_uv=False)[: OUT - RANK], values[RANK:])
    for x in (a, b):
        np.testing.assert_allclose(x @ x.T, np.diag(values[:RANK] / scale), atol=1e-13)


def test_olora_starts_as_the_first_rows_of_w():
    a, b = f.olora(W, RANK)
    np.testing.assert_allclose(b @ b.T, np.eye(RANK), atol=1e-14)
    np.testing.assert_allclose((a.T @ b)[:RANK], W[:RANK], atol=1e-14)
    np.testing.assert_allclose(a.T @ b, W @ b.T @ b, atol=1e-13)


def test_lora_xs_is_frozen_at_the_top_of_the_svd():
    a, b = f.lora_xs_frozen(W, RANK)
    np.testing.assert_allclose(a @ a.T, np.eye(RANK), atol=1e-14)
    np.testing.assert_allclose(f.lora_xs(W, a, b, -np.eye(RANK), 1.0), W - f.svd_part(W, RANK), atol=1e-13)


def test_eva_takes_the_directions_of_most_variance():
    x = drawn(50, IN) * 0.7 ** np.arange(IN) + 3
    a, explained = f.eva(x, RANK)
    covariance = np.cov(x.T)
    np.testing.assert_allclose(a @ a.T, np.eye(RANK), atol=1e-14)
    np.testing.assert_allclose(np.diag(a @ covariance @ a.T) / np.trace(covariance), explained, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.eigvalsh(covariance)[: -RANK - 1 : -1] / np.trace(covariance), explained)
    assert f.eva_ranks([np.array([0.5, 0.2, 0.1]), np.array([0.4, 0.3, 0.05]), np.array([0.15, 0.01])], 5) == [2, 2, 1]


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_splits_w_by_what_the_data_see(mode):
    x = drawn(40, IN) * 0.6 ** np.arange(IN)
    a, b = f.corda(W, x.T @ x, OUT, 2.0, mode=mode)
    np.testing.assert_allclose(2.0 * a.T @ b, W, atol=1e-10)
    a, b = f.corda(W, x.T @ x, RANK, 2.0, mode=mode)
    c = x.T @ x + 0.01 * np.trace(x.T @ x) / IN * np.eye(IN)
    values = np.linalg.svd(c @ W, compute_uv=False)
    taken = values[:RANK] if mode == "ipm" else values[-RANK:]
    np.testing.assert_allclose(np.linalg.svd(c @ (2.0 * a.T @ b), compute_uv=False)[:RANK], taken, rtol=1e-9)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_gas_first_step_is_the_best_of_rank_2r(direction):
    gradient = drawn(IN, OUT, seed=7)
    a, b = f.lora_ga(gradient, RANK, direction=direction, gamma=np.sqrt(OUT), paper=True)
    np.testing.assert_allclose(f.lora_ga_step(gradient, a, b), f.svd_part(gradient, 2 * RANK), atol=1e-13)


def test_the_orthogonal_start_is_a_zero_update_of_nonzero_leaves():
    basis = np.linalg.qr(drawn(4, 4))[0]
    a, b = f.orthogonal(basis, drawn(IN, 2), drawn(2, OUT))
    assert a.shape == (4, IN)
    assert b.shape == (4, OUT)
    np.testing.assert_allclose(a.T @ b, 0, atol=1e-15)
    assert min(np.linalg.norm(a), np.linalg.norm(b)) > 0.1


def test_each_round_of_loftq_comes_closer():
    def quantize(x):
        return np.round(2 * x) / 2

    errors = [np.linalg.norm(W - quantize(W))]
    for rounds in (1, 2, 5):
        q, a, b = f.loftq(W, RANK, quantize, rounds)
        rest = np.linalg.svd(W - q, compute_uv=False)[RANK:]
        errors.append(np.linalg.norm(W - q - a.T @ b))
        np.testing.assert_allclose(errors[-1], np.linalg.norm(rest), rtol=1e-12)
    assert errors == sorted(errors, reverse=True)


def test_adaloras_budget_falls_and_the_best_remain():
    settings = {"start": 12, "target": 6, "warmup": 3, "final": 5, "total": 20}
    budgets = [f.adalora_budget(t, **settings) for t in range(21)]
    assert budgets == [12, 12, 12, 12, 10, 9, 8, 7, 7, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6]
    masks = f.adalora_keep([np.array([0.1, 0.9, 0.5]), np.array([0.7, 0.2])], 3)
    assert [m.tolist() for m in masks] == [[False, True, True], [True, False]]
    basis = np.linalg.qr(drawn(IN, IN))[0][:RANK]
    assert f.adalora_penalty([(basis, 2 * basis)]) == pytest.approx(9 * RANK)
    assert f.adalora_penalty([(basis, 2 * basis)], squared=False) == pytest.approx(3 * np.sqrt(RANK) / 2)


def test_veras_first_draws_are_known():
    # `uniform_` of (2, 3), then of (2, 2), by torch 2.13 on a CPU generator of seed 0.
    a, b = f.vera_draws(2, 3, 2, seed=0)
    torch_a = [
        [-0.010587962344288826, 0.75864577293396, -1.1639615297317505],
        [-1.040774941444397, -0.5446904897689819, 0.3792317807674408],
    ]
    torch_b = [[-0.03431743383407593, 1.3733248710632324], [-0.15370918810367584, 0.4583223760128021]]
    np.testing.assert_array_equal(a, np.float32(torch_a))
    np.testing.assert_array_equal(b.T, np.float32(torch_b))
