"""Nested ranks: the first rows are the smaller adapters, at the same scale; one training serves them all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.training.nested import first_rows, nested
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")


def made(setting):
    problem = tiny.problem()
    params, batch = tiny.params(jax.random.key(0)), tiny.points(0, 64)
    spec = lk.Spec({"{up,down}/kernel": setting, "head/{kernel,bias}": lk.Full()})
    plan = lk.resolve(spec, params, problem.apply, batch)
    base, factors = lk.split(params, plan, jax.random.key(1))
    adapted = lk.adapt(problem.apply, plan)
    return problem, plan, base, factors, lambda base, f, batch, key: problem.loss(adapted(base, f, batch), batch)


@pytest.mark.parametrize("setting", [lk.LoRA(rank=4, alpha=3), lk.LoRA(rank=4, rslora=True), lk.DoRA(rank=4, alpha=2)])
def test_a_drawn_ranks_loss_is_that_of_the_adapter_of_its_first_rows(setting):
    problem, plan, base, factors, loss = made(setting)
    factors = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), factors)
    batch = tiny.points(3, 32)
    for rank in (1, 2, 4):
        small, own = first_rows(plan, factors, rank)
        assert {site.rank for site in small.sites} == {rank}
        assert [s.scale for s in small.sites] == pytest.approx([s.scale for s in plan.sites])
        wanted = problem.loss(tiny.apply(lk.merge(base, own, small), batch), batch)
        found = nested(loss, plan, [rank])(base, factors, batch, jax.random.key(0))
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_rows_beyond_the_drawn_rank_get_no_gradient_and_all_ranks_are_drawn():
    _, plan, base, factors, loss = made(lk.LoRA(rank=4))
    factors = jax.tree.map(lambda x: x + 0.1, factors)
    own = nested(loss, plan, [1, 3])
    seen = set()
    for i in range(12):
        grads = jax.grad(lambda f, i=i: own(base, f, tiny.points(0, 16), jax.random.key(i)))(factors)
        moved = np.flatnonzero(np.abs(np.asarray(grads["up/kernel"].a)).sum(axis=1))
        seen.add(len(moved))
        assert moved.tolist() == list(range(len(moved)))
    assert seen == {1, 3}


def test_one_training_comes_near_the_best_of_every_rank():
    """A linear map whose delta has singular values 3, 1 and 1/3: the best of rank r leaves the others' squares."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(8, 8)))[0] for _ in range(2))
    s = np.array([3, 1, 1 / 3, 0, 0, 0, 0, 0])
    w, x = rng.normal(size=(8, 8)).astype(np.float32), np.eye(8, dtype=np.float32)
    target = x @ (w + (u * s) @ v)
    plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=3)}), {"w": w}, lambda p, x: x @ p["w"], x)
    base, factors = lk.split({"w": jnp.asarray(w)}, plan, jax.random.key(0))
    adapted = lk.adapt(lambda p, x: x @ p["w"], plan)

    def loss(base, f, batch, key):
        return jnp.sum(jnp.square(adapted(base, f, x) - target))

    tx = lk.partition(optax.adam(optax.linear_schedule(0.05, 0, 1500)), plan)
    init, step = lk.make_step(nested(loss, plan, [1, 2, 3]), tx)
    state = init(factors, jax.random.key(2))
    for _ in range(1500):
        state, _ = step(state, base, x)
    for rank, best in ((1, 1 + 1 / 9), (2, 1 / 9), (3, 0.0)):
        small, own = first_rows(plan, state.factors, rank)
        found = float(np.sum(np.square(x @ np.asarray(lk.merge(base, own, small)["w"]) - target)))
        assert best - 1e-4 < found < 1.15 * best + 0.02, rank


def test_what_has_no_rows_or_too_few_says_so():
    _, plan, *_, loss = made(lk.LoRA(rank=2))
    for ranks, says in (([3], "rank 3 is above the rank 2"), ([0], "a nested rank is 0"), ([], "at least one rank")):
        with pytest.raises(lk.PlanError, match=says):
            nested(loss, plan, ranks)
    _, plan, *_ = made(lk.DeLoRA(rank=2))
    with pytest.raises(lk.PlanError, match="scales by its rank alone"):
        nested(loss, plan, [1])
    _, plan, *_ = made(lk.IA3())
    with pytest.raises(lk.PlanError, match=r"is above the rank|has no rows"):
        nested(loss, plan, [1])
    _, plan, factors, *_ = made(lk.LoRAXS(rank=2))
    for call in (lambda: nested(loss, plan, [1]), lambda: first_rows(plan, factors, 1)):
        with pytest.raises(lk.PlanError, match="cut to rank 1, is no adapter of that rank: its 'r'"):
            call()
    _, plan, *_ = made(lk.HRA(rank=2))
    with pytest.raises(lk.PlanError, match="nested rank 1 at "):
        nested(loss, plan, [1])
