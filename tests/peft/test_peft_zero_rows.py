"""What PEFT has no number for: reflections that do nothing, and triplets that are half there."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk

BASE = {name: {"kernel": jax.random.normal(jax.random.key(i), (6, 5))} for i, name in enumerate("qk")}
NAMES = {"q/kernel": "q.weight", "k/kernel": "k.weight"}


def adapter(setting):
    plan = lk.resolve(lk.Spec({"{q,k}/kernel": setting}), BASE)
    _, factors = lk.split(BASE, plan, jax.random.key(0))
    return plan, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), factors)


def reflected(torch_u, w):
    """As PEFT has it: every column divided by its length, which must not be zero."""
    for u in np.asarray(torch_u, np.float64).T:
        w = w - 2 * np.outer(u, u @ w) / (u @ u)
    return w


@pytest.mark.parametrize(
    ("zeros", "r"),
    [
        ({"q": [0, 1, 2, 3], "k": []}, 4),
        ({"q": [0, 1, 2, 3], "k": [0, 1, 2, 3]}, 4),
        ({"q": [1, 2], "k": []}, 4),
        ({"q": [0, 2, 3], "k": [1]}, 3),
    ],
)
def test_reflections_that_do_nothing_are_pairs_that_cancel(tmp_path, zeros, r):
    plan, factors = adapter(lk.HRA(rank=4))
    for name, rows in zeros.items():
        u = factors[f"{name}/kernel"].u.at[jnp.array(rows, int)].set(0)
        factors[f"{name}/kernel"] = factors[f"{name}/kernel"]._replace(u=u)
    lk.save_peft(tmp_path / "a", plan, factors, base=BASE, names=NAMES)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == r
    again = lk.load_peft(tmp_path / "a", base=BASE, names=NAMES)
    want, got = lk.merge(BASE, factors, plan), lk.merge(BASE, again.factors, again.plan)
    for name, rows in zeros.items():
        x = np.asarray(want[name]["kernel"])
        if len(rows) == 4:
            np.testing.assert_array_equal(got[name]["kernel"], BASE[name]["kernel"])
        np.testing.assert_allclose(got[name]["kernel"], x, atol=2e-6)
        u = np.asarray(again.factors[f"{name}/kernel"].u)[:r].T
        np.testing.assert_allclose(reflected(u, np.asarray(BASE[name]["kernel"], np.float64)), x, atol=2e-6)


def test_an_odd_and_an_even_number_of_reflections_say(tmp_path):
    plan, factors = adapter(lk.HRA(rank=4))
    factors["q/kernel"] = factors["q/kernel"]._replace(u=factors["q/kernel"].u.at[0].set(0))
    with pytest.raises(lk.AdapterError, match="PEFT has one r for all modules; here it is"):
        lk.save_peft(tmp_path / "a", plan, factors, base=BASE, names=NAMES)
    assert list(tmp_path.iterdir()) == []


def test_a_triplet_that_is_half_there_says(tmp_path):
    plan, factors = adapter(lk.AdaLoRA(rank=3))
    for path, leaves in factors.items():
        factors[path] = leaves._replace(mask=jnp.array([1.0, 0.0, 1.0]))
    lk.save_peft(tmp_path / "whole", plan, factors, base=BASE, names=NAMES)
    factors["k/kernel"] = factors["k/kernel"]._replace(mask=jnp.array([1.0, 0.5, 1.0]))
    with pytest.raises(lk.AdapterError, match=r"'k/kernel': its mask holds 0\.5; in PEFT a triplet is there"):
        lk.save_peft(tmp_path / "half", plan, factors, base=BASE, names=NAMES)
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]
