"""Settings of JAX, XLA and the allocator that change results or speed without a word."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import jax

from lorax_kit.doctor.problem import Problem

SURPRISES = (
    ("jax_enable_x64", True, False, "new arrays have 64 bits: twice the memory, and slow on accelerators"),
    ("jax_disable_jit", True, False, "nothing is compiled: steps are many times slower"),
    ("jax_debug_nans", True, False, "every program waits for its results, and a NaN that a step would skip raises"),
    ("jax_debug_infs", True, False, "every program waits for its results, and an infinity raises"),
    ("jax_numpy_dtype_promotion", "strict", "standard", "operations on arrays of two dtypes raise"),
    ("jax_numpy_rank_promotion", "raise", "allow", "operations that broadcast arrays of two ranks raise"),
)
"""Name, the value that surprises, JAX's default, and what it does."""
HUGE = "glibc.malloc.hugetlb"
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


def memory_pages(
    backend: str, *, pages: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled"), libc: str | None = None
) -> list[Problem]:
    """Whether the temporaries of a program on the processor lie in small pages though large ones could be asked for.

    XLA takes them anew for each call, more bytes than the allocator keeps, so each call touches fresh pages: of 4 KiB
    one at a time, of 2 MiB where glibc asks for them, which it does from 2.35 on where it is told to.
    """
    libc = " ".join(platform.libc_ver()) if libc is None else libc
    version = re.match(r"glibc (\d+)\.(\d+)", libc)
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if backend != "cpu" or version is None or (int(version[1]), int(version[2])) < (2, 35) or HUGE in tunables:
        return []
    try:
        asked_for = b"[madvise]" in pages.read_bytes()
    except OSError:
        return []
    if not asked_for:
        return []
    what = "large temporaries are allocated in pages of 4 KiB: steps on this processor take 1.05 to 1.15x as long"
    value = ":".join(filter(None, (tunables, f"{HUGE}=1")))
    return [Problem(what, f"export GLIBC_TUNABLES={value}, where memory is not short")]
