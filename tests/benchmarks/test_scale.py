"""`bench scale`: what a device holds and sends, from shapes."""

import jax
import pytest

from lorax_kit.benchmarks import SCALE_COLUMNS, bench_scale, scale
from lorax_kit.errors import LoraxError
from lorax_kit.models.decoders.llama_config import LlamaConfig

pytestmark = pytest.mark.usefixtures("standard_promotion")
TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
)


def test_bytes_follow_from_the_layout_and_layers_add_up(monkeypatch):
    monkeypatch.setattr(scale, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(scale, "TENSOR_DEVICES", {"tiny": 1})
    one, four = bench_scale(devices=(1, 4), targets=("all-linear",), rank=2, length=8)
    kernels = 3 * (4 * 32 * 32 + 3 * 32 * 64)
    assert one["base_bytes"] == 2 * (kernels + 64 * 32 + 7 * 32)
    assert one["collective_bytes_device"] == 0
    # Norms of 32 are not worth splitting; the rest is.
    assert four["base_bytes_device"] == 2 * ((kernels + 64 * 32) / 4 + 7 * 32)
    assert four["of_ideal"] == pytest.approx(1, abs=0.05)
    trained = 3 * 2 * (4 * 64 + 3 * 96)
    assert four["state_bytes"] == pytest.approx(3 * 4 * trained, abs=16)
    assert four["flops_device"] == pytest.approx(one["flops_device"], rel=0.1)
    assert four["collective_bytes_device"] > four["base_bytes"] * 3 / 4
    assert set(SCALE_COLUMNS) <= set(four)
    # Three layers, counted from one and two, are those of a program of three.
    mesh = scale.training_mesh(fsdp=4)
    whole = scale.abstract_step(TINY, mesh, scale.TARGETS["all-linear"], 2, 8)
    flops, sent = scale._compiled(whole)
    assert four["collective_bytes_device"] == pytest.approx(sent, rel=0.01)
    assert four["flops_device"] == pytest.approx(flops, rel=0.01)


def test_devices_that_are_not_there_are_told():
    with pytest.raises(LoraxError, match=f"JAX has begun with {len(jax.devices())} devices; 64 are needed"):
        bench_scale(("135M",), (64,))


def test_devices_that_the_row_would_not_use_are_refused():
    with pytest.raises(LoraxError, match="70B is split over 8 devices along 'tensor', which do not divide 12"):
        bench_scale(("70B",), (8, 12))
