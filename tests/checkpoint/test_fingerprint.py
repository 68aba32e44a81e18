"""Which base an adapter belongs to: weights alone decide, and a refusal says which parameter differs in what."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax_kit as lk
from lorax_kit.checkpoint.fingerprint import digests, statistics, whole_fingerprint
from lorax_kit.checkpoint.seal import seal
from lorax_kit.core.paths import is_state
from tests.draws import draw

PARAMS = {
    "table": draw(0, 10, 8),
    "up": {"kernel": draw(1, 8, 6)},
    "down": {"kernel": draw(2, 6, 4)},
    "order": jnp.arange(6),
}
SPEC = lk.Spec({"up/kernel": lk.LoRA(rank=2)})


def saved(folder, base, spec=SPEC, **options):
    plan = lk.resolve(spec, base)
    _, factors = lk.split(base, plan, jax.random.key(0))
    lk.save_adapter(folder, plan, factors, base=base, **options)
    return folder


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, tree)


OTHERS = {
    "all in bf16": (
        lambda p: cast(p, jnp.bfloat16),
        "has dtype bfloat16 here, float32 in its base (and 2 more differ)",
    ),
    "one in bf16": (
        lambda p: p | {"down": cast(p["down"], jnp.bfloat16)},
        "'down/kernel' has dtype bfloat16 here, float32 in its base\n",
    ),
    "more rows": (
        lambda p: p | {"table": jnp.pad(p["table"], [(0, 3), (0, 0)])},
        "'table' has shape (13, 8) here, (10, 8) in its base\n",
    ),
    "the site quantised": (
        lambda p: lk.quantize(p, ["up/kernel"], "int8"),
        "'up/kernel' is int8 in blocks of 6 here, not quantised in its base\n",
    ),
    "one entry": (
        lambda p: p | {"down": {"kernel": p["down"]["kernel"].at[0, 0].add(1e-3)}},
        "'down/kernel', float32 of shape (6, 4), holds other values\n",
    ),
    "one more": (lambda p: p | {"extra": jnp.ones(3)}, "'extra', float32 of shape (3,), is not in its base\n"),
    "one less": (lambda p: {k: x for k, x in p.items() if k != "table"}, "'table' is missing here\n"),
    "a table of integers": (lambda p: p | {"order": p["order"][::-1]}, "'order', int32 of shape (6,), holds other"),
    "the site of another shape": (
        lambda p: p | {"up": {"kernel": jnp.ones((1, 6))}},
        "'up/kernel' has shape (1, 6) here, (8, 6) in its base\n",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_base_is_named_by_what_differs(case, tmp_path):
    change, says = OTHERS[case]
    saved(tmp_path / "a", PARAMS)
    with pytest.raises(lk.AdapterError) as e:
        lk.load_adapter(tmp_path / "a", base=change(PARAMS))
    lines = str(e.value).splitlines()
    assert lines[0] == f"the adapter at {str(tmp_path / 'a')!r} belongs to another base."
    assert says in str(e.value)
    assert lines[-1] == "  load the weights it was trained on"


def test_a_quantised_base_requantised_otherwise_is_named(tmp_path):
    saved(tmp_path / "a", lk.quantize(PARAMS, ["down/kernel"], "nf4"))
    with pytest.raises(lk.AdapterError, match="is int4 in blocks of 4 here, nf4 in blocks of 4 in its base"):
        lk.load_adapter(tmp_path / "a", base=lk.quantize(PARAMS, ["down/kernel"], "int4"))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up, self.drop = nnx.Linear(8, 6, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.drop(self.up(x)))


KERNELS = lk.Spec({"**/kernel/value": lk.LoRA(rank=2)})


def test_keys_and_counters_that_a_forward_pass_advances_are_not_another_base(tmp_path):
    model = Net(nnx.Rngs(0))
    _, params = nnx.split(model)
    assert [p for p, x in lk.paths(params).items() if is_state(x)] == ["drop/rngs/count/value", "drop/rngs/key/value"]
    saved(tmp_path / "a", params, KERNELS)
    model.norm.use_running_average = True
    model(jnp.ones((4, 8)))
    moved = nnx.state(model)
    assert int(moved["drop"]["rngs"]["count"].get_value()) == 1
    assert lk.fingerprint(moved) == lk.fingerprint(params)
    lk.load_adapter(tmp_path / "a", base=moved)


def test_running_statistics_of_flax_warn_and_do_not_refuse(tmp_path):
    model = Net(nnx.Rngs(0))
    params = nnx.split(model)[1]
    assert statistics(params) == {"norm/mean/value", "norm/var/value"}
    saved(tmp_path / "a", params, KERNELS)
    model(jnp.arange(32.0).reshape(4, 8))
    moved = nnx.state(model)
    with pytest.warns(UserWarning, match=r"other running statistics: 'norm/mean/value', float32 .* \(and 1 more"):
        lk.load_adapter(tmp_path / "a", base=moved)
    linen = {"params": {"kernel": jnp.ones((3, 2))}, "batch_stats": {"mean": jnp.zeros(2)}}
    assert statistics(linen) == {"batch_stats/mean"}


def test_what_counts_as_state():
    state = [jax.random.key(0), jax.random.split(jax.random.key(0), 3), jax.random.PRNGKey(0), jnp.int32(3),
             jnp.zeros((5, 2), jnp.uint32), jnp.zeros(7, jnp.uint32)]  # fmt: skip
    weights = [jnp.float32(3), jnp.arange(3), jnp.zeros((8, 16), jnp.uint32), jnp.bool_(True), jnp.ones((2, 2)), 3,
               lk.quantize({"w": jnp.ones((2, 2))}, ["w"])["w"]]  # fmt: skip
    assert all(map(is_state, state))
    assert not any(map(is_state, weights))


def test_plain_params_keep_the_fingerprint_that_0_1_0_gave_them():
    expected = "b830f493893c"
    assert lk.fingerprint({"w": np.arange(6, dtype=np.float32), "b": np.ones((2, 2), np.int32)})[:12] == expected


@pytest.mark.parametrize("counter", [False, True])
def test_an_adapter_without_digests_of_its_leaves_still_loads_with_the_message_it_had(counter, tmp_path):
    base = PARAMS | ({"step": jnp.int32(3)} if counter else {})
    saved(tmp_path / "a", base)
    file = next(p for p in (tmp_path / "a" / "spec").iterdir() if b'"leaves"' in p.read_bytes())
    document = json.loads(file.read_text())
    del document["leaves"]
    document["base"] = whole_fingerprint(base)
    file.write_text(json.dumps(document))
    seal(tmp_path / "a")
    lk.load_adapter(tmp_path / "a", base=base)
    with pytest.raises(lk.AdapterError, match=f"fingerprint of its base {document['base'][:12]}, of this one"):
        lk.load_adapter(tmp_path / "a", base=base | {"table": -base["table"]})


def test_digests_are_small_and_of_every_frozen_weight():
    found = digests(PARAMS | {"step": jnp.int32(1)}, ["table"])
    assert list(found) == ["down/kernel", "order", "up/kernel"]
    assert found["up/kernel"][:3] == ["float32", [8, 6], ""]
    assert len(json.dumps(found)) < 80 * len(found)
