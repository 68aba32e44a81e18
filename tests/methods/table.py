"""The contract table: every method and start on every kind of model.

A cell is (way, model). A way is a method, with a start where it has one. What a way cannot do on a model, the plan says
in words when it is resolved; `EXCUSED` lists those words, so that a cell that stops working is noticed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lorax_kit as lk
from lorax_kit.core.leaves import FullLeaf
from lorax_kit.core.lowrank import dense
from lorax_kit.core.merge import effective_weight
from lorax_kit.core.method import update_of
from lorax_kit.core.paths import flatten
from tests.cases import CASES, Case
from tests.draws import moved_leaves

WAYS = {
    "lora": lk.LoRA(rank=2, alpha=3),
    "rslora": lk.LoRA(rank=2, alpha=3, rslora=True),
    "lora_fa": lk.LoRA(rank=2, alpha=3, freeze_a=True),
    "dora": lk.DoRA(rank=2, alpha=3),
    "vera": lk.VeRA(rank=3),
    "lora_xs": lk.LoRAXS(rank=2, alpha=3),
    "loha": lk.LoHa(rank=2, alpha=3),
    "lokr": lk.LoKr(rank=2, alpha=3),
    "miss": lk.MiSS(rank=2),
    "delora": lk.DeLoRA(rank=2, bound=1.0),
    "hra": lk.HRA(rank=2),
    "ia3": lk.IA3(),
    "ia3, inputs": lk.IA3(feedforward=True),
    "adalora": lk.AdaLoRA(rank=2, alpha=3),
    "rows": lk.Rows(rows=(0, 2)),
    "lora + normal": lk.LoRA(rank=2, alpha=3, start="normal"),
    "lora + pissa": lk.LoRA(rank=2, alpha=3, start="pissa"),
    "lora_fa + olora": lk.LoRA(rank=2, alpha=3, freeze_a=True, start="olora"),
    "lora + eva": lk.LoRA(rank=2, alpha=3, start="eva"),
    "lora + corda_kpm": lk.LoRA(rank=2, alpha=3, start="corda_kpm"),
    "dora + orthogonal": lk.DoRA(rank=2, alpha=3, start="orthogonal"),
    "dora + lora_ga": lk.DoRA(rank=2, alpha=3, start="lora_ga"),
}


def quantised() -> Case:
    """An mlp whose kernels are kept in 4 bits."""
    case = CASES["mlp"]()
    return case._replace(params=lk.quantize(case.params, ["**/kernel"], "nf4", block=2))


def bf16() -> Case:
    """An mlp in bf16."""
    params, fn, (x,), targets = CASES["mlp"]()
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (params, x))
    return Case(half[0], fn, (half[1],), targets)


MODELS = {**{name: CASES[name] for name in CASES if name != "materialised"}, "quantised": quantised, "bf16": bf16}

EXCUSED: dict[tuple[str, str], str] = {
    ("lora + eva", "tied"): "the rows of a table are looked up",
    ("lora + corda_kpm", "tied"): "the rows of a table are looked up",
}
"""(way, model) -> what the plan's error says of a cell that does not apply."""


class Cell(NamedTuple):
    """One way on one model, with leaves at their start and moved."""

    case: Case
    plan: Any
    base: Any
    start: Any
    moved: Any


class Numbers(NamedTuple):
    """Outputs of a cell with its leaves at their start and moved, and gradients for the moved ones."""

    at_start: Any
    adapted: Any
    merged: Any
    gradient: Any
    merged_gradient: Any


@cache
def hints(model: str) -> Any:
    """What data-dependent starts look at."""
    case = MODELS[model]()
    plan = lk.resolve(lk.Spec(dict.fromkeys(case.targets, lk.LoRA(rank=1))), case.params, case.fn, *case.inputs)
    # The tied table is looked up and multiplied: calibration refuses it, and its gradient is all that a start reads.
    collect = ["gradient"] if model == "tied" else ["inputs", "gradient"]
    return lk.calibrate(
        lambda p, inputs: case.fn(p, *inputs),
        case.params,
        plan,
        [case.inputs],
        loss=lambda out, _: loss(out),
        collect=collect,
        progress=False,
    )


