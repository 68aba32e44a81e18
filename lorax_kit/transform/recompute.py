"""Rematerialisation: keep matrix products and the narrow points between blocks, recompute everything elementwise.

A program is cut into blocks (the attention, then the feed-forward half of a layer). A block keeps its inputs and the
results of its products; norms, activations, softmax and layout changes between them are recomputed when the
cotangent reaches the block. No product runs twice, unlike under `jax.checkpoint` of whole layers (Chen et al., arXiv
1604.06174), and unlike under its `dots_saveable` policy a block is recomputed only when its own turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from lorax_kit.after import after
from lorax_kit.transform.kernels import Kernel, Operands, Outputs, Precision

# Elementwise operations, layout changes and reductions: cheap beside a product of what they give.
CHEAP = frozenset(
    (
        *(
            "abs",
            "add",
            "add_any",
            "and",
            "atan2",
            "cbrt",
            "ceil",
            "clamp",
            "convert_element_type",
            "cos",
            "cosh",
            "div",
        ),
        *(
            "eq",
            "erf",
            "erf_inv",
            "erfc",
            "exp",
            "exp2",
            "expm1",
            "floor",
            "ge",
            "gt",
            "integer_pow",
            "is_finite",
            "le",
        ),
        *(
            "log",
            "log1p",
            "logistic",
            "lt",
            "max",
            "min",
            "mul",
            "ne",
            "neg",
            "not",
            "or",
            "pow",
            "rem",
            "round",
            "rsqrt",
        ),
        *("select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt"),
        *("square", "stop_gradient", "sub", "tan", "tanh", "xor", "bitcast_convert_type", "reduce_precision", "copy"),
        *("broadcast_in_dim", "concatenate", "dynamic_slice", "expand_dims", "iota", "pad", "reshape", "rev", "slice"),
        *("split", "squeeze", "transpose", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_sum"),
    )
)
INLINED = frozenset(("jit", "pjit", "closed_call", "core_call"))
CALLS = INLINED | {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}

Run = Callable[..., Any]


class Keep(NamedTuple):
    """How a block runs what it keeps.

    Attributes:
      run: (fn, *args) -> fn(*args).
      product: (kernel, precision, x, sites) -> outputs of a kernel.
    """

    run: Callable[..., Any]
    product: Callable[[Kernel, Precision, Array, Operands], Outputs]


class Block(NamedTuple):
    """Consecutive equations of a jaxpr.

    Attributes:
      eqns: in order.
      kept: ids of those whose results are kept.
      reads, writes: variables from before, and those wanted later.
      recomputed: whether it is worth it: it has kept equations and others, and nothing that must run once.
    """

    eqns: list[Any]
    kept: frozenset[int]
    reads: list[Any]
    writes: list[Any]
    recomputed: bool


def _dear(eqn: Any) -> int:
    """0: cheap to recompute. 1: one expensive operation, keep its result. 2: never (several, loops, effects)."""
    if eqn.effects:
        return 2
    inner = [getattr(j, "jaxpr", j) for j in jex.jaxprs_in_params(eqn.params)]
    if not inner:
        return 0 if eqn.primitive.name in CHEAP else 1
    within = sum(_dear(e) for j in inner for e in j.eqns)
    if eqn.primitive.name not in CALLS:
        return 2
    return within if within == 0 or eqn.primitive.name in INLINED else 2


def products(eqns: Sequence[Any]) -> frozenset[int]:
    """Ids of the equations that are kept: those that run one product, or another operation that is not cheap."""
    return frozenset(id(eqn) for eqn in eqns if _dear(eqn) == 1)


def blocks(jaxpr: Any, parameters: set[Any], everything: bool = False) -> list[Block]:
    """Cut a jaxpr where fewer bytes are alive than at the neighbouring places between two products.

    Args:
      jaxpr: to cut.
      parameters: variables that hold adapted parameters: alive throughout, and not counted.
      everything: a block runs all it holds again, functions with a derivative rule of their own among it.
    """
    eqns = list(jaxpr.eqns)
    dear = [_dear(eqn) for eqn in eqns]
    if everything:
        own_rule = [eqn.primitive.name in CALLS - INLINED and not eqn.effects for eqn in eqns]
        dear = [min(cost, 1) if own else cost for cost, own in zip(dear, own_rule, strict=True)]
    born, dies, still = _lives(jaxpr, parameters)
    alive = [0] * (len(eqns) + 1)
    for v, i in born.items():
        for place in range(i + 1, dies.get(v, i) + 1):
            alive[place] += v.aval.size * v.aval.dtype.itemsize
    cuts = {0, len(eqns)}
    for i, cost in enumerate(dear):
        if cost > 1:
            cuts |= {i, i + 1}
    anchors = [i for i, cost in enumerate(dear) if cost]
    # Where few bytes are alive between an anchor and the next, and at both ends: (bytes, place before which to cut).
    # Never between those that read the same value (q, k and v), which may run as one.
    pairs = [(i, j) for i, j in pairwise(anchors) if not _read(eqns[i]) & _read(eqns[j]) - still]
    narrow = [min((alive[p], p) for p in range(i + 1, j + 1)) for i, j in pairs]
    narrow = [(0, 0), *narrow, (alive[-1], len(eqns))]
    for before, (size, place), behind in zip(narrow, narrow[1:], narrow[2:], strict=False):
        if size <= min(before[0], behind[0]):
            cuts.add(place)
    ends = sorted(cuts)
    return [_block(eqns, dear, dies, i, j) for i, j in pairwise(ends)]


def _read(eqn: Any) -> set[Any]:
    return {v for v in eqn.invars if not isinstance(v, jex.Literal)}


def _lives(jaxpr: Any, parameters: set[Any]) -> tuple[dict[Any, int], dict[Any, int], set[Any]]:
    """Computed variable -> its equation; variable -> the last that reads it; parameters in any layout, not computed."""
    still = set(parameters)
    born: dict[Any, int] = {}
    dies: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        read = _read(eqn)
        dies.update(dict.fromkeys(read, i))
        if read and read <= still:
            still.update(eqn.outvars)
        else:
            born.update(dict.fromkeys(eqn.outvars, i))
    dies.update({v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, jex.Literal)})
    return born, dies, still


def _block(eqns: list[Any], dear: list[int], dies: dict[Any, int], first: int, end: int) -> Block:
    own = eqns[first:end]
    made = dict.fromkeys(v for eqn in own for v in eqn.outvars)  # in order: programs are the same each time
    read = dict.fromkeys(v for eqn in own for v in eqn.invars if not isinstance(v, jex.Literal))
    costs = dear[first:end]
    return Block(
        eqns=own,
        kept=frozenset(id(eqn) for eqn, cost in zip(own, costs, strict=True) if cost == 1),
        reads=[v for v in read if v not in made],
        writes=[v for v in made if dies.get(v, -1) >= end],
        recomputed=1 in costs and 0 in costs and max(costs) < 2,
    )


def _float(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating) and x.size > 0


def _without_tangents(tree: Any) -> Any:
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


def recomputed(fn: Callable[[Keep, Any, Any], Any], made: Any, held: Any, everything: bool = False) -> Any:
    """`fn(keep, made, held)`, of which the backward pass keeps the arguments, and what `keep` was asked to run.

    Args:
      fn: runs what is kept by `keep`, in the same order each time.
      made: values of the program, formed by it.
      held: parameters and inputs, which are there anyway.
      everything: the backward pass keeps the arguments alone.
    """
    return _without_tangents(_recomputed(fn, everything, made, held))


AGAIN = Keep(lambda run, *args: run(*args), lambda kernel, precision, x, sites: kernel.run(x, sites, precision))
"""Keeps nothing."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recomputed(fn: Callable[[Keep, Any, Any], Any], everything: bool, made: Any, held: Any) -> Any:
    keep = Keep(lambda run, *args: run(*args), lambda kernel, precision, x, sites: kernel.infer(x, sites, precision))
    return fn(keep, made, held)


