"""AdaLoRA's budget against the paper's equations in float64 numpy; under jit, and for stacked trials under vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.methods import AdaLoRALeaves
from tests import tiny
from tests.draws import draw

pytestmark = pytest.mark.usefixtures("standard_promotion")

RATE, WARMUP, FINAL, TOTAL = 0.1, 4, 5, 24


def plan_of(rank=4):
    """A matrix, and two stacked ones: three matrices of `rank` triplets each; and a site of another method."""
    params = {"w": draw(0, 6, 5), "s": draw(1, 2, 5, 4), "v": draw(2, 4, 3)}
    rules = {"{w,s}": lk.AdaLoRA(rank=rank), "v": lk.LoRA(rank=2)}

    def fn(p, x):
        return jnp.einsum("end,edk->enk", x @ p["w"], p["s"]) @ p["v"]

    plan = lk.resolve(lk.Spec(rules), params, fn, jnp.ones((2, 7, 6)))
    assert plan.site("s").stack_shape == (2,)
    return plan, lk.split(params, plan, jax.random.key(0))[1]


def gradients(factors, steps):
    """Gradients of each step, whose sizes differ between triplets so that importance does."""
    rng = np.random.default_rng(5)
    out = []
    for _ in range(steps):
        out.append(jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), factors))
    return out


def reference(factors, grads, target, interval, beta=0.85):
    """Masks and e of every step by loops over triplets: SGD, eqs. 7 to 12 and the choice after the step."""
    f = {p: {k: np.asarray(x, np.float64) for k, x in factors[p]._asdict().items()} for p in ("w", "s")}
    smooth = {p: {k: 0 * f[p][k] for k in "aeb"} for p in f}
    doubt = {p: {k: 0 * f[p][k] for k in "aeb"} for p in f}
    names = [(p, i) for p in ("s", "w") for i in np.ndindex(f[p]["e"].shape)]
    first, last = len(names), 3 * target
    rows = []
    for t, g in enumerate(grads, 1):
        g = {p: {k: np.asarray(x, np.float64) for k, x in g[p]._asdict().items()} for p in f}
        for p in f:
            for k in "aeb":
                now = abs(f[p][k] * g[p][k])
                smooth[p][k] = beta * smooth[p][k] + (1 - beta) * now
                doubt[p][k] = beta * doubt[p][k] + (1 - beta) * abs(now - smooth[p][k])
                f[p][k] = f[p][k] - RATE * g[p][k]
        score = {}
        for p, i in names:
            s = {k: smooth[p][k][i] * doubt[p][k][i] for k in "aeb"}
            score[p, i] = s["e"] + np.mean(s["a"]) + np.mean(s["b"])
        left = max(0, 1 - (t - WARMUP) / (TOTAL - FINAL - WARMUP)) if t > WARMUP else 1
        budget = int(last + (first - last) * left**3 + 1e-9)
        best = sorted(names, key=lambda n: -score[n])[:budget]
        for p, i in names:
            if t == TOTAL - FINAL:
                f[p]["mask"][i] = (p, i) in best
            if t >= TOTAL - FINAL:
                f[p]["e"][i] *= f[p]["mask"][i]
            elif t > WARMUP and t % interval == 0 and (p, i) not in best:
                f[p]["e"][i] = 0
        rows.append({p: {k: x.copy() for k, x in f[p].items()} for p in f})
    return rows


def run(tx, factors, grads):
    state = tx.init(factors)

    @jax.jit
    def step(factors, state, g):
        updates, state = tx.update(g, state, factors)
        return optax.apply_updates(factors, updates), state

    for g in grads:
        factors, state = step(factors, state, g)
        yield factors


@pytest.mark.parametrize("interval", [1, 3])
def test_the_budget_is_the_papers(interval):
    plan, factors = plan_of()
    grads = gradients(factors, TOTAL + 2)
    tx = lk.adalora_budget(lk.partition(optax.sgd(RATE), plan), plan, 2, WARMUP, FINAL, TOTAL, interval=interval)
    wanted, zero_before, back = reference(factors, grads, 2, interval), None, 0
    for t, (ours, want) in enumerate(zip(run(tx, factors, grads), wanted, strict=True), 1):
        for p in ("w", "s"):
            for k in ("mask", "e", "a", "b"):
                np.testing.assert_allclose(getattr(ours[p], k), want[p][k], atol=1e-5, err_msg=f"step {t} {p}:{k}")
        zero = np.concatenate([np.ravel(ours[p].e == 0) for p in ("w", "s")])
        assert t > WARMUP or not zero.any()
        if zero_before is not None and t < TOTAL - FINAL:
            back += np.sum(zero_before & ~zero)
        zero_before = zero
    assert back > 0  # triplets came back while the budget fell
    assert zero.sum() == 12 - 6
    assert sum(float(ours[p].mask.sum()) for p in ("w", "s")) == 6
    assert float(jnp.abs(ours["v"].b).max()) > 0.1  # the other method is trained as ever


def padded(tree, like):
    def pad(x, s):
        return np.pad(x, [(0, m - n) for n, m in zip(x.shape, s.shape, strict=True)])

    return jax.tree.map(pad, tree, like)


def test_stacked_trials_of_different_rank_share_out_their_own_budgets():
    budgets, ranks = (2.0, 1.0), (4, 2)
    plan, factors = plan_of(max(ranks))
    starts, solos, all_grads = [], [], []
    for rank, target in zip(ranks, budgets, strict=True):
        own_plan, own = plan_of(rank)
        grads = gradients(own, TOTAL)
        tx = lk.adalora_budget(lk.partition(optax.adam(RATE), own_plan), own_plan, target, WARMUP, FINAL, TOTAL)
        *_, last = run(tx, own, grads)
        solos.append(last)
        starts.append(padded(own, factors))
        all_grads.append([padded(g, factors) for g in grads])
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731

    def make(target):
        return lk.adalora_budget(lk.partition(optax.adam(RATE), plan), plan, target, WARMUP, FINAL, TOTAL)

    targets = jnp.asarray(budgets)
    state = jax.vmap(lambda f, b: make(b).init(f))(stack(starts), targets)

    @jax.jit
    def step(factors, state, g):
        def one(f, s, g, target):
            updates, s = make(target).update(g, s, f)
            return optax.apply_updates(f, updates), s

        return jax.vmap(one)(factors, state, g, targets)

    now = stack(starts)
    for g in zip(*all_grads, strict=True):
        now, state = step(now, state, stack(g))
    for i, (rank, alone) in enumerate(zip(ranks, solos, strict=True)):
        for p in ("w", "s"):
            for k in AdaLoRALeaves._fields:
                x = np.asarray(getattr(now[p], k)[i])
                np.testing.assert_allclose(x[:rank], getattr(alone[p], k), atol=1e-5, err_msg=f"rank {rank} {p}:{k}")
                assert not np.any(x[rank:])
        assert sum(float(now[p].mask[i].sum()) for p in ("w", "s")) == 3 * budgets[i]


def test_training_with_a_budget_ends_within_it_and_merges_what_is_left():
    problem = tiny.problem()
    params = tiny.params(jax.random.key(0))
    spec = lk.Spec({"{up,down}/kernel": lk.AdaLoRA(rank=3, alpha=8)})
    plan = lk.resolve(spec, params, tiny.apply, next(tiny.stream(0, 0)))
    base, factors = lk.split(params, plan, jax.random.key(1))
    adapted = lk.adapt(tiny.apply, plan)
    tx = lk.adalora_budget(lk.partition(optax.adam(2e-2), plan, clip=1.0), plan, 2, 2, 6, 20)
    init, step = lk.make_step(lambda b, f, x: problem.loss(adapted(b, f, x), x) + lk.penalty(plan, f), tx)
    state, losses, batches = init(factors), [], tiny.stream(0, 0)
    for _ in range(20):
        state, info = step(state, base, next(batches))
        losses.append(float(info.loss))
    assert losses[-1] < losses[0]
    masks = np.concatenate([state.factors[p].mask for p in ("up/kernel", "down/kernel")])
    assert sorted(masks) == [0, 0, 1, 1, 1, 1]
    merged = lk.merge(base, state.factors, plan)
    for path, kernel in (("up/kernel", "up"), ("down/kernel", "down")):
        left = int(state.factors[path].mask.sum())
        delta = np.asarray(merged[kernel]["kernel"] - base[kernel]["kernel"], np.float64)
        assert np.linalg.matrix_rank(delta, tol=1e-4) == left


WANTED = "it must be a positive number, at most the rank 4 of the sites."


def test_a_budget_within_a_partition_says_where_it_goes():
    params = {"w": draw(0, 6, 5)}
    plan = lk.resolve(lk.Spec({"w": lk.AdaLoRA(rank=4)}), params)
    _, factors = lk.split(params, plan, jax.random.key(0))
    tx = lk.partition(lk.adalora_budget(optax.sgd(0.1), plan, 2, 1, 1, 9), plan)
    with pytest.raises(lk.PlanError, match="a partition hides factors from adalora_budget, which goes around it"):
        tx.init(factors)


def test_bad_arguments():
    plan, _ = plan_of()
    tx = optax.sgd(0.1)
    table = [
        ((plan, 0, 1, 1, 9), {}, f"target_rank is 0; {WANTED}"),
        ((plan, 5, 1, 1, 9), {}, f"target_rank is 5; {WANTED}"),
        ((plan, float("nan"), 1, 1, 9), {}, f"target_rank is nan; {WANTED}"),
        ((plan, "x", 1, 1, 9), {}, f"target_rank is 'x'; {WANTED}"),
        ((plan, 2, -1, 1, 9), {}, "warmup is -1; it must be an integer of at least 0."),
        ((plan, 2, 1, 1.5, 9), {}, "final is 1.5; it must be an integer of at least 0."),
        (
            (plan, 2, 5, 5, 9),
            {},
            "warmup 5 and final 5 leave none of 9 steps to share out the budget.\n  give warmup + final < total",
        ),
        ((plan, 2, 1, 1, 9), {"interval": 0}, "interval is 0; it must be an integer of at least 1."),
        ((plan, 2, 1, 1, 9), {"beta1": 1.0}, "beta1 is 1.0; it must lie in [0, 1)."),
        ((plan, 2, 1, 1, 9), {"beta2": -0.1}, "beta2 is -0.1; it must lie in [0, 1)."),
        (
            (lk.resolve(lk.Spec({"w": lk.LoRA(rank=1)}), {"w": jnp.ones((3, 2))}), 2, 1, 1, 9),
            {},
            "the plan has no site of lk.AdaLoRA for a budget; its methods: lora.",
        ),
    ]
    for args, options, says in table:
        with pytest.raises(lk.PlanError) as e:
            lk.adalora_budget(tx, *args, **options)
        assert str(e.value) == says