@cache
def cell(way: str, model: str) -> Cell | str:
    """The cell, or why it does not apply."""
    case = MODELS[model]()
    spec = lk.Spec(dict.fromkeys(case.targets, WAYS[way]))
    try:
        plan = lk.resolve(spec, case.params, case.fn, *case.inputs)
    except lk.LoraxError as e:
        return str(e)
    base, factors = lk.split(case.params, plan, jax.random.key(1), hints=hints(model))
    return Cell(case, plan, base, factors, moved_leaves(plan, factors))


def loss(out: Any) -> Any:
    """A scalar whose gradient reaches every output."""
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in jax.tree.leaves(out))


@cache
def numbers(model: str) -> dict[str, Numbers]:
    """Every way on one model. The model is compiled once for merged weights, and for each kind of factors once."""
    cells = {way: c for way in WAYS if isinstance(c := cell(way, model), Cell)}
    moved = {way: c.moved for way, c in cells.items()}
    case = MODELS[model]()

    def merged_weights(factors: Any) -> Any:
        return {way: with_sites(c, factors[way]) for way, c in cells.items()}

    def pulled_back(factors: Any, cotangents: Any) -> Any:
        return jax.vjp(merged_weights, factors)[1](cotangents)[0]

    @jax.jit
    def of_merged(weights: Any) -> Any:
        named, treedef = flatten(case.params)
        return measured(
            lambda w: case.fn(jax.tree.unflatten(treedef, list((named | w).values())), *case.inputs), weights
        )

    merged = {way: of_merged(weights) for way, weights in jax.jit(merged_weights)(moved).items()}
    gradients = jax.jit(pulled_back)(moved, {way: gradient for way, (_, gradient) in merged.items()})

    programs: dict[Any, Any] = {}
    found = {}
    for way, c in cells.items():
        # Ways that differ in their start alone are one function of the factors.
        setting = replace(WAYS[way], start="normal") if hasattr(WAYS[way], "start") else WAYS[way]
        adapted = programs.setdefault((setting, jax.tree.structure(dict(c.start))), jax.jit(of_adapted(c)))
        (start, _), (out, gradient) = adapted(c.start), adapted(c.moved)
        found[way] = Numbers(start, out, merged[way][0], gradient, gradients[way])
    return jax.device_get(found)


def measured(fn: Any, x: Any) -> Any:
    """What a function of a tree returns, and the gradient of its loss there."""

    def scalar(x: Any) -> Any:
        out = fn(x)
        return loss(out), out

    (_, out), gradient = jax.value_and_grad(scalar, has_aux=True)(x)
    return out, gradient


def of_adapted(c: Cell) -> Any:
    """A function of factors: what the adapted function returns, and its gradient."""
    adapted = lk.adapt(c.case.fn, c.plan)
    return lambda factors: measured(lambda f: adapted(c.base, f, *c.case.inputs), factors)


def with_sites(c: Cell, factors: Any) -> dict[str, Any]:
    """The effective weight of every parameter; `lk.merge` without its checks, which cannot be differentiated."""
    named = {path: dense(x) for path, x in flatten(c.base)[0].items() if hasattr(x, "dtype")}
    sites = {site.path: effective_weight(site, named[site.path], factors[site.path]) for site in c.plan.sites}
    full = {path: leaves.value for path, leaves in factors.items() if isinstance(leaves, FullLeaf)}
    return named | sites | full


def normal_form(site: Any, w: Any, leaves: Any) -> np.ndarray:
    """W' in float64 numpy, from the update's rows and gains and `site.axes` alone."""
    update = jax.device_get(update_of(site, dense(w), leaves, site.scale))
    out = np.asarray(dense(w), np.float64)
    axes = site.axes
    letters = "abcdefghij"
    whole = "".join(letters[i] for i in range(out.ndim))
    ins, outs = ("".join(letters[i] for i in (*axes.stack, *some)) for some in (axes.inputs, axes.outputs))
    if update.a is not None:
        a, b = np.asarray(update.a, np.float64), np.asarray(update.b, np.float64)
        out = out + site.scale * np.einsum(f"z{ins},z{outs}->{whole}", a, b)
    for gain, own in ((update.out_gain, outs), (update.in_gain, ins)):
        if gain is not None:
            out = np.einsum(f"{whole},{own}->{whole}", out, np.asarray(gain, np.float64))
    return out
