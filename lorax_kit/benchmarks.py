"""Benchmarks of the training step: alternating rounds in one process, medians, ratios; FLOPs and bytes from XLA."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from lorax_kit.core.factors import Factors
from lorax_kit.core.merge import split
from lorax_kit.core.spec import Full, LoRA, Spec
from lorax_kit.models import BertClassifier, BertConfig
from lorax_kit.tasks import Batch, cross_entropy
from lorax_kit.training import make_step, partition
from lorax_kit.transform import adapt, resolve

TARGETS = {"all-linear": "encoder/layer_*/**/kernel", "qv": "encoder/layer_*/attention/{query,value}/kernel"}
COLUMNS = (
    "width",
    "layers",
    "tokens",
    "rank",
    "targets",
    "full_ms",
    "naive_ms",
    "ours_ms",
    "ratio_full",
    "ratio_naive",
    "flops_ratio",
    "temp_ratio",
    "temp_bytes",
    "full_temp_bytes",
)


def bench_step(
    *,
    width: int,
    layers: int,
    batch_size: int,
    length: int,
    rank: int,
    targets: str,
    rounds: int,
    progress: bool = True,
) -> dict[str, Any]:
    """One row: AdamW steps of a BERT classifier on random weights and tokens.

    "full" trains every parameter; "naive" adapts by x W + s (x A) B with A (in, r), differentiated by JAX;
    "ours" is `lk.adapt` with its cost model. All three are `lk.make_step` under jit with a donated state.
    """
    config = BertConfig(
        vocab_size=8192,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 32, 1),
        intermediate_size=4 * width,
        max_position_embeddings=max(length, 16),
    )
    model = BertClassifier(config, num_classes=2)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 8192, (batch_size, length)).astype(np.int32)
    batch = Batch(
        ids, np.ones_like(ids), rng.integers(0, 2, batch_size).astype(np.int32), np.ones(batch_size, np.float32)
    )
    batch = jax.tree.map(jnp.asarray, batch)
    params = jax.jit(model.init)(jax.random.key(0), batch.ids, batch.mask)["params"]

    def apply(params: Any, batch: Batch) -> Any:
        return model.apply({"params": params}, batch.ids, batch.mask)

    def loss(logits: Any, batch: Any) -> Any:
        return cross_entropy(logits, batch.label, batch.weight)

    spec = Spec({"classifier/**": Full(), TARGETS[targets]: LoRA(rank=rank, alpha=2 * rank)})
    plan = resolve(spec, params, apply, batch)
    base, factors = split(params, plan, jax.random.key(1))
    adapted = adapt(apply, plan)
    naive_paths = {site.path for site in plan.sites}

    def naive_apply(base: Any, factors: Any, batch: Batch) -> Any:
        """The textbook form, inserted where a Dense runs: what hand-written LoRA layers do."""

        def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y = next_fun(*args, **kwargs)
            path = "/".join((*context.module.path, "kernel"))
            if path not in naive_paths or context.method_name != "__call__":
                return y
            f = factors[path]
            return y + plan.site(path).scale * ((args[0] @ f.a) @ f.b)

        import flax.linen as nn

        params = {**base, "classifier": {k: factors[f"classifier/{k}"].value for k in base["classifier"]}}
        with nn.intercept_methods(intercept):
            return apply(params, batch)

    textbook = {p: Factors(f.a.T, f.b) if isinstance(f, Factors) else f for p, f in factors.items()}
    full_init, full_step = make_step(lambda _, p, b: loss(apply(p, b), b), optax.adamw(1e-3))
    tx = partition(optax.adamw(1e-3), plan)
    ours_init, ours_step = make_step(lambda base, f, b: loss(adapted(base, f, b), b), tx)
    naive_init, naive_step = make_step(lambda base, f, b: loss(naive_apply(base, f, b), b), tx)
    runs: dict[str, list[Any]] = {
        "full": [full_step, full_init(params), None],
        "naive": [naive_step, naive_init(textbook), base],
        "ours": [ours_step, ours_init(factors), base],
    }
    flops, temps = {}, {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, (step, state, own) in runs.items():
        compiled = step.lower(state, own, batch).compile()
        cost = compiled.cost_analysis()
        flops[name] = float((cost[0] if isinstance(cost, list) else cost)["flops"])
        temps[name] = int(compiled.memory_analysis().temp_size_in_bytes)
        runs[name][0] = compiled
        for _ in range(2):
            runs[name][1], _info = jax.block_until_ready(compiled(runs[name][1], own, batch))
    for _ in tqdm(range(rounds), desc="alternating rounds", disable=not progress):
        for name, run in runs.items():
            began = perf_counter()
            run[1], _info = jax.block_until_ready(run[0](run[1], run[2], batch))
            times[name].append(1e3 * perf_counter() - 1e3 * began)
    ms = {name: median(t) for name, t in times.items()}

    def ratio(other: str) -> float:
        """Median over rounds of ours / other: the pairs share the machine's mood."""
        return median(a / b for a, b in zip(times["ours"], times[other], strict=True))

    return {
        "width": width,
        "layers": layers,
        "tokens": batch_size * length,
        "rank": rank,
        "targets": targets,
        "full_ms": ms["full"],
        "naive_ms": ms["naive"],
        "ours_ms": ms["ours"],
        "ratio_full": ratio("full"),
        "ratio_naive": ratio("naive"),
        "flops_ratio": flops["ours"] / flops["full"],
        "temp_ratio": temps["ours"] / temps["full"],
        "temp_bytes": temps["ours"],
        "full_temp_bytes": temps["full"],
        "naive_temp_bytes": temps["naive"],
        "naive_flops_ratio": flops["naive"] / flops["full"],
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """`COLUMNS` of the rows as aligned text."""
    cells = [list(COLUMNS)]
    for row in rows:
        cells.append([f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS])
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
