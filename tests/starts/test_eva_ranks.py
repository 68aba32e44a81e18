"""EVA's ranks: the directions of the largest shares win, site by site, under one budget."""

import re

import jax
import numpy as np
import pytest

import lorax_kit as lk
from tests.draws import draw
from tests.methods import formulas

PARAMS = {"flat": draw(0, 6, 8), "steep{1}": draw(1, 6, 8), "head": draw(2, 8, 3), "bias": draw(3, 3)}
SHARES = {"flat": np.array([0.3, 0.2, 0.2, 0.1, 0.1, 0.1]), "steep{1}": np.array([0.9, 0.04, 0.03, 0.01, 0.01, 0.01])}
TURN = np.linalg.qr(np.asarray(draw(4, 6, 6), np.float64))[0]
STATS = {path: lk.Hints(tokens=50.0, gram=(TURN * 70 * share @ TURN.T)[None]) for path, share in SHARES.items()}


def fn(p, x):
    return (x @ p["flat"] + x @ p["steep{1}"]) @ p["head"] + p["bias"][None]


def resolved(**setting):
    rules = {
        "re:(flat|steep.*)": lk.LoRA(**{"rank": 2, "alpha": 3, "start": "eva"} | setting),
        "head": lk.LoRA(rank=1),
        "bias": lk.Full(),
    }
    return lk.resolve(lk.Spec(rules, compute_dtype="float32"), PARAMS, fn, draw(5, 4, 6))


def ranks(plan):
    return {site.path: site.rank for site in plan.sites}


@pytest.mark.parametrize("budget", [2, 3, 4])
def test_the_largest_shares_win(budget):
    plan = lk.starts.eva_ranks(resolved(), STATS, budget=budget)
    want = formulas.eva_ranks([share[:4] for share in SHARES.values()], budget)
    assert ranks(plan) == dict(zip(SHARES, want, strict=True)) | {"head": 1}


def test_the_budget_is_what_the_plan_spends_and_rho_bounds_each_site():
    assert ranks(lk.starts.eva_ranks(resolved(), STATS)) == {"flat": 3, "steep{1}": 1, "head": 1}
    assert ranks(lk.starts.eva_ranks(resolved(), STATS, rho=1)) == {"flat": 2, "steep{1}": 2, "head": 1}
    assert ranks(lk.starts.eva_ranks(resolved(), STATS, budget=100, rho=1.5)) == {"flat": 3, "steep{1}": 3, "head": 1}


@pytest.mark.parametrize("setting", [{}, {"rslora": True}, {"alpha": None}, {"alpha": None, "rslora": True}])
def test_every_site_keeps_its_scale(setting):
    before = resolved(**setting)
    after = lk.starts.eva_ranks(before, STATS)
    for site in after.sites:
        assert site.scale == pytest.approx(before.site(site.path).scale, rel=1e-12)


def test_a_site_that_gets_nothing_is_left_out_and_the_spec_resolves_to_the_plan():
    plan = lk.starts.eva_ranks(resolved(), STATS, budget=1)
    assert ranks(plan) == {"steep{1}": 1, "head": 1}
    assert plan.trained == ("head", "steep{1}", "bias")
    assert lk.resolve(lk.Spec.from_json(plan.spec.to_json()), PARAMS, fn, draw(5, 4, 6)) == plan


def test_a_stack_pays_for_each_of_its_matrices():
    params = {"one": draw(0, 6, 6), "stack": draw(1, 3, 6, 6)}

    def fn(p, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x @ p["one"], p["stack"])[0]

    plan = lk.resolve(lk.Spec({"*": lk.LoRA(rank=2, start="eva")}), params, fn, draw(2, 4, 6))
    gram = np.diag([4.0, 3.0, 1, 1, 1, 1])
    stats = {
        "one": lk.Hints(gram=gram[None]),
        "stack": lk.Hints(gram=np.stack([gram, gram, np.diag([9.0, 2, 0, 0, 0, 0])])),
    }
    assert ranks(lk.starts.eva_ranks(plan, stats)) == {"one": 2, "stack": 2}  # 2 * 3 + 2 = 8
    assert ranks(lk.starts.eva_ranks(plan, stats, budget=5)) == {"one": 2, "stack": 1}


def test_the_new_plan_splits_saves_and_loads(tmp_path):
    plan = lk.starts.eva_ranks(resolved(), STATS)
    base, factors = lk.split(PARAMS, plan, jax.random.key(0), hints=STATS)
    np.testing.assert_allclose(np.abs(factors["flat"].a @ TURN[:, 0]), [1, 0, 0], atol=1e-6)
    lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    assert lk.load_adapter(tmp_path / "a", base=base).plan == plan


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (lambda: resolved(start="kaiming"), {}, "no site of the plan has start='eva'"),
        (resolved, {"rho": 0.5}, "rho is 0.5; it must be a number of at least 1"),
        (resolved, {"budget": 0}, "budget is 0; it must be an integer of at least 1"),
        (resolved, {"stats": {"flat": STATS["flat"]}}, "start 'eva' at 'steep{1}' needs the inputs"),
    ],
)
def test_says_what_is_wrong(plan, options, message):
    with pytest.raises(lk.PlanError, match=re.escape(message)):
        lk.starts.eva_ranks(plan(), options.pop("stats", STATS), **options)


def test_values_of_any_kind_spend_a_budget_and_what_is_no_value_is_named():
    plan = resolved()
    by_energy = lk.starts.spend_ranks(plan, {"flat": [9, 3, 3, 3], "head": [4, 0, 0]}, budget=3)
    assert (ranks(by_energy)["flat"], ranks(by_energy)["head"]) == (2, 1)
    for values, message in (
        ({"nowhere": [1.0]}, "values are of"),
        ({}, "values are of"),
        ({"flat": [1.0, 2.0]}, "falling"),
        ({"flat": [[2.0], [1.0]]}, "falling"),
        ({"flat": [float("nan")]}, "falling"),
    ):
        with pytest.raises(lk.PlanError, match=message):
            lk.starts.spend_ranks(plan, values)
