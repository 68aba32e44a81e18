"""Training steps of every method beside LoRA's of the same rank, in alternating rounds of one run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import jax
import optax
from tqdm import tqdm

from lorax_kit.benchmarks.case import TARGETS, make_case
from lorax_kit.benchmarks.steps.step import RATE, Contender, stepping
from lorax_kit.benchmarks.timing import alternate, ratio
from lorax_kit.core.leaves import trained_only
from lorax_kit.core.merge import split
from lorax_kit.core.specs.setting import Full, Setting
from lorax_kit.core.specs.spec import Spec
from lorax_kit.errors import SpecError
from lorax_kit.measure import facts
from lorax_kit.methods import HRA, IA3, AdaLoRA, DeLoRA, DoRA, LoHa, LoKr, LoRA, LoRAXS, MiSS, VeRA
from lorax_kit.training import make_step, partition
from lorax_kit.transform import adapt, resolve

METHOD_COLUMNS = ("method", "rank", "trained", "ms", "ratio", "flops_ratio", "temp_ratio")


def settings(rank: int) -> dict[str, Setting]:
    """The ways that are timed, by name: each method at `rank`, where it has one, as its defaults are."""
    return {
        "lora": LoRA(rank=rank),
        "lora_fa": LoRA(rank=rank, freeze_a=True),
        "lora, pissa": LoRA(rank=rank, start="pissa"),
        "dora": DoRA(rank=rank),
        "vera": VeRA(rank=rank),
        "lora_xs": LoRAXS(rank=rank),
        "loha": LoHa(rank=rank),
        "lokr": LoKr(rank=rank),
        "miss": MiSS(rank=rank),
        "delora": DeLoRA(rank=rank),
        "hra": HRA(rank=rank),
        "ia3": IA3(),
        "adalora": AdaLoRA(rank=rank),
    }


def bench_methods(
    *,
    width: int,
    layers: int,
    batch_size: int,
    length: int,
    rank: int,
    targets: str,
    rounds: int,
    names: Sequence[str] = (),
    progress: bool = True,
) -> list[dict[str, Any]]:
    """A row per method: AdamW steps of a BERT classifier on random weights and tokens.

    `ratio` is the median over the rounds of a step against LoRA's in the same round, `spread` its quartiles;
    `flops_ratio` and `temp_ratio` are XLA's counts against LoRA's.

    Raises:
      SpecError: a name that is not among `settings`.
    """
    ways = settings(rank)
    if unknown := sorted(set(names) - set(ways)):
        raise SpecError(f"method {unknown[0]!r} is not timed; choose from {', '.join(ways)}.")
    chosen = {name: way for name, way in ways.items() if not names or name in {*names, "lora"}}
    case = make_case(width=width, layers=layers, batch_size=batch_size, length=length, rank=rank, targets=targets)
    runs, measured, trained = {}, {}, {}
    for name in tqdm(chosen, desc="compiling", disable=None if progress else True):
        spec = Spec({"classifier/**": Full(), TARGETS[targets]: chosen[name]})
        plan = resolve(spec, case.params, case.apply, case.batch)
        base, factors = split(case.params, plan, jax.random.key(1))
        adapted = adapt(case.apply, plan)
        contender = Contender(
            lambda base, f, batch, adapted=adapted: case.loss(adapted(base, f, batch), batch),
            partition(optax.adamw(RATE), plan),
            factors,
            base,
        )
        state, (_, step) = contender.state(), make_step(contender.loss, contender.tx)
        compiled = step.lower(state, base, case.batch).compile()  # type: ignore[attr-defined]
        measured[name] = facts(compiled)
        runs[name] = stepping(compiled, state, base, case.batch)
        trained[name] = sum(x.size for x in jax.tree.leaves(trained_only(plan, factors)))
    times = alternate(runs, tqdm(range(rounds), desc=f"{width} wide, r={rank}", disable=None if progress else True))
    rows = []
    for name, way in chosen.items():
        against = ratio(times, name, "lora")
        rows.append(
            {
                "method": name,
                "rank": getattr(way, "rank", 0),
                "trained": trained[name],
                "ms": median(times[name]),
                "ratio": against.median,
                "spread": against.spread,
            }
            | {
                f"{key}_ratio": measured[name][fact] / measured["lora"][fact]
                for key, fact in (("flops", "flops"), ("temp", "temp_bytes"))
            }
            | {"width": width, "tokens": batch_size * length, "targets": targets, "rounds": rounds}
            | {"backend": jax.default_backend(), "device": jax.devices()[0].device_kind}
        )
    return rows
