"""AdaLoRA: W' = W + s A^T diag(e * mask) B, with a budget of triplets (Zhang et al., arXiv 2303.10512, eq. 3).

Symbols: A is `a` (r, *stack, *in), the paper's P; e is `e` (r, *stack), its Lambda; B is `b` (r, *stack, *out), its Q;
s is `scale`. A triplet is a row of A, of B, and their e. To the loss is added gamma R(A, B) (eq. 4),
gamma being `orthogonal`:

    R = |A A^T - I|_F^2 + |B B^T - I|_F^2

Which triplets stay within the budget decides `lk.adalora_budget`, an optimiser around `lk.partition`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.arrays.dtypes import wide
from lorax_kit.core.leaves import site_key
from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import AlphaSetting, is_float32, need, plain, shown
from lorax_kit.peft_form import FromPeft, PeftForm, TorchModule
from lorax_kit.starts.draws import draw_rows


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(AlphaSetting):
    """Adapt by triplets of a singular value and its vectors (Zhang et al., arXiv 2303.10512).

    Args:
      rank: triplets of every site before `lk.adalora_budget` takes some away; at least 1, at most min(in, out). The
        paper starts at 1.5 times the average rank it ends with.
      alpha: the scale is alpha / (rank + 1e-5), as PEFT has it; it stays when triplets go. None means alpha = rank.
      orthogonal: gamma, weight of the penalty on rows that are not orthonormal: add `lk.penalty(plan, factors)` to the
        loss.
      dropout: probability in [0, 1) of dropping inputs of the low-rank path while training.
      dtype, inputs: as in `LoRA`.
    """

    orthogonal: float = 0.5
    kind: ClassVar[str] = "adalora"

    def __post_init__(self, *_: Any) -> None:
        object.__setattr__(self, "orthogonal", plain(self.orthogonal))
        super().__post_init__()
        ok = is_float32(self.orthogonal) and self.orthogonal >= 0
        need(ok, f"orthogonal is {shown(self.orthogonal)}; it must be a number of at least 0, of float32's range.")

    @property
    def scale(self) -> float:
        """alpha / (rank + 1e-5)."""
        return float(self.effective_alpha / (self.rank + 1e-5))


class AdaLoRALeaves(NamedTuple):
    """The leaves of AdaLoRA.

    Attributes:
      a: (rank, *stack, *in).
      e: (rank, *stack).
      b: (rank, *stack, *out).
      mask: (rank, *stack), 1 where a triplet is there and 0 where it was taken away; frozen, but for the budget.
    """

    a: Array
    e: Array
    b: Array
    mask: Array


def init(site: Site, w: Array, key: Array, hints: Hints) -> AdaLoRALeaves:
    """A and B from N(0, 0.02^2), as PEFT draws them, e zero, every triplet there."""
    dtype = jnp.dtype(site.setting.dtype)
    own = site_key(key, site.path)
    a, b = (
        draw_rows(jax.random.fold_in(own, i), shape, 0.02, dtype=dtype)
        for i, shape in enumerate((site.a_shape, site.b_shape))
    )
    rows = (site.rank, *site.stack_shape)
    return AdaLoRALeaves(a, jnp.zeros(rows, dtype), b, jnp.ones(rows, dtype))


def update(site: Site, w: Array, leaves: AdaLoRALeaves, scale: Any) -> Update:
    """Rows of A times what is there of e; `w` plays no part."""
    e = leaves.e * leaves.mask
    return Update(leaves.a * e.reshape(*e.shape, *(1,) * len(site.in_shape)), leaves.b)


def penalty(site: Site, leaves: AdaLoRALeaves) -> Array:
    """gamma R(A, B), over all stacked matrices. Zero rows, which a smaller rank has in a stack of trials, count 0."""
    total = jnp.zeros((), wide(site.setting.dtype))
    for x in (leaves.a, leaves.b):
        rows = x.astype(total.dtype).reshape(site.rank, leaves.e[0].size, -1)
        with jax.default_matmul_precision("highest"):
            gram = jnp.einsum("isk,jsk->sij", rows, rows)
        there = jnp.any(rows != 0, axis=-1).T[:, None]
        total = total + jnp.sum(jnp.square(gram - jnp.where(there, jnp.eye(site.rank, dtype=total.dtype)[None], 0)))
    return site.setting.orthogonal * total  # type: ignore[attr-defined]


def _pattern(m: TorchModule) -> Any:
    """Which of the first triplets are left, where the config says so: PEFT stores the others no more."""
    patterns = m.config["rank_pattern"] or {}
    pattern = next((x for name, x in patterns.items() if name.split(".lora_E")[0] == m.name), None)
    if pattern is None:
        return None
    mask = np.asarray(pattern, bool)
    need(mask.shape == (m.config["init_r"],), f"rank_pattern has {mask.size} triplets at {m.name!r}, not init_r.")
    return mask


def _shapes(m: TorchModule, tensors: Any) -> dict[str, tuple[int, ...]]:
    mask = _pattern(m)
    left = m.config["init_r"] if mask is None else int(mask.sum())
    return {"lora_A": (left, m.size), "lora_E": (left, 1), "lora_B": (m.outputs, left)}


def _read(m: TorchModule, tensors: Any) -> FromPeft:
    mask, c = _pattern(m), m.config
    mask = np.ones(c["init_r"], bool) if mask is None else mask
    need(
        c["lora_alpha"] > 0 or bool(mask.all()),
        f"lora_alpha {c['lora_alpha']} with masked triplets: PEFT's scale is then another at every load.",
    )

    def spread(x: Any) -> Any:
        out = np.zeros((len(mask), *x.shape[1:]), x.dtype)
        out[mask] = x
        return out

    leaves = {
        "a": spread(tensors["lora_A"]),
        "e": spread(tensors["lora_E"])[:, 0],
        "b": spread(tensors["lora_B"].T),
        "mask": mask.astype(np.float32),
    }
    alpha = c["lora_alpha"] if c["lora_alpha"] > 0 else None
    keywords = {"rank": c["init_r"], "alpha": alpha, "dropout": c["lora_dropout"] or 0.0}
    return FromPeft(keywords | {"orthogonal": c["orth_reg_weight"]}, leaves)


def _write(m: TorchModule, setting: Any, leaves: Any) -> dict[str, Any]:
    mask = np.asarray(leaves["mask"], np.float64)
    odd = mask[(mask != 0) & (mask != 1)]
    need(
        not odd.size,
        f"its mask holds {odd[0] if odd.size else 0:.4g}; in PEFT a triplet is there (1) or not (0).\n"
        "  multiply e by the mask and let that be 1, or use lk.save_adapter",
    )
    left = mask == 1
    return {"lora_A": leaves["a"][left], "lora_E": leaves["e"][left, None], "lora_B": leaves["b"][left].T}


def _config(m: TorchModule, setting: Any, leaves: Any) -> dict[str, Any]:
    """With a schedule that PEFT accepts: it builds no config without."""
    return {
        "init_r": setting.rank,
        "target_r": max(1, setting.rank * 2 // 3),
        "lora_alpha": setting.effective_alpha,
        "lora_dropout": setting.dropout,
        "orth_reg_weight": setting.orthogonal,
        **{"tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1},
    }


def _share(modules: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The masks, where there are any."""
    masks = {f"{name}.lora_E": [bool(x) for x in leaves["mask"]] for name, (_, _, leaves, _) in modules.items()}
    return {}, {"rank_pattern": masks if not all(all(mask) for mask in masks.values()) else None}


_IGNORED = {"r", "use_rslora", "alpha_pattern", "lora_bias", "target_parameters", "init_lora_weights"}
_SCHEDULE = {"target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step"}
ADALORA = Method(
    setting=AdaLoRA,
    leaves=AdaLoRALeaves,
    init=init,
    update=update,
    rows=frozenset({"a", "e", "b", "mask"}),
    frozen=frozenset({"mask"}),
    penalty=penalty,
    peft=PeftForm(
        peft_type="ADALORA",
        axes={"a": "ri", "e": "r", "b": "ro", "mask": "r"},
        layers=frozenset({"Linear", "Conv1D", "Conv2d"}),
        keys={"init_r": 12, "lora_alpha": 8, "lora_dropout": 0.0, "orth_reg_weight": 0.5, "rank_pattern": None},
        training=frozenset(_IGNORED | _SCHEDULE),
        refused={"use_dora": "PEFT's AdaLoRA does not have it", "layer_replication": "it repeats layers of the base"},
        bias="lora_only",
        endings=("lora_A", "lora_E", "lora_B"),
        shapes=_shapes,
        read=_read,
        write=_write,
        config=_config,
        share=_share,
    ),
)
