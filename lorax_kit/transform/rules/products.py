"""Rules of products: dot_general in any arrangement, ragged_dot, the parameter on either side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.tree_util import Partial

from lorax_kit.arrays.placement import alike
from lorax_kit.transform.base import Dense, Empty, Restored
from lorax_kit.transform.context import Context
from lorax_kit.transform.cost import Facts, Product, choose
from lorax_kit.transform.interpreter.bind import bind
from lorax_kit.transform.interpreter.registry import joint, rule
from lorax_kit.transform.kernels import Operand, Operands, lowrank_updates, plain_updates
from lorax_kit.transform.weight import Parameter, Probe, Weight, multiplied

Dims = tuple[int, ...]


class Arrangement(NamedTuple):
    """A dot_general from the weight's side. Dimensions of the weight, and of the other operand `x`.

    Attributes:
      contract, batch, free: of the weight.
      x_contract, x_batch, x_free: of `x`, the first two in the order of the weight's.
      left: whether the weight is the left operand.
    """

    contract: Dims
    batch: Dims
    free: Dims
    x_contract: Dims
    x_batch: Dims
    x_free: Dims
    left: bool


def _arranged(eqn: Any, args: Sequence[Any]) -> tuple[Any, Array, Arrangement]:
    left = isinstance(args[0], Parameter)
    side = 0 if left else 1
    weight, x = args[side], args[1 - side]
    contracting, batch = eqn.params["dimension_numbers"]
    contract, x_contract = contracting[side], contracting[1 - side]
    own, other = batch[side], batch[1 - side]
    free = tuple(d for d in range(weight.ndim) if d not in (*contract, *own))
    x_free = tuple(d for d in range(x.ndim) if d not in (*x_contract, *other))
    return weight, x, Arrangement(contract, own, free, x_contract, other, x_free, left)


@rule("dot_general", keeps=True)
def dot_general(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """x W' with any dimension numbers, W' on either side."""
    if all(isinstance(v, Parameter) for v in args):
        return "multiplied with another adapted parameter"
    weight, x, at = _arranged(eqn, args)
    if isinstance(weight, Probe):
        if not at.contract or not at.free:
            return "an outer or inner product leaves no input or no output axes"
        own = _in_own_order(weight, at)
        dims = (own.contract, own.free, own.batch)
        return ctx.probed(eqn, args, 0 if at.left else 1, dims, Partial(partial(_inputs_of, at=own)))
    scaled = _scaled(weight, at)
    if scaled == "both":
        return "magnitudes vary along inputs and outputs"
    if weight.gain is not None and scaled == "inputs":
        places = dict(zip((*at.batch, *at.contract), (*at.x_batch, *at.x_contract), strict=True))
        x = multiplied(x, _along(weight.gain, places, x.ndim))
    operand = _operand(weight, at)
    if operand is None:
        y = ctx.kept(lambda weight, x: _einsum(ctx, eqn, weight, x, at), weight, x)
    else:
        (y,) = _matrices(ctx, [eqn], [weight], [operand], x, [at])
    return [_outputs_scaled(y, weight, at) if scaled == "outputs" else y]


@joint("dot_general")
def dot_generals(ctx: Context, eqns: list[Any], args: list[list[Any]]) -> list[Any] | None:
    """Products of one x with several weights (q, k and v) at once; None where each should run alone."""
    arranged = [_arranged(eqn, pair) for eqn, pair in zip(eqns, args, strict=True)]
    weights, x, ats = [w for w, _, _ in arranged], arranged[0][1], [at for _, _, at in arranged]
    if any(isinstance(w, Probe) or w.key is not None or w.adapter is not None for w in weights):
        return None
    if any(_scaled(w, at) in ("inputs", "both") for w, _, at in arranged):
        return None
    operands = [_operand(w, at) for w, at in zip(weights, ats, strict=True)]
    products = [_product(w, x, at) for w, at in zip(weights, ats, strict=True)]
    alone = len({(w.base.dtype, type(w.base)) for w in weights}) > 1
    if alone or any(o is None for o in operands) or not ctx.together(products):
        return None
    ys = _matrices(ctx, eqns, weights, [o for o in operands if o is not None], x, ats)
    return [y if w.gain is None else _outputs_scaled(y, w, at) for y, w, at in zip(ys, weights, ats, strict=True)]


def _scaled(weight: Weight, at: Arrangement) -> str:
    """What a weight's magnitudes scale in a product: "nothing", "inputs", "outputs" or "both"."""
    if weight.gain is None:
        return "nothing"
    varies = weight.owned(weight.gain, 0)
    inputs, outputs = bool(varies & set(at.contract)), bool(varies & set(at.free))
    return "both" if inputs and outputs else "inputs" if inputs else "outputs"


