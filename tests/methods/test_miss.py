"""MiSS: one trained vector of outputs for each shard of the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from tests import tiny
from tests.methods import promises


def test_the_update_is_the_papers():
    promises.equals_the_formula(lk.MiSS(rank=4), lambda w, leaves, s: w + s * leaves["b"][np.arange(10) % 4])


def test_every_kind_of_site():
    promises.on_every_kind_of_site(lk.MiSS(rank=3))


def test_input_n_belongs_to_shard_n_mod_r_over_all_input_axes():
    plan, params, _ = promises.stacked_site(lk.MiSS(rank=4))
    a = lk.split(params, plan, jax.random.key(0))[1]["w"].a
    assert a.shape == (4, 3, 5, 2)
    for e in range(3):
        np.testing.assert_array_equal(np.asarray(a[:, e]).reshape(4, 10), np.arange(4)[:, None] == np.arange(10) % 4)


def test_trials_of_different_rank_stack(standard_promotion):
    promises.stacked_equals_solo(tiny.study(variant="miss", alpha=None, rank=[3, 8], seed=[0], weight_decay=0.1))


def test_target_sets_stack(standard_promotion):
    study = tiny.study(
        variant="miss",
        alpha=None,
        rank=[2],
        seed=[0],
        targets={"up": ["up/kernel"], "both": ["{up,down}/kernel"]},
        probe_lr=(),
    )
    promises.stacked_equals_solo(study)


def test_ranks_up_to_the_inputs():
    params = {"w": jnp.ones((5, 2))}
    plan = lk.resolve(lk.Spec({"w": lk.MiSS(rank=5)}), params)
    a = lk.split(params, plan, jax.random.key(0))[1]["w"].a
    np.testing.assert_array_equal(a, np.eye(5))
    with pytest.raises(lk.PlanError) as e:
        lk.resolve(lk.Spec({"w": lk.MiSS(rank=6)}), params)
    assert str(e.value).startswith("rank 6 at 'w' is above 5, the most that miss can hold there (in (5,), out (2,)).")
    assert lk.resolve(lk.Spec({"w": lk.MiSS(rank=6)}, cap_ranks=True), params).site("w").rank == 5


def test_dtypes():
    promises.bfloat16(lk.MiSS(rank=3))


def test_saved_and_loaded(tmp_path):
    promises.saved_and_loaded(lk.MiSS(rank=4, dropout=0.1), tmp_path / "adapter")


def test_bad_settings():
    promises.refused(
        lk.MiSS,
        [
            (
                {"rank": 0},
                "rank is 0; it must be an integer of at least 1.\n"
                "  to train no low-rank factors at all, leave the rule out",
            ),
            ({"rank": 2, "dropout": 1.0}, "dropout is 1.0; it must lie in [0, 1)."),
        ],
    )
    with pytest.raises(lk.SpecError, match="has the unknown key 'alpha'"):
        lk.Spec.from_dict({"rules": [["w", {"kind": "miss", "rank": 2, "alpha": 4}]]})
