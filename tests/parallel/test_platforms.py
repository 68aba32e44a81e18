"""Every step lowers for CUDA and TPU: nothing in it is of a CPU alone."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

import lorax_kit as lk
from lorax_kit.models.decoders.llama import LlamaModel
from lorax_kit.models.decoders.llama_config import LlamaConfig
from lorax_kit.study.programs.engine import Engine
from lorax_kit.study.programs.forms import kinds, union_plan
from lorax_kit.study.programs.packing import pack
from lorax_kit.study.programs.slices import Layout
from tests import tiny
from tests.draws import draw

PARAMS = {"up": {"kernel": draw(0, 16, 32)}, "down": {"kernel": draw(1, 32, 16)}}
X = draw(2, 8, 16)
BOTH = ("cuda", "tpu")
METHODS = {
    "LoRA": lk.LoRA(rank=2, dropout=0.1),
    "DoRA": lk.DoRA(rank=2),
    "VeRA": lk.VeRA(rank=4),
    "LoRAXS": lk.LoRAXS(rank=2),
    "LoHa": lk.LoHa(rank=2),
    "LoKr": lk.LoKr(rank=2, factor=2),
    "MiSS": lk.MiSS(rank=2),
    "DeLoRA": lk.DeLoRA(rank=2),
    "HRA": lk.HRA(rank=2),
    "IA3": lk.IA3(),
    "AdaLoRA": lk.AdaLoRA(rank=2),
}


def model(p, x):
    return jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"]


def lowered(fn, *args):
    """The platforms that a function was lowered for."""
    return export.export(jax.jit(fn), platforms=["cuda", "tpu"])(*args).platforms


def trained(setting, params=PARAMS):
    """(loss, optimiser, base, factors) of an adapted model."""
    plan = lk.resolve(lk.Spec({"**/kernel": setting}), params, model, X)
    base, factors = lk.split(params, plan, jax.random.key(0))
    run = lk.adapt(model, plan)

    def loss(base, f, x, key):
        return jnp.mean(run(base, f, x, dropout_key=key) ** 2)

    return loss, lk.partition(optax.adamw(1e-3), plan, clip=1.0), base, factors


@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_each_method(name):
    loss, tx, base, factors = trained(METHODS[name])
    init, step = lk.make_step(loss, tx, jit=False)
    assert lowered(step, init(factors, jax.random.key(1)), base, X) == BOTH


@pytest.mark.parametrize("bits", ["int8", "int4", "nf4"])
def test_a_step_on_a_quantised_base(bits):
    loss, tx, base, factors = trained(lk.LoRA(rank=2), lk.quantize(PARAMS, ["**/kernel"], bits, block=16))
    init, step = lk.make_step(loss, tx, accumulate=2, jit=False)
    assert lowered(step, init(factors, jax.random.key(1)), base, X) == BOTH


def test_steps_over_devices():
    loss, tx, base, factors = trained(lk.LoRA(rank=2, dropout=0.1))
    mesh = lk.training_mesh(fsdp=2, tensor=2)
    rules = {"up/kernel": (None, "tensor"), "down/kernel": ("tensor", None)}
    there = lk.place(base, lk.layout(base, mesh, rules, smallest=1))
    init, step = lk.sharded_step(loss, tx, mesh)
    state = init(factors, jax.random.key(1))
    exported = export.export(step.program(state, there), platforms=["cuda", "tpu"])(state, there, X)
    assert (exported.platforms, exported.nr_devices) == (BOTH, 4)
    init, step = lk.make_step(loss, tx, axis_name="data", jit=False)
    spread = jax.shard_map(step, mesh=lk.device_mesh(), in_specs=(P(), P(), P("data")), out_specs=(P(), P()))
    assert lowered(spread, init(factors, jax.random.key(1)), base, X) == BOTH


def test_a_decoder_trains_and_writes():
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    decoder, ids = LlamaModel(config), jnp.ones((2, 8), jnp.int32)
    params = decoder.init(jax.random.key(0), ids, ids)["params"]

    def apply(params, ids):
        return decoder.apply({"params": params}, ids, jnp.ones_like(ids))

    plan = lk.resolve(lk.Spec({"layer_*/**/kernel": lk.LoRA(rank=2)}), params, apply, ids)
    base, factors = lk.split(params, plan, jax.random.key(0))
    run = lk.adapt(apply, plan, recompute="everything")
    init, step = lk.make_step(
        lambda b, f, x: jnp.mean(run(b, f, x) ** 2), lk.partition(optax.adam(1e-3), plan), jit=False
    )
    assert lowered(step, init(factors), base, ids) == BOTH

    def write(base, factors, ids, cache):
        model = lk.adapt(lambda p, i, c: decoder.apply({"params": p}, i, jnp.ones_like(i), c), plan)
        return model(base, factors, ids, cache)

    cache = decoder.empty_cache(2, 16)
    for tokens in (ids, ids[:, :1]):
        assert lowered(write, base, factors, tokens, cache) == BOTH


def test_a_stacked_step_of_a_study(standard_promotion):
    study, problem = tiny.study(), tiny.problem()
    params, batch = problem.params(jax.random.key(0)), next(problem.train(0, 0))
    trials = kinds(study, problem, study.trials())[0][0]
    plan = union_plan(study, problem, trials, params, batch)
    layout = Layout(len(trials), len(trials))
    engine = Engine(study, problem, plan, params, layout)
    running, scalars, count = engine.begin(pack(study, problem, trials, plan, params, size=layout.size))
    exported = export.export(engine.step, platforms=BOTH)(running, scalars, count, engine.base, batch)
    assert exported.platforms == BOTH
