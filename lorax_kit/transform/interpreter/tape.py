"""What a recomputed block keeps between the passes: results by the place of their equation, not by their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lorax_kit.transform.kernels import Kernel, Operands, Outputs, Precision

Run = Callable[..., Any]
Place = tuple[int, ...]
"""Numbers of an equation and of the calls around it, outermost first; then, which of its results."""


class Tape:
    """Keeps nothing: every result is formed where it is needed."""

    def at(self, number: int) -> Tape:
        """The tape for what an equation of this number does."""
        return self

    def run(self, fn: Run, *args: Any) -> Any:
        """`fn(*args)`, kept."""
        return fn(*args)

    def product(self, kernel: Kernel, precision: Precision, x: Array, sites: Operands) -> Outputs:
        """A kernel's outputs, kept."""
        return kernel.run(x, sites, precision)


class Inference(Tape):
    """Keeps nothing, where nothing is differentiated."""

    def product(self, kernel: Kernel, precision: Precision, x: Array, sites: Operands) -> Outputs:
        """A kernel's outputs, without what its derivative would need."""
        return kernel.infer(x, sites, precision)


class Recorder(Tape):
    """Keeps each result in `results`, in the forward pass."""

    def __init__(self, results: dict[Place, Any] | None = None, place: Place = ()) -> None:
        self.results: dict[Place, Any] = {} if results is None else results
        self._place, self._count = place, count()

    def at(self, number: int) -> Recorder:
        """See `Tape.at`."""
        return Recorder(self.results, (*self._place, number))

    def run(self, fn: Run, *args: Any) -> Any:
        """See `Tape.run`."""
        return self._record(fn(*args))

    def product(self, kernel: Kernel, precision: Precision, x: Array, sites: Operands) -> Outputs:
        """A kernel's outputs; the thin products of its derivative are kept, too."""
        assert kernel.forward is not None
        outputs, (_, _, thin) = kernel.forward(x, sites, precision)
        self._record((outputs, thin))
        return outputs

    def _record(self, result: Any) -> Any:
        place = (*self._place, next(self._count))
        assert place not in self.results, f"two results at {place}"
        self.results[place] = result
        return result


class Player(Tape):
    """Gives the kept results again, in the backward pass; each is differentiated as what formed it."""

    def __init__(self, results: Mapping[Place, Any], place: Place = ()) -> None:
        self._results, self._place, self._count = results, place, count()

    def at(self, number: int) -> Player:
        """See `Tape.at`."""
        return Player(self._results, (*self._place, number))

    def run(self, fn: Run, *args: Any) -> Any:
        """The kept result of `fn(*args)`."""
        return without_tangents(_known(fn, self._kept(), args))

    def product(self, kernel: Kernel, precision: Precision, x: Array, sites: Operands) -> Outputs:
        """The kept outputs of a kernel."""
        outputs: Outputs = _known_product(kernel, precision, self._kept(), x, sites)
        return outputs

    def _kept(self) -> Any:
        return self._results[*self._place, next(self._count)]


def without_tangents(tree: Any) -> Any:
    """Whole numbers and bools of a tree, differentiated as constants; floats as they are.

    JAX gives such results of a `custom_vjp` tangents of type float0, which `cond` refuses for its index.
    """

    def constant(x: Any) -> Any:
        if not isinstance(x, Array) or jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):  # random keys
            return lax.stop_gradient(x)
        if x.dtype == bool:
            return lax.ne(x, lax.full_like(x, False))
        return lax.bitcast_convert_type(x, x.dtype)

    return jax.tree.map(constant, tree)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _known(run: Run, out: Any, args: Any) -> Any:
    """`run(*args)`, known to be `out`."""
    return out


def _known_fwd(run: Run, out: Any, args: Any) -> tuple[Any, Any]:
    return out, args


def _known_bwd(run: Run, args: Any, g: Any) -> tuple[None, Any]:
    # By leaves: a quantised weight among the results holds other functions each time it is made.
    return None, tuple(jax.vjp(lambda *args: jax.tree.leaves(run(*args)), *args)[1](jax.tree.leaves(g)))


_known.defvjp(_known_fwd, _known_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _known_product(kernel: Kernel, precision: Precision, known: Any, x: Array, sites: Operands) -> Outputs:
    """A kernel's outputs, known."""
    outputs: Outputs = known[0]
    return outputs


def _known_product_fwd(kernel: Kernel, precision: Precision, known: Any, x: Array, sites: Operands) -> tuple[Any, Any]:
    return known[0], (x, sites, known[1])


def _known_product_bwd(kernel: Kernel, precision: Precision, residuals: tuple, gs: Outputs) -> tuple[Any, ...]:
    assert kernel.backward is not None
    return None, *kernel.backward(precision, residuals, gs)


_known_product.defvjp(_known_product_fwd, _known_product_bwd)