def _outputs_scaled(y: Array, weight: Weight, at: Arrangement) -> Array:
    assert weight.gain is not None
    first = len(at.batch) + (0 if at.left else len(at.x_free))
    places = {d: i for i, d in enumerate(at.batch)} | {d: first + i for i, d in enumerate(at.free)}
    return multiplied(y, _along(weight.gain, places, y.ndim))


def _along(gain: Array, places: dict[int, int], ndim: int) -> Array:
    """A gain laid out to multiply another array, whose dimension `places[d]` is the weight's dimension `d`."""
    order = sorted(places, key=places.__getitem__)
    shape = [1] * ndim
    for d in order:
        shape[places[d]] = gain.shape[d]
    return jnp.transpose(gain, (*order, *(d for d in range(gain.ndim) if d not in places))).reshape(shape)


def _sizes(shape: tuple[int, ...], dims: Dims) -> Dims:
    return tuple(shape[d] for d in dims)


def _product(weight: Weight, x: Array, at: Arrangement) -> Product:
    k, n, s = (prod(_sizes(weight.shape, dims)) for dims in (at.contract, at.free, at.batch))
    return Product(s, prod(_sizes(x.shape, at.x_free)), k, n, weight.a.shape[0])


def _operand(weight: Weight, at: Arrangement) -> Operand | None:
    """A weight as matrices w (*S, K, N), a (r, *S, K), b (r, *S, N); None if its factors lie otherwise.

    For kernels in the usual layout every transpose is the identity and every reshape free.
    """
    sides = weight.sides(at.contract, at.free, at.batch)
    if sides is None:
        return None
    down, up = sides
    lead = (prod(_sizes(weight.shape, at.batch)),) if at.batch else ()

    def matrix(f: Array, mine: Dims, others: Dims) -> Array:
        order = (0, *(1 + d for d in (*at.batch, *mine, *others)))
        return lax.reshape(_transposed(f, order), (f.shape[0], *lead, prod(_sizes(weight.shape, mine))))

    base = weight.base  # no kernel reads one that is restored: `Restored.dot` does
    w = jnp.zeros((0,), base.dtype) if isinstance(base, Restored) else _matrix_of(base.w, weight.shape, at)
    return Operand(w, matrix(down, at.contract, at.free), matrix(up, at.free, at.contract), weight.scale)


def _matrix_of(w: Array, shape: Dims, at: Arrangement) -> Array:
    s, k, n = (prod(_sizes(shape, dims)) for dims in (at.batch, at.contract, at.free))
    w = _transposed(w, (*at.batch, *at.contract, *at.free))
    return lax.reshape(w, (s, k, n) if at.batch else (k, n))


def _in_own_order(weight: Probe, at: Arrangement) -> Arrangement:
    """The same arrangement, with contracted and batched dimensions in the order of the parameter's axes."""

    def ordered(dims: Dims, others: Dims) -> tuple[Dims, Dims]:
        order = sorted(range(len(dims)), key=lambda i: weight.parts[0].dims[dims[i]])
        return tuple(dims[i] for i in order), tuple(others[i] for i in order)

    contract, x_contract = ordered(at.contract, at.x_contract)
    batch, x_batch = ordered(at.batch, at.x_batch)
    return at._replace(contract=contract, x_contract=x_contract, batch=batch, x_batch=x_batch)


def _inputs_of(x: Array, at: Arrangement) -> Array:
    """`x` as (*S, M, K)."""
    s, m, k = (prod(_sizes(x.shape, dims)) for dims in (at.x_batch, at.x_free, at.x_contract))
    x = _transposed(x, (*at.x_batch, *at.x_free, *at.x_contract))
    return lax.reshape(x, (s, m, k) if at.batch else (m, k))


