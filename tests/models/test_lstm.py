"""The LSTM classifier against float64 numpy; padding; its gates and its embedding at low rank, inside the scan."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.compress import CompressPlan, LowRank, calibrate, compress, compressed
from lorax_kit.core.lowrank import dense
from lorax_kit.core.paths import flatten
from lorax_kit.models import LstmClassifier, LstmConfig

CONFIG = LstmConfig(vocab_size=23, embedding_size=6, hidden_size=8, num_layers=2, num_classes=3)
MODEL = LstmClassifier(CONFIG)
LENGTHS = (7, 4, 1)
MASK = (np.arange(7) < np.array(LENGTHS)[:, None]).astype(np.int32)
IDS = np.random.default_rng(0).integers(1, 23, MASK.shape).astype(np.int32) * MASK
GATES = [f"lstm_{i}/{side}{gate}/kernel" for i in range(2) for side in "ih" for gate in "ifgo"]
TABLE = "embedding/embedding"


@jax.jit
def apply(params, batch):
    return MODEL.apply({"params": params}, *batch)


@pytest.fixture(scope="module")
def params():
    """Every leaf is drawn, so that no bias is trivial."""
    fresh = jax.jit(MODEL.init)(jax.random.key(0), IDS, MASK)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.4 * rng.normal(size=x.shape), jnp.float32), fresh)


@pytest.fixture(scope="module")
def sites(params):
    spec = lk.Spec({TABLE: lk.LoRA(rank=1), "lstm_*/*/kernel": lk.LoRA(rank=1)})
    return lk.resolve(spec, params, apply, (IDS, MASK))


def reference(params):
    """Logits, and the inputs of each layer's kernels of every text (T, *), token by token in float64."""
    w = {path: np.asarray(x, np.float64) for path, x in flatten(params)[0].items()}
    logits, seen = [], {f"lstm_{i}/{side}": [] for i in range(2) for side in "ih"}
    for ids, length in zip(IDS, LENGTHS, strict=True):
        x = w[TABLE][ids]
        for layer in ("lstm_0", "lstm_1"):
            h, c, states = np.zeros(8), np.zeros(8), []
            for token in x:
                seen[f"{layer}/i"].append(token)
                seen[f"{layer}/h"].append(h)
                i, f, g, o = (
                    token @ w[f"{layer}/i{k}/kernel"] + h @ w[f"{layer}/h{k}/kernel"] + w[f"{layer}/h{k}/bias"]
                    for k in "ifgo"
                )
                i, f, o = (1 / (1 + np.exp(-z)) for z in (i, f, o))
                c = f * c + i * np.tanh(g)
                h = o * np.tanh(c)
                states.append(h)
            x = np.stack(states)
        logits.append(x[:length].mean(0) @ w["classifier/kernel"] + w["classifier/bias"])
    return np.stack(logits), {name: np.stack(rows) for name, rows in seen.items()}


def test_logits_equal_a_float64_lstm(params):
    expected, _ = reference(params)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(apply(params, (IDS, MASK)), expected, atol=1e-5, rtol=0)


def test_padding_changes_nothing(params):
    whole = apply(params, (IDS, MASK))
    noise = np.where(MASK == 1, IDS, 5)
    np.testing.assert_allclose(apply(params, (noise, MASK)), whole, atol=1e-6, rtol=0)
    for row, length in enumerate(LENGTHS):
        alone = apply(params, (IDS[row : row + 1, :length], MASK[row : row + 1, :length]))
        np.testing.assert_allclose(alone[0], whole[row], atol=1e-6, rtol=0)


def test_dropout_acts_in_training_alone(params):
    model = LstmClassifier(replace(CONFIG, dropout=0.5))
    apply_with = jax.jit(lambda params, key: model.apply({"params": params}, IDS, MASK, False, rngs={"dropout": key}))
    np.testing.assert_array_equal(jax.jit(model.apply)({"params": params}, IDS, MASK), apply(params, (IDS, MASK)))
    one, two = (apply_with(params, jax.random.key(i)) for i in (0, 1))
    assert np.abs(one - two).max() > 1e-3


def test_gates_and_embedding_are_sites(sites):
    found = {site.path: site for site in sites.sites}
    assert sorted(found) == sorted([TABLE, *GATES])
    assert found[TABLE].lookup
    assert all(found[path].axes.inputs == (0,) and not found[path].lookup for path in GATES)


def test_calibration_sums_every_step_of_the_scan(params, sites):
    stats = calibrate(apply, params, sites, [(IDS, MASK)], progress=False)
    np.testing.assert_array_equal(stats[TABLE].counts, np.bincount(IDS.ravel(), minlength=23))
    _, seen = reference(params)
    for path in GATES:
        rows = seen[path[: len("lstm_0/i")]]
        assert stats[path].tokens == IDS.size
        np.testing.assert_allclose(stats[path].gram[0], rows.T @ rows, atol=1e-4)


def test_a_product_of_all_energy_equals_the_dense_model(params, sites):
    """Ranks that save nothing are refused, so the dense model is one whose gates and embedding have rank 3."""
    plan = CompressPlan(method="whitened", sites=sites, ranks=dict.fromkeys([TABLE, *GATES], 3))
    run = jax.jit(compressed(apply))
    small = compress(params, plan, calibrate(apply, params, sites, [(IDS, MASK)], progress=False))
    low = jax.tree.map(dense, small, is_leaf=lambda x: isinstance(x, LowRank))
    expected = apply(low, (IDS, MASK))
    assert np.abs(expected - apply(params, (IDS, MASK))).max() > 1e-2
    again = compress(low, plan, calibrate(apply, low, sites, [(IDS, MASK)], progress=False))
    for product in (small, again):
        np.testing.assert_allclose(run(product, (IDS, MASK)), expected, atol=1e-5, rtol=0)


def test_no_gate_is_materialised(params, sites):
    base, factors = lk.split(params, sites, jax.random.key(0))
    assert lk.explain(lk.adapt(apply, sites), base, factors, (IDS, MASK)).materialised == ()


@pytest.mark.parametrize(("field", "value"), [("hidden_size", 0), ("num_layers", -1), ("dropout", 1.0)])
def test_impossible_sizes_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        replace(CONFIG, **{field: value})
