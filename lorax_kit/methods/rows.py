"""Rows: W' = W + E^T B: chosen rows of a table move freely, every other stays (PEFT's trainable tokens).

Symbols: E is `a` (k, *in), the unit vectors of the k chosen rows, frozen; B is `b` (k, *out), trained from zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.method import Hints, Method, Update
from lorax_kit.core.site import Site
from lorax_kit.core.specs.setting import Setting, is_int, need, plain, shown
from lorax_kit.errors import PlanError
from lorax_kit.peft_form import FromPeft, PeftForm, TorchModule


@dataclass(frozen=True, kw_only=True)
class Rows(Setting):
    """Train chosen rows of a table, such as the embeddings of a few new tokens, and no other.

    Args:
      rows: indices along the axis that is looked up; of a kernel, along its inputs.
      dtype, inputs: as in `LoRA`.

    Example:
      >>> import lorax_kit as lk
      >>> table, ids = {"table": jnp.ones((10, 4))}, jnp.arange(3)
      >>> plan = lk.resolve(lk.Spec({"table": Rows(rows=(2, 7))}), table, lambda p, i: p["table"][i], ids)
      >>> lk.split(table, plan, jax.random.key(0))[1]["table"].b.shape
      (2, 4)
    """

    rows: tuple[int, ...]
    kind: ClassVar[str] = "rows"

    def __post_init__(self, *_: Any) -> None:
        super().__post_init__()
        given = [plain(i) for i in self.rows] if isinstance(self.rows, list | tuple | range) else [None]
        ok = len(given) > 0 and all(is_int(i) and i >= 0 for i in given) and len(set(given)) == len(given)
        need(ok, f"rows is {shown(self.rows)}; it must list different rows of the table, such as (5, 7).")
        object.__setattr__(self, "rows", tuple(given))


class RowLeaves(NamedTuple):
    """The leaves of Rows.

    Attributes:
      a: (k, *stack, *in), frozen: which rows.
      b: (k, *stack, *out): what is added to them.
    """

    a: Array
    b: Array


def init(site: Site, w: Array, key: Array, hints: Hints) -> RowLeaves:
    """The unit vectors of the rows, and zeros."""
    rows, size = site.setting.rows, prod(site.in_shape)  # type: ignore[attr-defined]
    if max(rows) >= size:
        raise PlanError(f"row {max(rows)} does not exist: there are {size}.")
    dtype = jnp.dtype(site.setting.dtype)
    ones = jax.nn.one_hot(jnp.asarray(rows), size, dtype=dtype).reshape(
        len(rows), *(1,) * len(site.stack_shape), *site.in_shape
    )
    a = jnp.broadcast_to(ones, (len(rows), *site.stack_shape, *site.in_shape))
    return RowLeaves(a, jnp.zeros((len(rows), *site.stack_shape, *site.out_shape), dtype))


def update(site: Site, w: Array, leaves: RowLeaves, scale: Any) -> Update:
    """Unit vectors times what is added."""
    return Update(leaves.a, leaves.b)


def _read(m: TorchModule, tensors: Any) -> FromPeft:
    """PEFT keeps the new rows themselves."""
    rows = [int(i) for i in m.config["token_indices"]]
    units = np.zeros((len(rows), m.size))
    units[np.arange(len(rows)), rows] = 1
    return FromPeft({"rows": tuple(rows)}, {"a": units, "b": tensors[_DELTA].astype(np.float64) - m.weight()[rows]})


def _shapes(m: TorchModule, tensors: Any) -> dict[str, tuple[int, ...]]:
    rows = m.config["token_indices"]
    need(isinstance(rows, list | tuple), f"token_indices is {rows!r}; it must be a list of rows, such as [5, 7].")
    need(max(rows, default=0) < m.size, f"row {max(rows, default=0)} does not exist: there are {m.size}.")
    return {_DELTA: (len(rows), m.outputs)}


def _write(m: TorchModule, setting: Any, leaves: Any) -> dict[str, Any]:
    return {_DELTA: (m.weight()[list(setting.rows)] + leaves["b"]).astype(np.float32)}


_DELTA = "trainable_tokens_delta"
ROWS = Method(
    setting=Rows,
    leaves=RowLeaves,
    init=init,
    update=update,
    frozen=frozenset({"a"}),
    peft=PeftForm(
        peft_type="TRAINABLE_TOKENS",
        beside={"LORA": (f"token_adapter.{_DELTA}", "trainable_token_indices")},
        axes={"a": "ri", "b": "ro"},
        layers=frozenset({"Embedding"}),
        keys={"token_indices": ()},
        training=frozenset({"init_weights"}),
        ties="always",
        endings=(_DELTA,),
        shapes=_shapes,
        read=_read,
        write=_write,
        config=lambda m, setting, leaves: {"token_indices": list(setting.rows)},
    ),
)