def _as(x: Array, dtype: Any) -> Array:
    return x if x.dtype == dtype else x.astype(dtype)


def _transposed(x: Array, order: Dims) -> Array:
    """Without an operation where there is nothing to do: a usual kernel is traced twice as fast."""
    return x if order == tuple(range(x.ndim)) else lax.transpose(x, order)


def _matrices(
    ctx: Context, eqns: list[Any], weights: list[Weight], operands: list[Operand], x: Array, ats: list[Arrangement]
) -> list[Array]:
    """Products of x with one or several weights, by one call of a kernel."""
    eqn, at = eqns[0], ats[0]
    products = [_product(weight, x, one) for weight, one in zip(weights, ats, strict=True)]
    x3 = _inputs_of(x, at)
    out_dtype, w_dtype = eqn.outvars[0].aval.dtype, weights[0].base.dtype
    dtype = ctx.update_dtype(x, weights[0].base)
    base, dropout = weights[0].base, weights[0].key is not None
    one_dtype = dtype == x.dtype == w_dtype == out_dtype
    rounds = "" if one_dtype and jnp.finfo(dtype).bits >= 32 else str(w_dtype)
    facts = Facts(ctx.kernel, ctx.trials, isinstance(base, Empty), isinstance(base, Restored), dropout, rounds)
    how, why = choose(products[0]._replace(outputs=sum(p.outputs for p in products)), ctx.costs, facts)
    if len(weights) > 1:
        why = f"{why}; in one product with {len(weights) - 1} more that read the same input"
    for weight, one, own, product in zip(weights, eqns, ats, products, strict=True):
        ctx.record(weight, one, 0 if own.left else 1, how=how, reason=why, product=product)

    precision = eqn.params["precision"]
    cast = tuple(Operand(o.w, *(_as(x, dtype) for x in o[1:])) for o in operands)
    if one_dtype and not dropout and type(base) is Dense:
        ys: Sequence[Array] = ctx.product(how, *alike((x3, cast)), precision)
    else:
        dims = (((x3.ndim - 1,), (x3.ndim - 2,)), ((0,), (0,)) if at.batch else ((), ()))

        def with_base(w: Array, x: Array, shape: Dims, own: Arrangement) -> Array:
            w = _matrix_of(w, shape, own)
            return lax.dot_general(x, w, dims, precision=precision, preferred_element_type=out_dtype)

        def apart(x3: Array, cast: Operands, weights: list[Weight]) -> list[Array]:
            bare = tuple(o._replace(w=jnp.zeros((0,), dtype)) for o in cast)
            dropped = weights[0].dropped(x3.astype(dtype))
            updates = (plain_updates if how == "plain" else lowrank_updates)(*alike((dropped, bare)), precision)
            return [
                weight.base.dot(Partial(partial(with_base, shape=weight.shape, own=own)), x3, how)
                + update.astype(out_dtype)
                for weight, own, update in zip(weights, ats, updates, strict=True)
            ]

        ys = ctx.kept(apart, x3, cast, weights)
    return [_in_order(y, weight, x, one) for y, weight, one in zip(ys, weights, ats, strict=True)]


def _in_order(y: Array, weight: Weight, x: Array, at: Arrangement) -> Array:
    """(*S, M, N) in dot_general's order: batch, then the free dimensions of the left and of the right operand."""
    free = (*_sizes(x.shape, at.x_free), *_sizes(weight.shape, at.free))
    y = lax.reshape(y, (*_sizes(weight.shape, at.batch), *free))
    if at.left:
        first, middle = len(at.batch), len(at.batch) + len(at.x_free)
        y = jnp.transpose(y, (*range(first), *range(middle, y.ndim), *range(first, middle)))
    return y


