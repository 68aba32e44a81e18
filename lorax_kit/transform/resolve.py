"""`resolve`: a spec, params and the function that uses them -> a plan that knows every contraction."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from lorax_kit.core.errors import PlanError
from lorax_kit.core.method import method_of
from lorax_kit.core.paths import Params, flatten, is_array, paths
from lorax_kit.core.plan import Axes, Plan, make_plan, match
from lorax_kit.core.setting import Full, Setting
from lorax_kit.core.spec import Spec
from lorax_kit.transform.context import Context, Use
from lorax_kit.transform.interpret import run
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
      SpecError: a method that was never registered.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorax_kit import LoRA
      >>> params = {"q": jnp.ones((6, 2, 3))}
      >>> attend = lambda p, x: jnp.einsum("ti,ihd->thd", x, p["q"])
      >>> resolve(Spec({"q": LoRA(rank=2)}), params, attend, jnp.ones((5, 6))).site("q").b_shape
      (2, 2, 3)
    """
    for _, setting in spec.rules:
        if isinstance(setting, Setting):
            method_of(setting)
    settings = match(spec, params)
    if fn is None:
        return make_plan(spec, params)
    full = {path for path, setting in settings.items() if isinstance(setting, Full)}
    shapes = paths(params)
    axes: dict[str, tuple[Axes, str]] = {}
    for path, uses in uses_of(settings, params, fn, args, kwargs, full).items():
        if not uses:
            raise PlanError(
                f"the function never uses {path!r}, which the spec adapts.\n"
                "  is it read from a closure instead of the params argument, or switched off for these inputs?\n"
                "  exclude it, or trace the function that uses it"
            )
        setting = settings[path]
        if isinstance(setting, Setting):
            axes[path] = _axes(path, len(shapes[path].shape), setting, uses)
    return make_plan(spec, params, axes)


def uses_of(
    targets: Collection[str],
    params: Params,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    full: Collection[str] = (),
) -> dict[str, list[Use]]:
    """How a traced function uses some of its parameters: path -> uses, in the order of `targets`; nothing runs.

    Args:
      full: those that are only watched for being used at all.
    """
    named, treedef = flatten(params)
    abstract = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in named.items() if is_array(x)}
    ctx = Context()
    inputs, tree = jax.tree_util.tree_flatten((args, dict(kwargs)))
    dynamic = {i: x for i, x in enumerate(inputs) if is_array(x)}

    def traced(arrays: dict[str, Any], dynamic: dict[int, Any]) -> None:
        values = [dynamic.get(i, x) for i, x in enumerate(inputs)]
        some, keywords = jax.tree_util.tree_unflatten(tree, values)
        leaves = {**named, **arrays}
        probes = {
            p: Weight(parts=(whole(p, leaves[p].shape),), w=leaves[p], trained_in_full=p in full) for p in targets
        }
        run(ctx, fn, leaves, treedef, probes, some, keywords)

    jax.eval_shape(traced, abstract, dynamic)
    return {path: [use for use in ctx.uses.values() if use.path == path] for path in targets}


def _axes(path: str, ndim: int, setting: Setting, uses: list[Use]) -> tuple[Axes, str]:
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
            f"  say which axes are its inputs, {setting.kind} with inputs={first.inputs}, or exclude it"
        )
    if not known:
        return Axes(inputs=tuple(range(ndim - 1)), outputs=(ndim - 1,)), "other"
    assert known[0].axes is not None
    kinds = {"gather": "lookup", "conv_general_dilated": "other"}
    return known[0].axes, kinds.get(known[0].primitive, "product")
