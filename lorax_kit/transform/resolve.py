"""`resolve`: a spec, params and the function that uses them -> a plan that knows every contraction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lorax_kit.core.errors import PlanError
from lorax_kit.core.paths import Params, flatten, is_array
from lorax_kit.core.plan import Axes, Plan, make_plan, match
from lorax_kit.core.spec import LoRA, Spec
from lorax_kit.core.variant import variant
from lorax_kit.transform.interpret import Context
from lorax_kit.transform.trace import run
from lorax_kit.transform.weight import Weight


def resolve(spec: Spec, params: Params, fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Plan:
    """Resolve a spec against params and the function that uses them.

    The function is traced abstractly (nothing runs), and tells which axes of each target are contracted:
    its first product or lookup decides. Without a function every target must be an (in, out) matrix.

    Args:
      spec: what to adapt.
      params: pytree of arrays, or of `ShapeDtypeStruct`.
      fn: `fn(params, *args, **kwargs)`: a model's apply, or any JAX function.
      *args, **kwargs: example inputs; arrays may be `ShapeDtypeStruct`.

    Returns:
      A static, hashable `Plan`.

    Raises:
      PlanError: a rule that matches nothing, an adapted parameter the function never uses, a rank above
        min(in, out), a target that is not float.
      SpecError: an unknown variant.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"q": jnp.ones((6, 2, 3))}
      >>> attend = lambda p, x: jnp.einsum("ti,ihd->thd", x, p["q"])
      >>> resolve(Spec({"q": LoRA(rank=2)}), params, attend, jnp.ones((5, 6))).site("q").b_shape
      (2, 2, 3)
    """
    for _, setting in spec.rules:
        if isinstance(setting, LoRA):
            variant(setting.variant)
    settings = match(spec, params)
    if fn is None:
        return make_plan(spec, params)
    named, treedef = flatten(params)
    abstract = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x for p, x in named.items()}
    ctx = Context()

    def probe(arrays: dict[str, Any], inputs: Any) -> Any:
        leaves = {**named, **arrays}
        probes = {p: Weight(path=p, axes=tuple(range(leaves[p].ndim)), w=leaves[p]) for p in settings}
        return run(ctx, fn, leaves, treedef, probes, *inputs)

    inputs, tree = jax.tree_util.tree_flatten((args, kwargs))
    dynamic = {i: x for i, x in enumerate(inputs) if is_array(x)}

    def shaped(arrays: dict[str, Any], dynamic: dict[int, Any]) -> None:
        values = [dynamic.get(i, x) for i, x in enumerate(inputs)]
        probe(arrays, jax.tree_util.tree_unflatten(tree, values))

    jax.eval_shape(shaped, {p: x for p, x in abstract.items() if is_array(x)}, dynamic)
    axes: dict[str, tuple[Axes, str]] = {}
    for path, setting in settings.items():
        uses = [u for u in ctx.uses.values() if u.path == path]
        if not uses:
            raise PlanError(
                f"the function never uses {path!r}, which the spec adapts.\n"
                "  is it read from a closure instead of the params argument, or switched off for these inputs?\n"
                "  exclude it, or trace the function that uses it"
            )
        if isinstance(setting, LoRA):
            known = [u for u in uses if u.axes is not None]
            last = len(named[path].shape) - 1
            convention = Axes(inputs=tuple(range(last)), outputs=(last,))
            found = known[0].axes if known else convention
            assert found is not None
            use = "other" if not known else "lookup" if known[0].how == "lookup" else "product"
            axes[path] = (found, use)
    return make_plan(spec, params, axes)
