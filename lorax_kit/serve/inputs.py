"""What an exported function is given: the arrays of a batch that the model reads, each by its name and shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import numpy as np

from lorax_kit.core.paths import Params, is_array
from lorax_kit.errors import ExportError
from lorax_kit.serve.program import first_line, program


class Inputs(NamedTuple):
    """The arrays of a batch that a model reads.

    Attributes:
      fn: `fn(params, *arrays)`, the model.
      shapes: name -> shape and dtype; sizes that may vary are symbolic.
      of: batch -> the arrays, in the order of `shapes`.
    """

    fn: Callable[..., Any]
    shapes: dict[str, jax.ShapeDtypeStruct]
    of: Callable[[Any], list[np.ndarray]]

    def sizes(self) -> dict[str, list[int | str]]:
        """name -> sizes, those that may vary by their names: {"ids": ["batch", "length"]}."""
        return {
            name: [size if isinstance(size, int) else str(size) for size in x.shape] for name, x in self.shapes.items()
        }


def inputs_of(apply: Callable[[Params, Any], Any], params: Params, batch: Any) -> Inputs:
    """Find what `apply(params, batch)` reads of a batch: labels and weights are no inputs of a model.

    Sizes of rows, and of the tokens of integer inputs, vary where the function can be traced so.

    Args:
      batch: an example, a pytree; inputs are named by their paths in it, an array alone "x".

    Raises:
      ExportError: a function that cannot be lowered, one that reads nothing of the batch, two inputs of one name.

    Example:
      >>> import jax.numpy as jnp
      >>> batch = {"x": jnp.ones((2, 3)), "label": jnp.ones(2)}
      >>> inputs_of(lambda p, b: b["x"] @ p, jnp.ones((3, 1)), batch).sizes()
      {'x': ['batch', 3]}
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(batch)
    leaves = [leaf for _, leaf in paths]
    numbers = [i for i, leaf in enumerate(leaves) if is_array(leaf) or isinstance(leaf, bool | int | float | complex)]

    def filled(places: list[int], arrays: Sequence[Any]) -> Any:
        """The example with other arrays at some of its leaves."""
        full = list(leaves)
        for place, x in zip(places, arrays, strict=True):
            full[place] = x
        return jax.tree.unflatten(structure, full)

    arrays = [_shape(leaves[i]) for i in numbers]
    before = len(jax.tree.leaves(params))
    try:
        lowered = jax.export.export(jax.jit(lambda params, arrays: apply(params, filled(numbers, arrays))))(
            params, arrays
        )
    except Exception as e:  # the function is the caller's: it may raise anything
        raise ExportError(f"the model cannot be exported: {first_line(e)}.") from e
    read = [numbers[i - before] for i in lowered.module_kept_var_idx if i >= before]
    names = [jax.tree_util.keystr(paths[i][0], simple=True, separator="_") or "x" for i in read]
    if not names:
        raise ExportError("the model reads no array of a batch.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ExportError(f"two arrays of a batch are named {twice[0]!r}.\n  rename one of them")

    def fn(params: Params, *given: Any) -> Any:
        return apply(params, filled(read, given))

    def of(batch: Any) -> list[np.ndarray]:
        values, other = jax.tree.flatten(batch)
        if other != structure:  # type: ignore[operator]
            raise ExportError(
                f"a batch has another structure than the first, {other} and {structure}: one program cannot read both."
            )
        return [np.asarray(values[i]).astype(x.dtype) for i, x in zip(read, fixed.values(), strict=True)]

    fixed = {name: _shape(leaves[i]) for name, i in zip(names, read, strict=True)}
    return Inputs(fn, _varying(fn, params, fixed), of)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    """Of an array or a number, as JAX takes it: 64 bits become 32 unless they are enabled."""
    array = x if is_array(x) else np.asarray(x)
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))


def _varying(
    fn: Callable[..., Any], params: Params, shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes with as many sizes symbolic as the function can be traced with: rows and tokens, rows, none."""
    rows = {x.shape[0] for x in shapes.values() if x.shape}
    tokens = {x.shape[1] for x in shapes.values() if len(x.shape) == 2 and np.issubdtype(x.dtype, np.integer)}

    def spec(x: jax.ShapeDtypeStruct, length: bool) -> str:
        sizes = [str(size) for size in x.shape]
        if sizes:
            sizes[0] = "batch"
        if length and len(sizes) == 2 and x.shape[1] in tokens:
            sizes[1] = "length"
        return ", ".join(sizes)

    for length in (True, False) if len(rows) == 1 else ():
        if length and len(tokens) != 1:
            continue
        specs = {name: spec(x, length) for name, x in shapes.items()}
        symbolic: dict[str, jax.ShapeDtypeStruct] = jax.export.symbolic_args_specs(dict(shapes), specs)
        try:
            program(fn, params, symbolic)
        except ExportError:
            continue
        return symbolic
    return dict(shapes)
