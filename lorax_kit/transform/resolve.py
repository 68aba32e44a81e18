"""`resolve`: a spec, params and the function that uses them -> a plan that knows every contraction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lorax_kit.core.errors import PlanError
from lorax_kit.core.paths import Params, flatten, is_array
from lorax_kit.core.plan import Axes, Plan, make_plan, match
from lorax_kit.core.spec import Full, LoRA, Spec
from lorax_kit.core.variant import variant
from lorax_kit.transform.context import Context, Use
from lorax_kit.transform.trace import run
from lorax_kit.transform.weight import Weight, whole


def resolve(spec: Spec, params: Params, fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Plan:
    """Resolve a spec against params and the function that uses them.

    The function is traced abstractly (nothing runs), and tells which axes of each target are contracted. Without a
    function every target must be an (in, out) matrix.

    Args:
      spec: what to adapt.
      params: pytree of arrays, or of `ShapeDtypeStruct`.
      fn: `fn(params, *args, **kwargs)`: a model's apply, or any JAX function.
      *args, **kwargs: example inputs; arrays may be `ShapeDtypeStruct`.

    Returns:
      A static, hashable `Plan`.

    Raises:
      PlanError: a rule that matches nothing, an adapted parameter the function never uses or uses in ways that do
        not agree, a rank above min(in, out), a target that is not float, a function that cannot be traced.
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
        probes = {
            p: Weight(parts=(whole(p, leaves[p].shape),), w=leaves[p], trained_in_full=isinstance(s, Full))
            for p, s in settings.items()
        }
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
            axes[path] = _axes(path, len(named[path].shape), setting, uses)
    return make_plan(spec, params, axes)


def _axes(path: str, ndim: int, setting: LoRA, uses: list[Use]) -> tuple[Axes, str]:
    """The axes of a site, and its use, from what the trace saw or the setting says.

    Raises:
      PlanError: uses that do not agree (one the transpose of the other does), or inputs that leave no outputs.
    """
    ways: dict[Any, Use] = {}
    for use in uses:
        if use.axes is not None:
            ways.setdefault((frozenset({use.axes.inputs, use.axes.outputs}), use.axes.stack), use)
    known = list(ways.values())
    if setting.inputs is not None:
        rest = tuple(i for i in range(ndim) if i not in setting.inputs)
        if not rest or max(setting.inputs) >= ndim:
            raise PlanError(f"{path!r} has {ndim} axes; inputs={setting.inputs} must name some of them, and not all.")
        for use in known:
            found = use.axes
            assert found is not None
            if setting.inputs in (found.inputs, found.outputs):
                outputs = found.outputs if setting.inputs == found.inputs else found.inputs
                return Axes(inputs=setting.inputs, outputs=outputs, stack=found.stack), "product"
        return Axes(inputs=setting.inputs, outputs=rest), "other"
    if len(known) > 1:
        said = [f"{u.primitive} over axes {u.axes.inputs} to {u.axes.outputs}" for u in known[:2] if u.axes is not None]
        first = known[0].axes
        assert first is not None
        raise PlanError(
            f"{path!r} is used in two incompatible ways: {', and '.join(said)}.\n"
            "  a low-rank update needs one split into inputs and outputs\n"
            f"  say which axes are its inputs, LoRA(rank=..., inputs={first.inputs}), or exclude it"
        )
    if not known:
        return Axes(inputs=tuple(range(ndim - 1)), outputs=(ndim - 1,)), "other"
    assert known[0].axes is not None
    kinds = {"gather": "lookup", "conv_general_dilated": "other"}
    return known[0].axes, kinds.get(known[0].primitive, "product")
