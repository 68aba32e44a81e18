"""Cuts a function in two: what depends on the inputs but on no trained parameter, and the rest.

Many adapters over one base share the first part: it is computed once per batch, however many are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex

from lorax_kit.core.paths import Params, flatten, is_array
from lorax_kit.transform.interpreter.bind import NO_DEBUG_INFO


class Parts(NamedTuple):
    """`fn(params, batch) == suffix(params, batch, prefix(params, batch))`.

    Attributes:
      prefix: (params, batch) -> list of arrays, the same for all values of the trained parameters.
      suffix: (params, batch, arrays) -> what `fn` returns.
    """

    prefix: Callable[[Params, Any], list[Any]]
    suffix: Callable[[Params, Any, list[Any]], Any]


def split_prefix(fn: Callable[[Params, Any], Any], params: Params, trained: Collection[str], batch: Any) -> Parts:
    """Cut `fn` at the first use of a trained parameter.

    Args:
      fn: (params, batch) -> pytree of arrays.
      params: all leaves arrays; only shapes are used.
      trained: paths of the parameters whose values will differ.
      batch: an example; the parts accept batches of its shapes only.
    """
    named, _ = flatten(params)
    closed, out = jax.make_jaxpr(fn, return_shape=True)(params, batch)
    out_tree = jax.tree_util.tree_structure(out)
    jaxpr = closed.jaxpr
    owners = [path for path, x in named.items() if is_array(x) for _ in jax.tree.leaves(x)]  # quantised ones have some
    count = len(owners)
    touched = {v for v, path in zip(jaxpr.invars, owners, strict=False) if path in trained}
    fed = set(jaxpr.invars[count:])
    head: list[Any] = []
    for eqn in jaxpr.eqns:
        inputs = {v for v in eqn.invars if not isinstance(v, jex.Literal)}
        if inputs & touched or eqn.effects:
            touched.update(eqn.outvars)
        elif inputs & fed:
            fed.update(eqn.outvars)
        # What depends on neither (a bias spread to the batch's shape) is cheap to redo and large to keep.
        if not touched.intersection(eqn.outvars):
            head.append(eqn)
    kept = fed - set(jaxpr.invars)
    rest = [e for e in jaxpr.eqns if not kept.intersection(e.outvars)]
    wanted = {v for e in rest for v in e.invars if not isinstance(v, jex.Literal)}
    wanted.update(v for v in jaxpr.outvars if not isinstance(v, jex.Literal))
    carried = [v for e in head for v in e.outvars if v in kept and v in wanted]

    def evaluator(invars: list[Any], eqns: list[Any], outvars: list[Any]) -> Callable[..., list[Any]]:
        effects = jex.no_effects if not eqns else set().union(*(e.effects for e in eqns))
        part = jex.Jaxpr(jaxpr.constvars, invars, outvars, eqns, effects, NO_DEBUG_INFO)
        return jex.jaxpr_as_fun(jex.ClosedJaxpr(part, closed.consts))

    first = evaluator(list(jaxpr.invars), head, carried)
    second = evaluator([*jaxpr.invars, *carried], rest, list(jaxpr.outvars))

    def prefix(params: Params, batch: Any) -> list[Any]:
        return list(first(*jax.tree_util.tree_leaves((params, batch))))

    def suffix(params: Params, batch: Any, arrays: list[Any]) -> Any:
        leaves = second(*jax.tree_util.tree_leaves((params, batch)), *arrays)
        return jax.tree_util.tree_unflatten(out_tree, leaves)

    return Parts(prefix, suffix)
