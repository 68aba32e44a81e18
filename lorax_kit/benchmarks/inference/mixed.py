"""A batch whose rows each have their own adapter, against the same batch with one for all; PEFT's beside it."""

from __future__ import annotations

from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lorax_kit.algebra import Adaptation, per_row, stack
from lorax_kit.benchmarks.case import TARGETS, make_case
from lorax_kit.benchmarks.timing import alternate, calling, ratio
from lorax_kit.benchmarks.torch_peer import torch_mixed
from lorax_kit.core.merge import merge
from lorax_kit.core.specs.spec import Spec
from lorax_kit.methods import Factors, LoRA
from lorax_kit.transform import adapt, resolve

MIXED_COLUMNS = (
    *("width", "layers", "rows", "length", "targets", "base_ms", "one_ms", "mixed_ms", "mixed_ratio", "worst"),
    *("peft_one_ms", "peft_mixed_ms", "peft_ratio"),
)


def bench_mixed(
    *,
    width: int,
    layers: int,
    rows: int,
    length: int,
    targets: str,
    rounds: int,
    ranks: tuple[int, int] = (2, 16),
    peer: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """One row: a BERT classifier on random weights and tokens, as many adapters as rows of the batch.

    Ranks rise evenly over `ranks`. `mixed_ratio` is the median over the rounds of the mixed batch against the batch
    with the adapter of the highest rank for all rows, in the same round, and `spread` its quartiles; `worst` is the
    largest difference of a row's logits from those of its merged parameters, `peft_worst` that of PEFT's from ours.
    """
    case = make_case(width=width, layers=layers, batch_size=rows, length=length, rank=ranks[1], targets=targets)
    rng, adapters = np.random.default_rng(0), []
    for rank in np.linspace(*ranks, rows).round().astype(int):
        spec = Spec({TARGETS[targets]: LoRA(rank=int(rank), alpha=2 * int(rank))})
        plan = resolve(spec, case.params, case.apply, case.batch)
        drawn = {
            site.path: Factors(*(_draw(rng, shape) for shape in (site.a_shape, site.b_shape))) for site in plan.sites
        }
        adapters.append(Adaptation(plan, drawn))
    stacked, last = stack(adapters, base=case.params), adapters[-1]
    batched, which = per_row(case.apply, stacked), jnp.arange(rows)
    programs: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "base": (case.apply, (case.params, case.batch)),
        "one": (adapt(case.apply, last.plan), (case.params, last.factors, case.batch)),
        "mixed": (
            lambda base, factors, batch, which: batched(base, factors, batch, which=which),
            (case.params, stacked.factors, case.batch, which),
        ),
    }
    compiled = {name: jax.jit(fn).lower(*args).compile() for name, (fn, args) in programs.items()}
    mixed, apply, worst = compiled["mixed"](*programs["mixed"][1]), jax.jit(case.apply), 0.0
    for i, adapter in enumerate(adapters):
        row = jax.tree.map(lambda x, i=i: x[i : i + 1], case.batch)
        solo = apply(merge(case.params, adapter.factors, adapter.plan), row)
        worst = max(worst, float(jnp.abs(mixed[i] - solo[0]).max()))
    runs = {name: calling(program, *programs[name][1]) for name, program in compiled.items()}
    theirs = torch_mixed(case, [(a.plan.sites[0].rank, a.factors) for a in adapters]) if peer else {}
    bar = tqdm(range(rounds), desc=f"{width} wide, {rows}x{length}, {targets}", disable=None if progress else True)
    times = alternate(runs | theirs, bar)
    against = ratio(times, "mixed", "one")
    return {
        **{"width": width, "layers": layers, "rows": rows, "length": length, "targets": targets, "rounds": rounds},
        **{f"{name}_ms": median(x) for name, x in times.items()},
        **({} if theirs else {"peft_one_ms": None, "peft_mixed_ms": None}),
        "mixed_ratio": against.median,
        "spread": against.spread,
        "worst": worst,
        "peft_worst": float(np.abs(theirs["peft_mixed"]() - np.asarray(mixed)).max()) if theirs else None,
        "peft_ratio": ratio(times, "peft_mixed", "peft_one").median if theirs else None,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def _draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return jnp.asarray(rng.normal(size=shape) / 20, jnp.float32)