def _recomputed_fwd(
    fn: Any, everything: bool, made: Any, held: Any
) -> tuple[Any, tuple[Any, Any, list[Any], list[Any]]]:
    kept: list[Any] = []
    # Which arguments are differentiated, told by structure: a residual cannot be a bool.
    moving = [() if x.perturbed else None for x in jax.tree.leaves((made, held))]
    made, held = jax.tree.map(lambda x: x.value, (made, held))

    if everything:
        return fn(AGAIN, made, held), (made, held, kept, moving)

    def run(fn: Run, *args: Any) -> Any:
        kept.append(fn(*args))
        return kept[-1]

    def product(kernel: Kernel, precision: Precision, x: Array, sites: Operands) -> Outputs:
        assert kernel.forward is not None
        ys, (_, _, thin) = kernel.forward(x, sites, precision)
        kept.append((ys, thin))
        return ys

    return fn(Keep(run, product), made, held), (made, held, kept, moving)


def _recomputed_bwd(
    fn: Any, everything: bool, residuals: tuple[Any, Any, list[Any], list[Any]], g: Any
) -> tuple[Any, Any]:
    made, held, kept, moving = residuals
    g = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x, g)
    floats = [x for x in jax.tree.leaves(g) if _float(x)]
    if floats:  # All that is formed again waits for the cotangent: XLA would form it early, and keep it.
        latest = max(floats, key=lambda x: x.size)
        made, kept = after(latest, (made, kept))
        # Frozen vectors too: XLA would spread the scale of a norm over the tokens once for both passes, and keep that
        # (a tenth of the temporaries of a step at 384 wide).
        flat, tree = jax.tree.flatten(held)
        still = [m is None and jnp.ndim(x) < 2 for x, m in zip(flat, moving[len(moving) - len(flat) :], strict=True)]
        held = jax.tree.unflatten(tree, [after(latest, x) if s else x for x, s in zip(flat, still, strict=True)])
    found = iter(kept)

    keep = Keep(
        lambda run, *args: _without_tangents(_known(run, next(found), args)),
        lambda kernel, precision, x, sites: _known_product(kernel, precision, next(found), x, sites),
    )
    keep = AGAIN if everything else keep
    leaves, tree = jax.tree.flatten((made, held))

    def again(differentiated: list[Any]) -> Any:
        queue = iter(differentiated)
        values = [x if m is None else next(queue) for x, m in zip(leaves, moving, strict=True)]
        return fn(keep, *jax.tree.unflatten(tree, values))

    (found_grads,) = jax.vjp(again, [x for x, m in zip(leaves, moving, strict=True) if m is not None])[1](g)
    queue = iter(found_grads)
    grads: tuple[Any, Any] = jax.tree.unflatten(tree, [None if m is None else next(queue) for m in moving])
    return grads


_recomputed.defvjp(_recomputed_fwd, _recomputed_bwd, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _known(run: Run, out: Any, args: Sequence[Any]) -> Any:
    """`run(*args)`, known to be `out`."""
    return out


def _known_fwd(run: Run, out: Any, args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    return out, args


def _known_bwd(run: Run, args: Sequence[Any], g: Any) -> tuple[None, Sequence[Any]]:
    return None, tuple(jax.vjp(run, *args)[1](g))


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
