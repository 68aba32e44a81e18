"""MiSS: one trained vector of outputs for each shard of the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from tests.methods import promises


def test_the_update_is_the_papers():
    def formula(w, leaves, scale):
        return w + scale * leaves["b"][np.arange(len(w)) % 4]

    promises.check_formula(lk.MiSS(rank=4), formula, {"a": 1, "b": 1})


def test_input_n_belongs_to_shard_n_mod_r_over_all_input_axes():
    _, _, factors = promises.prepared(lk.MiSS(rank=4))
    shards = (np.arange(4)[:, None] == np.arange(12) % 4).astype(np.float32)
    np.testing.assert_array_equal(factors["window"].a, shards.reshape(4, 3, 4))
    np.testing.assert_array_equal(factors["experts"].a, np.stack([shards[:, :4]] * 3, axis=1))


def test_trials_of_different_rank_stack(standard_promotion):
    promises.check_stacking(variant="miss", alpha=None, rank=[3, 8], weight_decay=0.1)


def test_target_sets_stack(standard_promotion):
    targets = {"up": ["up/kernel"], "both": ["{up,down}/kernel"]}
    promises.check_stacking(variant="miss", alpha=None, rank=[2], targets=targets)


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
    promises.check_bfloat16(lk.MiSS(rank=3))


def test_bad_settings():
    promises.check_refused(
        lk.MiSS,
        [
            ({"rank": 0}, f"rank is 0; {promises.RANK}"),
            ({"rank": 2, "dropout": 1.0}, "dropout is 1.0; it must lie in [0, 1)."),
        ],
    )
    with pytest.raises(lk.SpecError, match="has the unknown key 'alpha'"):
        lk.Spec.from_dict({"rules": [["w", {"kind": "miss", "rank": 2, "alpha": 4}]]})
