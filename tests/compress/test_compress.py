"""Decompositions, rank allocation, replacement, pruning and healing."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.arrays.svd import leading, randomised
from lorax_kit.compress import (
    METHODS,
    CompressError,
    CompressPlan,
    LowRank,
    allocate,
    calibrate,
    candidate,
    compress,
    compressed,
    heal,
    plan_ranks,
    prune,
)
from lorax_kit.compress.allocate import _points, cost
from lorax_kit.compress.decompose import Transform, singular_values, transform
from tests.draws import draw


def mlp(p, x):
    return jnp.tanh(x @ p["up"]) @ p["down"]


@pytest.fixture(scope="module")
def model():
    """(params, sites, stats, x): a two-layer model whose inputs differ much in size."""
    params = {"up": draw(0, 24, 32), "down": draw(1, 32, 12)}
    x = draw(2, 200, 24) * jnp.linspace(0.05, 3, 24)[None] @ draw(3, 24, 24)
    sites = lk.resolve(lk.Spec({"*": lk.LoRA(rank=1)}), params, mlp, x)
    stats = calibrate(mlp, params, sites, [x[:100], x[100:]], loss=lambda y, _: jnp.mean(y**2), progress=False)
    return params, sites, stats, x


def test_each_method_is_best_in_its_own_norm(model):
    params, sites, stats, _ = model
    w = np.asarray(params["up"], np.float64)
    found = {m: compress(params, CompressPlan(method=m, sites=sites, ranks={"up": 8}), stats)["up"] for m in METHODS}
    for own in METHODS:
        t = transform(own, stats, "up")
        errors = {m: np.linalg.norm(t.apply(w - np.asarray(f.restore(), np.float64))) for m, f in found.items()}
        assert min(errors, key=errors.get) == own
        assert errors[own] ** 2 == pytest.approx((singular_values(w, t)[8:] ** 2).sum(), rel=1e-3)


def test_the_whitened_loss_is_the_error_of_the_outputs(model):
    params, sites, stats, x = model
    small = compress(params, CompressPlan(method="whitened", sites=sites, ranks={"up": 8}), stats)
    s = singular_values(np.asarray(params["up"]), transform("whitened", stats, "up"))
    error = x @ params["up"] - compressed(lambda p, x: x @ p["up"])(small, x)
    assert float(jnp.sum(error**2)) == pytest.approx((s[8:] ** 2).sum(), rel=1e-3)


def test_the_original_is_untouched_and_the_rest_shared(model):
    params, sites, stats, _ = model
    before = jax.tree.map(np.array, params)
    small = compress(params, CompressPlan(method="whitened", sites=sites, ranks={"up": 4}), stats)
    assert small["down"] is params["down"]
    assert isinstance(small["up"], LowRank)
    jax.tree.map(np.testing.assert_array_equal, before, params)


def test_stacked_and_many_axed_parameters():
    params = {"experts": draw(0, 3, 8, 6), "heads": draw(1, 6, 2, 5)}

    def fn(p, x):
        return jnp.einsum("end,dhk->enhk", jnp.einsum("end,edh->enh", x, p["experts"]), p["heads"])

    x = draw(2, 3, 9, 8)
    sites = lk.resolve(lk.Spec({"*": lk.LoRA(rank=1)}), params, fn, x)
    stats = calibrate(fn, params, sites, [x], progress=False)
    for method in ("svd", "whitened"):
        small = compress(params, CompressPlan(method=method, sites=sites, ranks={"experts": 3, "heads": 3}), stats)
        assert small["experts"].a.shape == (3, 3, 8)
        assert small["heads"].b.shape == (3, 2, 5)
        whole = {path: leaf.restore() for path, leaf in small.items()}
        assert jnp.allclose(compressed(fn)(small, x), fn(whole, x), atol=1e-4)
    whole = compress(params, CompressPlan(method="svd", sites=sites, ranks={"experts": 3}))
    one = np.asarray(params["experts"][1], np.float64)
    u, s, vt = np.linalg.svd(one)
    np.testing.assert_allclose(whole["experts"].restore()[1], (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)


def test_singular_data_are_damped():
    params = {"w": draw(0, 10, 8)}
    fn, x = lambda p, x: x @ p["w"], draw(1, 3, 10)  # three inputs for ten dimensions
    sites = lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), params, fn, x)
    stats = calibrate(fn, params, sites, [x], progress=False)
    small = compress(params, CompressPlan(method="whitened", sites=sites, ranks={"w": 3}), stats)
    assert jnp.allclose(compressed(fn)(small, x), fn(params, x), atol=1e-3)  # rank 3 holds all that was seen
    assert transform("whitened", stats, "w").damping > 0


def test_leading_triples_by_either_way():
    for shape in ((30, 20), (20, 30)):
        w = np.asarray(draw(0, *shape), np.float64)
        u, s, vt = leading(w, 7)
        exact = np.linalg.svd(w)
        np.testing.assert_allclose(s, exact[1][:7], rtol=1e-10)
        np.testing.assert_allclose((u * s) @ vt, (exact[0][:, :7] * exact[1][:7]) @ exact[2][:7], atol=1e-9)
    low = np.outer(np.arange(1.0, 6), np.arange(1.0, 5))
    u, s, vt = leading(low, 3)
    np.testing.assert_allclose((u * s) @ vt, low, atol=1e-10)
    assert not leading(np.zeros((4, 3)), 2)[1].any()


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
@pytest.mark.parametrize("fall", [1.0, 0.7, 0.1])
def test_what_truncations_lose_is_exact(shape, fall):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 30)))[0] for n in shape)
    s = fall ** np.arange(30)
    found = singular_values((u * s) @ v.T, Transform())
    tails, exact = (np.cumsum(x[::-1] ** 2)[::-1] for x in (found, s))
    np.testing.assert_allclose(tails, exact, atol=1e-13 * exact[0])
    assert (np.diff(found) <= 0).all()


def test_scales_at_which_squares_over_or_underflow():
    w = np.asarray(draw(0, 6, 5), np.float64)
    s = np.linalg.svd(w, compute_uv=False)
    for scale in (1e-200, 1e200):
        np.testing.assert_allclose(singular_values(w * scale, Transform()) / scale, s, rtol=1e-9)
        np.testing.assert_allclose(leading(w * scale, 3)[1] / scale, s[:3], rtol=1e-9)


def test_fisher_counts_sites_of_many_outputs_no_more_than_others():
    params, x = {"w": draw(0, 6, 4)}, draw(1, 5, 6)
    wide = {"w": jnp.concatenate([params["w"]] * 8, axis=1)}
    fn, loss = lambda p, x: x @ p["w"], lambda y, x: jnp.sum(jnp.sin(y))
    fishers = [
        calibrate(fn, p, lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), p, fn, x), [x], loss=loss, progress=False)["w"]
        for p in (params, wide)
    ]
    np.testing.assert_allclose(fishers[0].fisher, fishers[1].fisher, rtol=1e-5)


def test_randomised_comes_close(key):
    u, _, vt = np.linalg.svd(np.asarray(draw(0, 80, 60), np.float64), full_matrices=False)
    w = (u * 0.8 ** np.arange(60)) @ vt
    q, s, p = randomised(w, 8, key)
    best = np.linalg.norm(0.8 ** np.arange(8, 60))
    assert np.linalg.norm(w - (q * s) @ p) <= 1.01 * best


def brute(candidates, budget):
    """The least loss of all choices of ranks within a budget."""
    options = [[*range(1, c.most + 1), None] for c in candidates.values()]
    choices = [dict(zip(candidates, ranks, strict=True)) for ranks in itertools.product(*options)]
    return min(loss_of(candidates, ranks) for ranks in choices if cost(candidates, ranks) <= budget)


def loss_of(candidates, ranks):
    return sum(0.0 if r is None else candidates[p].losses[r] for p, r in ranks.items())


def test_allocation_falls_short_of_the_best_of_all_by_less_than_one_segment():
    rng, exact = np.random.default_rng(0), 0
    for _ in range(60):
        spectra = [np.sort(rng.exponential(size=(1, 5)))[:, ::-1] * 10 ** rng.uniform(-1, 1) for _ in range(3)]
        found = {str(i): candidate(s, 12, 5) for i, s in enumerate(spectra)}
        budget = rng.uniform(0.35, 1) * sum(c.dense for c in found.values())
        ranks = allocate(found, budget / sum(c.dense for c in found.values()))
        assert cost(found, ranks) <= budget
        best, loss = brute(found, budget), loss_of(found, ranks)
        hulls = [_points(c, 1, 1.0) for c in found.values()]
        segment = max(a[1] - b[1] for hull in hulls for a, b in itertools.pairwise(hull))
        assert best - 1e-9 <= loss < best + segment
        exact += loss <= best * (1 + 1e-9) + 1e-12
    assert exact > 30  # of 60


def test_uniform_keeps_the_same_share_everywhere(model):
    params, sites, *_ = model
    plan = plan_ranks(params, sites, keep=0.5, method="svd", allocation="uniform")
    assert dict(plan.ranks) == {"up": int(0.5 * 24 * 32 / 56), "down": int(0.5 * 32 * 12 / 44)}
    assert plan.kept <= 0.5


def test_plans_are_hashable_and_keep_no_more_than_asked(model):
    params, sites, stats, _ = model
    for allocation in ("loss", "energy"):
        for keep in (0.2, 0.5, 0.9, 1.0):
            plan = plan_ranks(params, sites, keep=keep, method="whitened", stats=stats, allocation=allocation)
            assert isinstance(hash(plan), int)
            assert plan.kept <= keep + 1e-9
    assert plan.ranks == ()


def test_a_budget_of_bytes_counts_each_sites_dtype(model):
    """An fp16 site gives a rank for half of what it costs in fp32."""
    params = model[0] | {"down": model[0]["down"].astype(jnp.float16)}
    sites = lk.resolve(lk.Spec({"{up,down}": lk.LoRA(rank=1)}), params)
    total = 4 * 24 * 32 + 2 * 32 * 12
    for budget in (total // 3, total // 2, 2 * total):
        plan = plan_ranks(params, sites, max_bytes=budget, method="svd")
        small = compress(params, plan)
        stored = sum(x.nbytes for x in jax.tree.leaves({k: small[k] for k in ("up", "down")}))
        one_rank_more = min(4 * (24 + 32), 2 * (32 + 12))
        assert budget - one_rank_more < stored <= budget or (stored == total and plan.ranks == ())
    for keeps in ({}, {"keep": 0.5, "max_bytes": 100}):
        with pytest.raises(CompressError, match="give one budget"):
            plan_ranks(params, sites, method="svd", **keeps)
    with pytest.raises(CompressError, match=rf"max_bytes=9 of {total}: "):
        plan_ranks(params, sites, max_bytes=9, method="svd")
    quantised = lk.quantize(params, ["up"], "int8")
    with pytest.raises(CompressError, match="'up' is quantised"):
        plan_ranks(quantised, sites, max_bytes=total, method="svd")


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_pruning_keeps_what_counts_most(model, method):
    params, sites, stats, _ = model
    half = prune(params, sites, keep=0.5, method=method, stats=stats)
    pairs = prune(params, sites, keep=0.5, method=method, stats=stats, pattern="2:4")
    for path in params:
        for pruned in (half, pairs):
            kept = pruned[path] != 0
            assert float(kept.mean()) == 0.5
            np.testing.assert_array_equal(np.asarray(pruned[path])[kept], np.asarray(params[path])[kept])
        fours = np.asarray(pairs[path] != 0).reshape(-1, 4, params[path].shape[1]).sum(1)
        assert (fours == 2).all()


def test_wanda_loses_less_where_inputs_differ_in_size(model):
    params, sites, _, _ = model
    x = draw(4, 200, 24) * jnp.linspace(0.05, 3, 24)[None]
    stats = calibrate(mlp, params, sites, [x], progress=False)
    by_inputs, by_size = (prune(params, sites, keep=0.5, method=m, stats=stats) for m in ("wanda", "magnitude"))
    errors = [float(jnp.linalg.norm(x @ (params["up"] - p["up"]))) for p in (by_inputs, by_size)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("rank", [2, None])
def test_healing_lowers_the_loss_and_grows_nothing(model, rank, standard_promotion):
    params, sites, _, x = model
    wanted = mlp(params, x)
    small = compress(params, CompressPlan(method="svd", sites=sites, ranks={"up": 4, "down": 4}))

    def loss(y, x):
        return jnp.mean((y - mlp(params, x)) ** 2)

    before = loss(compressed(mlp)(small, x), x)
    healed = heal(
        mlp, small, loss, itertools.repeat(x), jax.random.key(0), steps=60, lr=1e-2, rank=rank, progress=False
    )
    assert loss(compressed(mlp)(healed, x), x) < 0.8 * before
    assert jax.tree.structure(healed) == jax.tree.structure(small)
    assert lk.paths(healed) == lk.paths(small)
    assert wanted.shape == (200, 12)


def test_healing_leaves_quantised_leaves_as_they_are(model, standard_promotion):
    params, sites, _, x = model
    small = compress(params, CompressPlan(method="svd", sites=sites, ranks={"up": 4}))
    mixed = lk.quantize(small, ["down"], "int8")
    loss = lambda y, x: jnp.mean((y - mlp(params, x)) ** 2)  # noqa: E731
    healed = heal(mlp, mixed, loss, [x] * 4, jax.random.key(0), steps=4, progress=False)
    assert jax.tree.structure(healed) == jax.tree.structure(mixed)
    assert healed["down"] is mixed["down"]
    with pytest.raises(CompressError, match="heal first, then"):
        heal(mlp, lk.quantize(small, ["up/*"], "int8"), loss, [x] * 4, jax.random.key(0), steps=4)


def test_compressing_over_a_quantised_base_takes_what_it_restores(model):
    params, sites, _, _ = model
    base = lk.quantize(params, ["*"], "int8")
    plan = plan_ranks(base, sites, keep=0.5, method="svd")
    ours = compress(base, plan)["up"].restore()
    theirs = compress(jax.tree.map(lambda x: x.restore(), base, is_leaf=lambda x: hasattr(x, "codes")), plan)["up"]
    np.testing.assert_array_equal(ours, theirs.restore())
    assert (prune(base, sites, keep=0.5, method="magnitude")["up"] != 0).mean() == 0.5


def test_healing_may_follow_the_original(standard_promotion):
    from lorax_kit.compress import distillation

    params, x = {"up": draw(0, 6, 16), "down": draw(1, 16, 3)}, draw(2, 64, 6)
    sites = lk.resolve(lk.Spec({"*": lk.LoRA(rank=1)}), params, mlp, x)
    small = compress(params, CompressPlan(method="svd", sites=sites, ranks={"up": 2, "down": 2}))
    labels = jnp.argmax(mlp(params, x), -1)

    def hard(logits, x):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    loss = distillation(lambda x: mlp(params, x), hard, share=1.0)
    assert float(loss(mlp(params, x), x)) == pytest.approx(0, abs=1e-5)
    healed = heal(mlp, small, loss, itertools.repeat(x), jax.random.key(0), steps=40, lr=1e-2, progress=False)
    assert loss(compressed(mlp)(healed, x), x) < loss(compressed(mlp)(small, x), x)


def by(method, sites):
    return CompressPlan(method=method, sites=sites, ranks={"up": 2, "down": 2})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, s, t: plan_ranks(p, s, keep=0.01, stats=t), "keep=0.01 is impossible"),
        (lambda p, s, t: plan_ranks(p, s, keep=1.5, stats=t), "keep is 1.5"),
        (lambda p, s, t: plan_ranks(p, s, keep=0.5), "needs calibration data"),
        (lambda p, s, t: plan_ranks(p, s, keep=0.5, method="pca"), "method 'pca' is unknown"),
        (lambda p, s, t: plan_ranks(p, s, keep=0.5, stats=t, allocation="x"), "allocation 'x' is unknown"),
        (lambda p, s, t: plan_ranks(p, s, keep=0.5, stats=t, minimum=40), "has more parameters than the matrix itself"),
        (lambda p, s, t: compress(p, CompressPlan(method="svd", sites=s, ranks={"up": 14})), "at least 1, and below"),
        (lambda p, s, t: compress(p | {"up": p["up"] * jnp.nan},
                                  by("svd", s)), "'up' holds values that are not finite"),
        (lambda p, s, t: compress(p, by("whitened", s),
                                  {k: m._replace(gram=m.gram * np.nan) for k, m in t.items()}), "are not finite"),
        (lambda p, s, t: compress(p, by("whitened", s),
                                  {k: m._replace(gram=m.gram * 0) for k, m in t.items()}), "are zero"),
        (lambda p, s, t: compress(p, by("fisher", s),
                                  {k: m._replace(fisher=None) for k, m in t.items()}), "lack what 'fisher' needs"),
        (lambda p, s, t: CompressPlan(method="svd", sites=s, ranks={"u": 2}), "'u' is no site of the plan"),
        (lambda p, s, t: prune(p, s, keep=0.5, method="x"), "pruning method 'x'"),
        (lambda p, s, t: prune(p, s, keep=0.4, pattern="2:4"), "0.5 for 2:4"),
        (lambda p, s, t: prune(p, s, keep=0.01, stats=t), "leaves nothing of"),
        (lambda p, s, t: prune(p | {"up": p["up"] * jnp.nan}, s, keep=0.5, stats=t), "not finite"),
        (lambda p, s, t: CompressPlan(method="zz", sites=s, ranks={}), "method 'zz' is unknown"),
        (lambda p, s, t: CompressPlan(method="svd", sites=s, ranks={"up": True}), "rank of 'up' is True"),
        (lambda p, s, t: plan_ranks(p, s, keep=0.5, stats=t, minimum=0), "minimum is 0"),
        (lambda p, s, t: lk.compress.distillation(None, None, temperature=float("nan")), "temperature is nan"),
        (lambda p, s, t: prune(p, s, keep=0.5), "'wanda' needs calibration data"),
        (lambda p, s, t: heal(mlp, p, None, iter(()), None, steps=9), "no parameter is low-rank"),
    ],
)  # fmt: skip
def test_bad_input(model, call, message):
    params, sites, stats, _ = model
    with pytest.raises(CompressError, match=message):
        call(params, sites, stats)
