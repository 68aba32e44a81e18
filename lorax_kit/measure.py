"""What a compiled or traced program costs: FLOPs, bytes, temporaries; and how fast the device multiplies."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from math import prod
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
from jax.extend import core as jex

_KEPT = (("mmap_max=0", -4, 0), ("arena_max=1", -8, 1), ("trim_threshold=1099511627776", -1, -1))
"""What keeps freed memory: as tunables of glibc, and as parameters and values of its mallopt (-1: the largest)."""
TUNABLES = ":".join(f"glibc.malloc.{tunable}" for tunable, _, _ in _KEPT)
"""The value of GLIBC_TUNABLES that does for a script what `keep_memory` does for the process that calls it."""
CHOICES = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_ARENA_MAX",
)


def facts(compiled: Any) -> dict[str, float]:
    """What XLA says of a compiled program: `flops`, `bytes`, and bytes of memory.

    These are `temp_bytes`, `new_bytes` (results that take no argument's place), and the `peak_bytes` it holds at most.

    It counts the body of a loop once, however often that runs: see `product_flops`. A backend that does not tell
    (what libraries run counts as nothing on some) is given zeros.
    """
    memory = compiled.memory_analysis()
    try:
        cost = compiled.cost_analysis() or {}
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        cost = {}
    counted = cost[0] if isinstance(cost, list) else cost
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "flops": float(counted.get("flops", 0)),
        "bytes": float(counted.get("bytes accessed", 0)),
        "temp_bytes": int(memory.temp_size_in_bytes),
        "new_bytes": int(memory.output_size_in_bytes - memory.alias_size_in_bytes),
        "peak_bytes": int(peak - memory.alias_size_in_bytes),
    }


def product_flops(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the dot products in `fn(*args)`: of a scan as often as it runs, of a while once, of a cond all branches.

    Products that the results do not need are not counted.

    Example:
      >>> import jax.numpy as jnp
      >>> power = lambda w: jax.lax.scan(lambda h, _: (h @ w, None), w, length=5)[0]
      >>> product_flops(power, jnp.eye(3))
      270
      >>> product_flops(lambda w: (w @ w, w)[1], jnp.eye(3))
      0
    """
    return traced_flops(jax.make_jaxpr(fn)(*args))


def traced_flops(program: Any) -> int:
    """`product_flops` of a traced program (a closed jaxpr)."""
    return _products(program.jaxpr, [True] * len(program.jaxpr.outvars))[0]


def _products(jaxpr: Any, wanted: Sequence[bool]) -> tuple[int, list[bool]]:
    """FLOPs of the wanted outputs, and which inputs those need."""
    total, needed = 0, {v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w and not isinstance(v, jex.Literal)}
    for eqn in reversed(jaxpr.eqns):
        outs = [v in needed for v in eqn.outvars]
        if not any(outs) and not eqn.effects:
            continue
        reads = [True] * len(eqn.invars)
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            sizes = [eqn.invars[0].aval.shape[i] for i in contracted]
            total += 2 * prod(sizes) * eqn.outvars[0].aval.size
        elif eqn.primitive.name in ("jit", "pjit") and not eqn.effects:
            within, reads = _products(eqn.params["jaxpr"].jaxpr, outs)
            total += within
        else:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            inner = [getattr(j, "jaxpr", j) for j in jex.jaxprs_in_params(eqn.params)]
            total += times * sum(_products(j, [True] * len(j.outvars))[0] for j in inner)
        needed |= {v for v, r in zip(eqn.invars, reads, strict=True) if r and not isinstance(v, jex.Literal)}
    return total, [v in needed for v in jaxpr.invars]


def matrix_rate(size: int = 1024, rounds: int = 5) -> float:
    """FLOPs per second of a square fp32 product on the default device, the median of a few."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    jax.block_until_ready(product(x, x))
    times = []
    for _ in range(rounds):
        began = perf_counter()
        jax.block_until_ready(product(x, x))
        times.append(perf_counter() - began)
    return 2 * size**3 / median(times)


_COLLECTIVE = re.compile(
    r"= (\([^)]*\)|\S+) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_SHAPE = re.compile(r"([a-z]+)(\d+)(?:e\d+m\d+\w*)?\[([\d,]*)\]")


def collective_bytes(compiled: Any) -> int:
    """Bytes of what the collectives of a compiled program give to one device, each counted once however often it runs.

    Read from XLA's text of the program: 0 where there is none.
    """
    try:
        text = compiled.as_text()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return 0
    total = 0
    for match in _COLLECTIVE.finditer(text or ""):
        for _, bits, sizes in _SHAPE.findall(match[1]):
            total += prod(int(n) for n in sizes.split(",") if n) * max(int(bits) // 8, 1)
    return total


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
    """Note the seconds of each compilation in the block, of all threads; those a cache on disk saves count, too.

    Example:
      >>> with compilations() as seconds:
      ...     _ = jax.jit(lambda x: x * 2 + 1)(jnp.ones(3))
      >>> len(seconds) > 0
      True
    """
    seconds: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def peak_memory() -> int | None:
    """The most bytes of memory that this process has held at once, all that it loaded included; None: not told here."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def held_memory() -> int | None:
    """Bytes of memory that this process holds now; None: not told here."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def release_memory() -> None:
    """Give the system back what is no longer used: glibc keeps gigabytes of what loading and compiling took."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def is_chosen() -> bool:
    """Whether the environment says how glibc allocates."""
    return "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in CHOICES)


def can_keep() -> bool:
    """Whether the C library has these settings, and the environment says nothing of them."""
    return platform.libc_ver()[0] == "glibc" and not is_chosen()


def keep_memory() -> bool:
    """Have this process keep the memory that it frees, for itself; whether that was done.

    On the processor XLA allocates the temporaries of a program anew for each call, and glibc gives blocks of that size
    back to the system at once, so that each call touches fresh pages, with a fault for each 4 KiB: 36,000 of a training
    step of 142 MB, a tenth of its time. It is a choice of the whole process, so a library does not make it: `lorax-kit`
    does. An environment that says how to allocate is left as it is.
    """
    if not can_keep():
        return False
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return [mallopt(name, value) for _, name, value in _KEPT] == [1] * len(_KEPT)
    return False
