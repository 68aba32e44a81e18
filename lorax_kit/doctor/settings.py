"""Settings of JAX, XLA and the allocator that change results or speed without a word."""

from __future__ import annotations

import os
from typing import Any

import jax

from lorax_kit.doctor.problem import Problem
from lorax_kit.measure import TUNABLES, can_keep

SURPRISES = (
    ("jax_enable_x64", True, False, "new arrays have 64 bits: twice the memory, and slow on accelerators"),
    ("jax_disable_jit", True, False, "nothing is compiled: steps are many times slower"),
    ("jax_debug_nans", True, False, "every program waits for its results, and a NaN that a step would skip raises"),
    ("jax_debug_infs", True, False, "every program waits for its results, and an infinity raises"),
    ("jax_numpy_dtype_promotion", "strict", "standard", "operations on arrays of two dtypes raise"),
    ("jax_numpy_rank_promotion", "raise", "allow", "operations that broadcast arrays of two ranks raise"),
)
"""Name, the value that surprises, JAX's default, and what it does."""
SHOWN = (*(name for name, *_ in SURPRISES), "jax_default_matmul_precision", "jax_compilation_cache_dir")


def in_force() -> tuple[dict[str, Any], list[Problem]]:
    """{name: value} of settings, and those that surprise; none of these is fatal."""
    values: dict[str, Any] = {name: getattr(jax.config, name) for name in SHOWN}
    values |= {name: os.environ.get(name) for name in ("JAX_PLATFORMS", "XLA_FLAGS")}
    problems = [
        Problem(f"{name} is {value!r}: {what}", f"unset {name.upper()}, or jax.config.update({name!r}, {default!r})")
        for name, value, default, what in SURPRISES
        if values[name] == value
    ]
    if values["XLA_FLAGS"]:
        what = f"XLA_FLAGS is {values['XLA_FLAGS']!r}: programs are compiled otherwise than by default"
        problems.append(Problem(what, "unset XLA_FLAGS, if you do not mean it"))
    if not values["jax_compilation_cache_dir"]:
        mend = "export JAX_COMPILATION_CACHE_DIR=~/.cache/jax"
        problems.append(Problem("compiled programs are not kept for the next process: no compilation cache", mend))
    return values, problems


def precision(backend: str, value: str | None) -> list[Problem]:
    """What fp32 products on an accelerator round to by default."""
    if backend == "cpu" or value is not None:
        return []
    what = f"fp32 products on this {backend} may round what they multiply to TF32 or bfloat16, which is JAX's default"
    return [Problem(what, "where that is too coarse: export JAX_DEFAULT_MATMUL_PRECISION=highest")]


def memory_kept(backend: str) -> list[Problem]:
    """Whether a script's temporaries on the processor are fresh memory at every call (`measure.keep_memory`)."""
    if backend != "cpu" or not can_keep():
        return []
    what = "a script's large temporaries are fresh memory at every call: steps on this processor take 1.1x as long"
    chosen = os.environ.get("GLIBC_TUNABLES", "")
    value = ":".join(filter(None, (chosen, TUNABLES)))
    return [Problem(what, f"before it starts, where memory is not short: export GLIBC_TUNABLES={value}")]
