"""What a step would hold, compute and send on many devices, for decoders of 135M to 70B parameters without weights.

The step is compiled for virtual CPU devices, for one and for two layers: all layers are alike, so what the second adds
is what each of the others would. Temporaries are not told: XLA's CPU backend keeps gathered parameters where those of
GPUs and TPUs gather them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from lorax_kit.core.merge import split
from lorax_kit.core.specs.spec import Spec
from lorax_kit.errors import LoraxError
from lorax_kit.measure import collective_bytes, facts
from lorax_kit.methods import LoRA
from lorax_kit.models.decoders.llama import LlamaModel
from lorax_kit.models.decoders.llama_config import LlamaConfig
from lorax_kit.parallel import device_bytes, layout, sharded_step, training_mesh
from lorax_kit.training import make_step, partition
from lorax_kit.transform import adapt, resolve

MODELS = {
    "135M": LlamaConfig(),
    "7B": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=False,
    ),
    "70B": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}
"""SmolLM2-135M's sizes, LLaMA 2's of 7B and Llama 3's of 70B parameters (arXiv 2307.09288, 2407.21783)."""
DEVICES = (8, 64, 256)
TENSOR_DEVICES = {"135M": 1, "7B": 1, "70B": 8}
"""Devices that share each product: those of one machine."""
TARGETS = {"all-linear": "layer_*/**/kernel", "qv": "layer_*/attention/{query,value}/kernel"}
SCALE_COLUMNS = (
    *("model", "targets", "devices", "fsdp", "tensor", "base_gib", "base_mib_device", "of_ideal"),
    *("state_of_base", "state_mib_device", "gflops_device", "sent_mib_device"),
)


class Step(NamedTuple):
    """A training step without weights.

    Attributes:
      base, state: trees of shapes with where they lie.
      lowered: the program, not compiled yet.
    """

    base: Any
    state: Any
    lowered: Any


def bench_scale(
    models: Sequence[str] = (),
    devices: Sequence[int] = (),
    targets: Sequence[str] = (),
    *,
    rank: int = 8,
    length: int = 128,
) -> list[dict[str, Any]]:
    """Rows of each model and choice of targets on each number of devices; none given: all that are known.

    The base is bf16, its parts along "fsdp" (and "tensor": a model of 70B), factors and Adam's state fp32, split over
    "fsdp", too. Each device along "fsdp" has one text of `length` tokens.

    Raises:
      LoraxError: JAX has begun with fewer devices; a number of them that the devices along "tensor" do not divide.
    """
    counts = devices or DEVICES
    for name in models or MODELS:
        for count in counts:
            if count % _tensor_devices(name, count):
                raise LoraxError(
                    f"{name} is split over {TENSOR_DEVICES[name]} devices along 'tensor', which do not divide {count}."
                )
    virtual_devices(max(counts))
    grid = [(m, t, n) for m in models or MODELS for t in targets or TARGETS for n in counts]
    return [_row(m, t, n, rank, length) for m, t, n in tqdm(grid, unit="row", disable=None)]


def virtual_devices(count: int) -> None:
    """Have JAX show so many CPU devices; in a process that has not asked for any yet."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass
    if len(jax.devices()) < count:
        raise LoraxError(f"JAX has begun with {len(jax.devices())} devices; {count} are needed.")


def _tensor_devices(name: str, count: int) -> int:
    """How many of `count` devices lie along "tensor"."""
    return min(TENSOR_DEVICES[name], count)


def _row(name: str, targets: str, count: int, rank: int, length: int) -> dict[str, Any]:
    tensor = _tensor_devices(name, count)
    mesh = training_mesh(fsdp=count // tensor, tensor=tensor)
    config = MODELS[name]
    whole = abstract_step(config, mesh, TARGETS[targets], rank, length, lower=False)
    few = [
        _compiled(abstract_step(replace(config, num_hidden_layers=n), mesh, TARGETS[targets], rank, length))
        for n in (1, 2)
    ]
    layers = config.num_hidden_layers
    flops, sent = (one + (layers - 1) * (two - one) for one, two in zip(*few, strict=True))
    base, state = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in (whole.base, whole.state))
    held, state_held = (device_bytes(x, jax.tree.map(lambda y: y.sharding, x)) for x in (whole.base, whole.state))
    return {
        "model": name,
        "targets": targets,
        "rank": rank,
        "devices": count,
        "fsdp": count // tensor,
        "tensor": tensor,
        "base_bytes": base,
        "base_bytes_device": held,
        "of_ideal": held * count / base,
        "state_bytes": state,
        "state_bytes_device": state_held,
        "state_of_base": state / base,
        "flops_device": flops,
        "collective_bytes_device": sent,
        "base_gib": base / 2**30,
        "base_mib_device": held / 2**20,
        "state_mib_device": state_held / 2**20,
        "gflops_device": flops / 1e9,
        "sent_mib_device": sent / 2**20,
    }


def _compiled(step: Step) -> tuple[float, float]:
    """FLOPs of a device, and bytes that collectives give it."""
    compiled = step.lowered.compile()
    return facts(compiled)["flops"], float(collective_bytes(compiled))


def abstract_step(
    config: LlamaConfig,
    mesh: Mesh,
    targets: str,
    rank: int,
    length: int,
    *,
    lower: bool = True,
    dtype: Any = jnp.bfloat16,
) -> Step:
    """A step of a decoder on a mesh, of shapes alone."""
    model, texts = LlamaModel(config, dtype), mesh.shape["data"] * mesh.shape["fsdp"]
    ids = jax.ShapeDtypeStruct((texts, length), jnp.int32)
    single = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def apply(params: Any, ids: Any) -> Any:
        return model.apply({"params": params}, ids, jnp.ones(ids.shape, jnp.int32))

    shapes = jax.eval_shape(model.init, jax.random.key(0), single, single)["params"]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    plan = resolve(Spec({targets: LoRA(rank=rank)}), params, apply, single)
    base, factors = jax.eval_shape(partial(split, plan=plan, key=jax.random.key(0)), params)
    adapted = adapt(apply, plan)

    def loss(base: Any, factors: Any, ids: Any) -> Any:
        logits = adapted(base, factors, ids)[:, :-1]
        return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]))

    tx = partition(optax.adam(1e-3), plan)
    state = jax.eval_shape(make_step(loss, tx, jit=False)[0], factors)
    base, state = _placed(base, layout(base, mesh)), _placed(state, layout(state, mesh, {}))
    batch = _placed(ids, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    _, step = sharded_step(loss, tx, mesh, factors="sharded")
    return Step(base, state, step.lower(state, base, batch) if lower else None)


def _placed(shapes: Any, where: Any) -> Any:
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, where)
