"""`all_linear`: the preset that adapts every parameter that is multiplied with activations, and says which."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from lorax_kit.core.errors import PlanError
from lorax_kit.core.paths import Params, paths
from lorax_kit.core.plan import matched
from lorax_kit.core.setting import Setting
from lorax_kit.core.spec import Spec
from lorax_kit.transform.resolve import uses_of


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
      >>> fn = lambda p, ids: p["table"][ids] @ p["up"] + p["bias"]
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
    return Spec([(f"re:{re.escape(path)}" if set(path) & set("*?{}") else path, setting) for path in taken])


def _told(taken: Sequence[str], left: dict[str, str]) -> str:
    """What the preset took and left, numbers of layers counted together."""

    def grouped(names: Sequence[str]) -> str:
        counts = Counter(re.sub(r"\d+", "*", name) for name in names)
        return ", ".join(name if n == 1 else f"{name} ({n})" for name, n in counts.items())

    lines = [f"all-linear adapts {len(taken)} parameters: {grouped(taken)}"]
    for why in dict.fromkeys(left.values()):
        lines.append(f"  left out ({why}): {grouped([p for p, w in left.items() if w == why])}")
    return "\n".join(lines)