def _einsum(ctx: Context, eqn: Any, weight: Weight, x: Array, at: Arrangement) -> Array:
    """Factors in any position: x with the one that is contracted more, then with the other."""
    letters = iter("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXY")
    of_w = {d: next(letters) for d in range(weight.ndim)}
    of_x = {d: next(letters) for d in at.x_free}
    of_x |= dict(zip((*at.x_contract, *at.x_batch), (of_w[d] for d in (*at.contract, *at.batch)), strict=True))
    out = eqn.outvars[0].aval
    dtype = ctx.update_dtype(x, weight.base)
    first, second = sorted((weight.a, weight.b), key=lambda f: -len(weight.owned(f) & set(at.contract)))

    def named(f: Array) -> tuple[str, Array]:
        owned = sorted(weight.owned(f))
        return "Z" + "".join(of_w[d] for d in owned), f.reshape(-1, *_sizes(weight.shape, tuple(owned))).astype(dtype)

    (dims_1, first), (dims_2, second) = named(first), named(second)
    ins = "".join(of_x[d] for d in range(x.ndim))
    mine, theirs = [of_w[d] for d in at.free], [of_x[d] for d in at.x_free]
    wanted = [*(of_w[d] for d in at.batch), *(mine + theirs if at.left else theirs + mine)]
    kept = "".join(c for c in dict.fromkeys(ins + dims_1) if c in wanted or c in dims_2)
    dropped = weight.dropped(x.astype(dtype))
    precision = eqn.params["precision"]
    u = jnp.einsum(f"{ins},{dims_1}->{kept}", dropped, first, precision=precision) * jnp.asarray(weight.scale, dtype)
    # A dimension that only the base varies with: the update is the same all along it.
    held = "".join(c for c in wanted if c in kept or c in dims_2)
    update = jnp.einsum(f"{kept},{dims_2}->{held}", u, second, precision=precision)
    update = update.reshape([n if c in held else 1 for c, n in zip(wanted, out.shape, strict=True)])
    reason = "contracted along other axes than the plan's inputs or outputs"
    operand = 0 if at.left else 1
    ctx.record(weight, eqn, operand, how="factored", reason=reason, product=_product(weight, x, at))
    base = weight.base.dot(Partial(lambda w, x: bind(eqn, [w, x] if at.left else [x, w])[0]), x, ctx.kernel)
    return base + update.astype(out.dtype)


@rule("ragged_dot_general", "ragged_dot")
def ragged_dot(ctx: Context, eqn: Any, args: list[Any]) -> list[Any] | str:
    """Rows of x in groups, each times the matrix of its own expert."""
    x, weight, sizes = args[:3]
    if isinstance(x, Parameter) or not isinstance(weight, Parameter) or isinstance(sizes, Parameter):
        return "the rows or the sizes of a ragged product"
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    usual = (((1,), (1,)), ((), ()))
    dims = tuple(tuple(tuple(d) for d in pair) for pair in numbers.dot_dimension_numbers)
    if dims != usual or list(numbers.lhs_ragged_dimensions) != [0] or list(numbers.rhs_group_dimensions) != [0]:
        return "a ragged product in another layout than (m, k), (g, k, n)"
    if isinstance(weight, Probe):
        return ctx.probed(eqn, args, 1, ((1,), (2,), (0,)), None)
    assert isinstance(weight, Weight)
    sides = weight.sides((1,), (2,), stack=(0,))
    if sides is None:
        return "the plan's inputs and outputs are not those of the ragged product"
    if weight.gain is not None:
        return "magnitudes of experts in a ragged product"
    dtype = ctx.update_dtype(x, weight.base)
    down, up = sides[0][..., 0], sides[1][:, :, 0]
    product = Product(1, x.shape[0], weight.shape[1], weight.shape[2], down.shape[0])
    ctx.record(weight, eqn, 1, how="factored", reason="by expert", product=product)
    dropped = weight.dropped(x.astype(dtype))
    precision = eqn.params["precision"]
    u = lax.ragged_dot(dropped, jnp.transpose(down, (1, 2, 0)).astype(dtype), sizes, precision=precision)
    up = jnp.transpose(up, (1, 0, 2)).astype(dtype)
    update = lax.ragged_dot(u * jnp.asarray(weight.scale, dtype), up, sizes, precision=precision)
    product_of = Partial(lambda *values: bind(eqn, [values[-1], values[-2], *values[:-2]])[0], *args[2:])
    y = weight.base.dot(product_of, x, ctx.kernel)
    return [y + update.astype(y.dtype)]
