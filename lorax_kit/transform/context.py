"""What the rules of the interpreter share: how parameters were used, and which kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array
from jax.tree_util import Partial

from lorax_kit.arrays.dtypes import widest
from lorax_kit.arrays.placement import varies
from lorax_kit.core.site import Axes
from lorax_kit.transform.base import Base
from lorax_kit.transform.cost import NONE, Costs, Product, together
from lorax_kit.transform.interpreter.bind import bind
from lorax_kit.transform.interpreter.tape import Tape
from lorax_kit.transform.kernels import KERNELS, Operands, Outputs
from lorax_kit.transform.weight import Parameter, Probe, Weight

UNDROPPED = frozenset(("lookup", "materialised"))
"""Uses that multiply no input, so dropout cannot act on them."""

NO_INPUT = "dropout has no input to act on here"


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of one adapted parameter.

    Attributes:
      path, primitive: which parameter, in which operation.
      how: "factored", "merged", "plain", "lookup" or "materialised".
      reason: why it runs that way.
      axes: what this use would have the parameter's axes be; None if it cannot say.
      product: sizes of the product, None for what is not one.
      repeats: how many times an enclosing scan runs it.
      note: what else the reader should know.
    """

    path: str
    primitive: str
    how: str
    reason: str
    axes: Axes | None = None
    product: Product | None = None
    repeats: int = 1
    note: str = ""


Tap = Callable[[Probe, tuple[tuple[int, ...], ...], Array, Partial, frozenset[str]], Array]
"""(probe, (contracted, free, stacked dimensions), value, inputs, axes of devices along which it differs) -> value.

What watches the inputs of parameters while a plan is being resolved. `inputs(value)` are those of one use: floats
(*S, M, K), the contracted dimensions in the order of the parameter's axes, or the rows looked up, integers (M,).
"""


class Shards(NamedTuple):
    """What watches the inputs of parameters within `shard_map`, into which no mutable array of the program goes.

    Attributes:
      begin: (whether types tell along which axes of devices a value differs), called as a device's program begins.
      end: what was seen since, arrays that all devices share; called as it ends.
      add: takes that outside.
    """

    begin: Callable[[bool], None]
    end: Callable[[], Any]
    add: Callable[[Any], None]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the rules share.

    Attributes:
      kernel: the one wanted, or "auto".
      trials: how many stacked trials a surrounding vmap runs.
      compute_dtype: of the plan.
      costs: of the forms, for "auto".
      repeats, note: for the uses recorded next.
      within: ids of the calls around what runs now, outermost first.
      uses: the record, by parameter, equation with the calls around it, and operand.
      narrow: broadcasts so far: variable -> (shape with ones where it was broadcast, the small array). `multiply` uses
        it to see along which axes a factor varies.
      said: variable -> axes of devices along which its value differs, where its type was told of more.
      explicit: whether arrays lie on a mesh with explicit axes.
      recompute: whether the backward pass forms elementwise results again instead of keeping them; "everything": those
        of products, too.
      tape: keeps results, within a block of which the rest is formed again.
      restores: whether parameters may be materialised; compressed ones are not.
      tap: watches the inputs of parameters, or None.
      shards: what a tap needs to watch within `shard_map`; None: it does not.
    """

    kernel: str = "auto"
    trials: int = 1
    compute_dtype: str | None = None
    costs: Costs = NONE
    repeats: int = 1
    note: str = ""
    within: tuple[int, ...] = ()
    uses: dict[tuple[str, tuple[int, ...], int], Use] = field(default_factory=dict)
    narrow: dict[Any, Any] = field(default_factory=dict)
    said: dict[Any, frozenset[str]] = field(default_factory=dict)
    explicit: bool = False
    recompute: bool | str = False
    tape: Tape | None = None
    restores: bool = True
    tap: Tap | None = None
    shards: Shards | None = None

    def record(
        self,
        weight: Parameter,
        eqn: Any,
        operand: int,
        *,
        how: str,
        reason: str = "",
        dims: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
        product: Product | None = None,
    ) -> None:
        """Note a use of each of the weight's parts.

        A loop's body may be traced twice, and a function's may be run by many calls: the equation and the calls around
        it tell uses apart.

        Args:
          eqn: the equation, or a word for what is none.
          dims: the dimensions contracted and the free ones, where it is a product; it tells the plan's axes.
          product: of the whole weight; each part is given its share.
        """
        name = eqn if isinstance(eqn, str) else eqn.primitive.name
        total = sum(prod(part.shape) for part in weight.parts)
        undropped = NO_INPUT if isinstance(weight, Weight) and weight.key is not None and how in UNDROPPED else ""
        for part in weight.parts:
            share = None
            if product is not None:
                share = product._replace(outputs=product.outputs * prod(part.shape) // total)
                if len(weight.parts) > 1:
                    share = share._replace(rank=product.rank // len(weight.parts))
            table = part.as_table() if dims is None else None
            self.uses[part.path, (*self.within, id(eqn)), operand] = Use(
                path=part.path,
                primitive=name,
                how="lookup" if table else how,
                reason=reason,
                axes=table if dims is None else part.axes(*dims),
                product=share,
                repeats=self.repeats,
                note="; ".join(filter(None, (undropped, self.note))),
            )

    def probed(
        self, eqn: Any, args: list[Any], operand: int, dims: tuple[tuple[int, ...], ...], inputs: Partial | None
    ) -> list[Any]:
        """The outputs of a product with a probe, which is recorded.

        Args:
          operand: the place of the probe among `args`; the first of the two, or the second.
          dims: of the probe: contracted, free and stacked.
          inputs: the other operand -> what `tap` is shown; None: nothing is shown.
        """
        probe, values = args[operand], list(args)
        self.record(probe, eqn, operand, how="factored", dims=(dims[0], dims[1]))
        values[operand] = probe.base.array()
        if inputs is not None:
            values[1 - operand] = self.tapped(eqn, probe, dims, args[1 - operand], inputs)
        return bind(eqn, values)

    def tapped(self, eqn: Any, probe: Probe, dims: tuple[tuple[int, ...], ...], x: Array, inputs: Partial) -> Array:
        """A value, shown to `tap` if there is one."""
        if self.tap is None:
            return x
        differs = varies(x)
        for v in eqn.invars:  # what met a sharded parameter was said to differ along its axes, too, and does not
            if not isinstance(v, jex.Literal) and v in self.said:
                differs &= self.said[v]
        return self.tap(probe, dims, x, inputs, differs)

    def update_dtype(self, *operands: Array | Base) -> Any:
        """What a low-rank update is computed in: the plan's dtype, or the one that holds all operands."""
        return jnp.dtype(self.compute_dtype or widest(*(x.dtype for x in operands)))

    def kept(self, run: Callable[..., Any], *args: Any) -> Any:
        """`run(*args)`, whose result a block keeps."""
        return run(*args) if self.tape is None else self.tape.run(run, *args)

    def product(self, how: str, x: Any, sites: Operands, precision: Any) -> Outputs:
        """A kernel's outputs, which a block keeps."""
        kernel = KERNELS[how]
        return kernel.run(x, sites, precision) if self.tape is None else self.tape.product(kernel, precision, x, sites)

    def together(self, products: Sequence[Product]) -> bool:
        """Whether products with the same input run as one."""
        return self.kernel != "plain" and together(products, self.trials)
