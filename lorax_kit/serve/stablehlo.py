"""A function with its params inside as serialised StableHLO, which jax reads and runs without the project.

exported = jax.export.deserialize(bytearray(pathlib.Path("model.stablehlo").read_bytes()))
(logits,) = exported.call(ids, mask)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export

from lorax_kit.core.paths import Params
from lorax_kit.errors import ExportError
from lorax_kit.files.staging import refuse_existing, staged
from lorax_kit.serve.program import first_line, program

_MARK = b"lorax_sha256"
_END = len(_MARK) + 32
"""After the program, which is read from its front, stands its SHA-256; files without it are read as well."""
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def save_stablehlo(
    file: str | Path,
    fn: Callable[..., Any],
    params: Params,
    inputs: Mapping[str, Any],
    *,
    platforms: Sequence[str] = ("cpu",),
    overwrite: bool = False,
) -> None:
    """Write `fn(params, *inputs.values())` as `jax.export` serialises it.

    Args:
      file: to create; it appears whole or not at all.
      fn, params, inputs: as `lorax_kit.serve.program.program` takes them: sizes of the inputs may be symbolic.
      platforms: that shall run it, of "cpu", "cuda", "rocm" and "tpu"; none of them needs to be here.
      overwrite: replace an existing file; otherwise it is an error.

    Raises:
      AdapterError: the file exists.
      ExportError: an unknown platform; what `program` raises; an operation that cannot be serialised.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> file, x = tempfile.mkdtemp() + "/model.stablehlo", jnp.ones((2, 4))
      >>> inputs = jax.export.symbolic_args_specs({"x": x}, "batch, 4")
      >>> save_stablehlo(file, lambda p, x: x @ p["w"], {"w": jnp.ones((4, 3))}, inputs)
      >>> load_stablehlo(file)(jnp.ones((7, 4)))[0].shape
      (7, 3)
    """
    path = Path(file).absolute()
    refuse_existing(path, overwrite, None, "file")
    platforms = (platforms,) if isinstance(platforms, str) else platforms
    if unknown := sorted(set(platforms) - set(PLATFORMS)):
        raise ExportError(f"platform {unknown[0]!r} is unknown; choose from {', '.join(PLATFORMS)}.")
    traced = program(fn, params, inputs)
    try:
        exported = jax.export.export(jax.jit(traced.run), platforms=tuple(platforms))(*traced.inputs.values())
        written = exported.serialize()
    except Exception as e:
        raise ExportError(f"StableHLO cannot hold the function for {', '.join(platforms)}: {first_line(e)}.") from e
    with staged(path, overwrite) as new:
        new.write_bytes(bytes(written) + _MARK + hashlib.sha256(written).digest())


def load_stablehlo(file: str | Path) -> Callable[..., list[jax.Array]]:
    """`run(*arrays)` of a file of `save_stablehlo`: the function's outputs as a list.

    `run` raises `ExportError` for inputs that the program does not take.

    Raises:
      FileNotFoundError: no such file.
      ExportError: it is damaged, or of a version of jax that this one cannot read.
    """
    content = bytearray(Path(file).read_bytes())
    program, end = content[:-_END], content[-_END:]
    if (sum(a != b for a, b in zip(end, _MARK, strict=False)) <= 3) and end != _MARK + hashlib.sha256(program).digest():
        raise ExportError(f"{str(file)!r} is damaged: it is not as it was written.\n  export it again")
    try:
        exported = jax.export.deserialize(content)
    except Exception as e:
        raise ExportError(f"{str(file)!r} is damaged or of another jax: {first_line(e)}.\n  export it again") from e
    call = jax.jit(exported.call)

    def run(*arrays: Any) -> list[jax.Array]:
        try:
            return call(*arrays)
        except (TypeError, ValueError) as e:
            wanted = ", ".join(str(x) for x in exported.in_avals)
            raise ExportError(f"{str(file)!r} takes {wanted}: {first_line(e)}.") from e

    return run
