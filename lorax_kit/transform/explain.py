"""`explain`: how every site runs, what it costs, and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import jax
from jax import Array

from lorax_kit.core.leaves import FactorTree, trained_only
from lorax_kit.core.paths import Params, flatten, is_array, is_state, nbytes
from lorax_kit.transform.adapt import Adapted
from lorax_kit.transform.context import Use
from lorax_kit.transform.cost import step_flops


@dataclass(frozen=True, kw_only=True)
class Row:
    """One use of one site.

    FLOPs count forward and backward of its products, adapted and in full fine-tuning; 0 where unknown. `params` and
    `bytes` are those of the trained leaves, `full_bytes` those of the parameter itself, `base_bytes` those of the base
    as it is held, quantised or not, each at the site's first use.
    """

    path: str
    shape: tuple[int, ...]
    method: str
    rank: int
    params: int
    bytes: int
    full_bytes: int
    base_bytes: int
    primitive: str
    how: str
    reason: str
    flops: int
    full_flops: int


@dataclass(frozen=True)
class Explanation:
    """Rows by site, totals, and text: `print(lk.explain(...))`.

    Attributes:
      rows: how each use of each site runs.
      trained_params, base_params: numbers, of all.
      capped: (rank asked for, highest) of the sites that hold no higher rank, by path.
      full: numbers of the parameters that are trained in full, by path.
    """

    rows: tuple[Row, ...]
    trained_params: int
    base_params: int
    capped: dict[str, tuple[int, int]] = field(default_factory=dict)
    full: dict[str, int] = field(default_factory=dict)

    @property
    def materialised(self) -> tuple[str, ...]:
        """Paths of the sites that some use sums up in full."""
        return tuple(sorted({r.path for r in self.rows if r.how == "materialised"}))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `sites` and totals."""
        flops, full = sum(r.flops for r in self.rows), sum(r.full_flops for r in self.rows)
        return {
            "sites": [asdict(r) for r in self.rows],
            "trained_params": self.trained_params,
            "base_params": self.base_params,
            "flops": flops,
            "full_flops": full,
            "bytes": sum(r.bytes for r in self.rows),
            "full_bytes": sum(r.full_bytes for r in self.rows),
            "base_bytes": sum(r.base_bytes for r in self.rows),
            "flops_ratio": flops / full if full else None,
            "materialised": list(self.materialised),
            "capped": {path: list(ranks) for path, ranks in self.capped.items()},
            "full": dict(self.full),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        head = ("site", "shape", "rank", "params", "bytes", "of full", "runs", "MFLOP", "of full", "why")
        table = [head]
        for r in self.rows:
            ratio = f"{r.flops / r.full_flops:.2f}x" if r.full_flops else "-"
            shape = "x".join(map(str, r.shape))
            rank = str(r.rank) + ("" if r.method == "lora" else f" {r.method}")
            held = f"{r.bytes / r.full_bytes:.3f}x" if r.full_bytes else "-"
            flops = f"{r.flops / 1e6:.1f}"
            cells = (r.path, shape, rank, f"{r.params:,}", f"{r.bytes:,}", held, r.how, flops, ratio, r.reason)
            table.append(cells)
        widths = [max(len(row[i]) for row in table) for i in range(len(head) - 1)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in table]
        facts = self.to_dict()
        if facts["flops_ratio"]:
            lines.append(
                f"forward and backward of these products: {facts['flops'] / 1e6:,.1f} MFLOP, "
                f"{facts['flops_ratio']:.2f}x of full fine-tuning"
            )
        if facts["base_bytes"] != facts["full_bytes"]:
            ratio = facts["base_bytes"] / facts["full_bytes"]
            lines.append(f"base of these sites: {facts['base_bytes']:,} bytes, {ratio:.3f}x of the parameters")
        if self.full:
            names = ", ".join([*self.full][:4]) + (f" and {len(self.full) - 4} more" if len(self.full) > 4 else "")
            lines.append(f"trained in full: {names} ({sum(self.full.values()):,} parameters)")
        share = self.trained_params / max(self.base_params, 1)
        lines.append(f"{self.trained_params:,} trained of {self.base_params:,} parameters ({share:.2%})")
        for path, (asked, highest) in self.capped.items():
            lines.append(f"{path}: rank {asked} capped to {highest}, the highest it can hold")
        if self.materialised:
            lines.append(f"materialised: {', '.join(self.materialised)}")
        return "\n".join(lines)


def explain(
    adapted: Adapted, base: Params, factors: FactorTree, *args: Any, dropout_key: Array | None = None, **kwargs: Any
) -> Explanation:
    """How each site of an adapted function runs for these inputs. Nothing is computed, only traced.

    Args:
      adapted: from `lk.adapt`.
      base, factors: from `lk.split`.
      *args, **kwargs: inputs as for `adapted`.
      dropout_key: as for `adapted`: with it, the sites with dropout are shown as they run in training.

    Returns:
      An `Explanation`: print it, or read `.rows`, `.materialised`, `.to_dict()`, `.to_json()`.
    """
    inputs, tree = jax.tree_util.tree_flatten((base, args, kwargs))
    dynamic = {i: x for i, x in enumerate(inputs) if is_array(x)}
    uses: list[Use] = []

    def trace(factors: FactorTree, dynamic: dict[int, Any]) -> None:
        values = [dynamic.get(i, x) for i, x in enumerate(inputs)]
        whole, some, named = jax.tree_util.tree_unflatten(tree, values)
        _, ctx = adapted.traced(whole, factors, some, named, dropout_key)
        uses.extend(ctx.uses.values())

    jax.eval_shape(trace, dict(factors), dynamic)
    rows, counted, trained_factors = [], set(), trained_only(adapted.plan, factors)
    named, _ = flatten(base)
    sites = {site.path for site in adapted.plan.sites}
    for use in uses:
        if use.path not in sites:  # a quantised parameter that nothing adapts
            continue
        site = adapted.plan.site(use.path)
        first = use.path not in counted
        flops = full = 0
        if use.product is not None and use.how != "lookup":
            flops, full = (use.repeats * n for n in step_flops(use.product, use.how))
        rows.append(
            Row(
                path=use.path,
                shape=site.shape,
                method=site.setting.kind,
                rank=site.rank,
                params=_entries(trained_factors[use.path]) if first else 0,
                bytes=_bytes(trained_factors[use.path]) if first else 0,
                full_bytes=nbytes(site.shape, site.dtype) if first else 0,
                base_bytes=_bytes(named[use.path]) if first else 0,
                primitive=use.primitive,
                how=use.how,
                reason="; ".join(filter(None, (use.reason, use.note))),
                flops=flops,
                full_flops=full,
            )
        )
        counted.add(use.path)
    trained = _entries(trained_factors)
    total = sum(prod(x.shape) for x in named.values() if is_array(x) and not is_state(x))
    whole = {leaf.path: prod(leaf.shape) for leaf in adapted.plan.full if leaf.trained}
    return Explanation(tuple(rows), trained, total, adapted.plan.capped, whole)


def _entries(tree: Any) -> int:
    return sum(prod(x.shape) for x in jax.tree_util.tree_leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(nbytes(x.shape, x.dtype) for x in jax.tree_util.tree_leaves(tree))
