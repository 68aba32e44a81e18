"""`resolve`: a spec, params and the function that uses them -> a plan that knows every contraction.

`all_linear` is the preset that adapts every parameter which is multiplied with activations, and says which.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lorax_kit.core.method import method_of
from lorax_kit.core.paths import Params, flatten, is_array, paths
from lorax_kit.core.plan import Plan, make_plan, match, matched
from lorax_kit.core.site import Axes
from lorax_kit.core.specs.patterns import literal
from lorax_kit.core.specs.setting import Full, Setting
from lorax_kit.core.specs.spec import Spec
from lorax_kit.errors import PlanError
from lorax_kit.transform.base import Dense
from lorax_kit.transform.context import Context, Use
from lorax_kit.transform.trace import run
from lorax_kit.transform.weight import Probe, whole


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

    Warns where a matrix that it trains is the same array as another leaf: they would no longer be tied.

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
    _warn_of_shared(settings, params)
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


def _warn_of_shared(targets: Collection[str], params: Params) -> None:
    """Warn where a matrix to be trained is one array in two places: training makes them two.

    A tie between leaves is not seen by JAX, so the function's other use keeps the frozen value. Vectors are not looked
    at: initialisers share their zeros and ones.
    """
    places: dict[int, list[str]] = {}
    for path, x in flatten(params)[0].items():
        if is_array(x) and len(x.shape) > 1 and not isinstance(x, jax.ShapeDtypeStruct):
            places.setdefault(id(x), []).append(path)
    for path in targets:
        if other := next((p for some in places.values() if path in some for p in some if p != path), None):
            warnings.warn(
                f"{path!r} and {other!r} are one array: trained, {path!r} becomes another one, and {other!r} "
                f"{'is trained by itself' if other in targets else 'stays as it is'}. "
                "If the model ties them, keep it in one place of the params",
                stacklevel=3,
            )
            return


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
        arguments, keywords = jax.tree_util.tree_unflatten(tree, values)
        leaves = {**named, **arrays}
        probes = {p: Probe(parts=(whole(p, leaves[p].shape),), base=Dense(leaves[p]), full=p in full) for p in targets}
        run(ctx, fn, leaves, treedef, probes, arguments, keywords)

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
            axes = use.axes
            assert axes is not None
            if setting.inputs in (axes.inputs, axes.outputs):
                outputs = axes.outputs if setting.inputs == axes.inputs else axes.inputs
                return Axes(inputs=setting.inputs, outputs=outputs, stack=axes.stack), "product"
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
    lookups = [use.axes for use in uses if use.axes is not None and use.primitive == "gather"]
    if lookups and any(use.axes is not None and use.primitive != "gather" for use in uses):
        return lookups[0], "tied"
    kinds = {"gather": "lookup", "conv_general_dilated": "other"}
    return known[0].axes, kinds.get(known[0].primitive, "product")


def all_linear(
    setting: Setting,
    params: Params,
    fn: Callable[..., Any],
    *args: Any,
    exclude: Sequence[str] = (),
    quiet: bool = False,
    **kwargs: Any,
) -> Spec:
    """A spec that adapts every parameter which `fn` multiplies with its activations, and nothing else.

    What counts is what the traced function does, not what a parameter is called: matrices and N-D kernels of products,
    stacked layers and experts. Left out are convolutions, tables that are looked up (tied ones, too), what is used in
    other ways, and `exclude`, where an output layer belongs if it shall stay: a function does not tell which it is.

    Args:
      setting: of the method, for all of them.
      params: pytree of arrays, or of `ShapeDtypeStruct`.
      fn: `fn(params, *args, **kwargs)`.
      *args, **kwargs: example inputs.
      exclude: patterns of parameters to leave out; each must match something.
      quiet: do not print what it took to stderr.

    Returns:
      A `Spec` with one rule for each parameter.

    Raises:
      PlanError: no parameter is multiplied, or an exclude pattern matches nothing.

    Example:
      >>> import lorax_kit as lk
      >>> params = {"table": jnp.ones((9, 4)), "up": jnp.ones((4, 8)), "bias": jnp.ones(8)}
      >>> fn = lambda p, ids: p["table"][ids] @ p["up"] + p["bias"][None]
      >>> [pattern for pattern, _ in lk.all_linear(lk.LoRA(rank=2), params, fn, jnp.arange(3), quiet=True).rules]
      ['up']
    """
    arrays = paths(params)
    wide = [p for p, x in arrays.items() if len(x.shape) >= 2 and jnp.issubdtype(x.dtype, jnp.floating)]
    excluded = {p for pattern in exclude for p in matched(f"exclude {pattern!r}", pattern, list(arrays))}
    taken, left = [], {}
    for path, uses in uses_of(wide, params, fn, args, kwargs).items():
        kinds = {use.primitive for use in uses if use.axes is not None}
        others = {use.primitive for use in uses if use.axes is None}
        if path in excluded:
            left[path] = "excluded"
        elif not uses:
            left[path] = "never used"
        elif others or kinds - {"dot_general", "ragged_dot_general", "ragged_dot"}:
            left[path] = ", ".join(sorted(others | kinds - {"dot_general"}))
        else:
            taken.append(path)
    if not taken:
        raise PlanError("the function multiplies no parameter with its inputs: there is nothing linear to adapt.")
    if not quiet:
        print(_told(taken, left), file=sys.stderr)
    return Spec([(literal(path), setting) for path in taken])


def _told(taken: Sequence[str], left: dict[str, str]) -> str:
    """What the preset took and left, numbers of layers counted together."""

    def grouped(names: Sequence[str]) -> str:
        counts = Counter(re.sub(r"\d+", "*", name) for name in names)
        return ", ".join(name if n == 1 else f"{name} ({n})" for name, n in counts.items())

    lines = [f"all-linear adapts {len(taken)} parameters: {grouped(taken)}"]
    for why in dict.fromkeys(left.values()):
        lines.append(f"  left out ({why}): {grouped([p for p, w in left.items() if w == why])}")
    return "\n".join(lines)
