"""The machine under the benchmark: what it is, the rates that it reaches, and what a program holds on it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from lorax_kit.benchmarks.timing import alternate, prepared
from lorax_kit.errors import LoraxError
from lorax_kit.version import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers", "peft")
KNOWN = 0.9
"""The share of what XLA says a program needs that `held_bytes` takes for granted."""


def precision(dtype: str) -> str:
    """How products of this dtype are multiplied by JAX's own default: "bf16", "tf32" or "fp32"."""
    if dtype == "bfloat16":
        return "bf16"
    return {"gpu": "tf32", "tpu": "bf16"}.get(jax.default_backend(), "fp32")


def environment(*, square: int, line: int, rounds: int, least_ms: float) -> dict[str, Any]:
    """The device, the versions, and the measured rates of a product (square, square) and of a copy of `line` fp32.

    `tflops` are by precision: bf16, the default of fp32 arrays (TF32 on NVIDIA's), and fp32 throughout. A copy counts
    the bytes it reads and those it writes.
    """
    device = jax.devices()[0]
    asked = {"bf16": ("bfloat16", None), precision("float32"): ("float32", None), "fp32": ("float32", "highest")}
    runs: dict[str, Callable[[], Any]] = {}
    for name, (dtype, how) in asked.items():
        x = jax.random.normal(jax.random.key(2), (square, square), dtype)
        runs[name] = prepared(lambda x, how=how: jnp.matmul(x, x, precision=how), x)
    y = jax.random.normal(jax.random.key(3), (line,))
    times = alternate({**runs, "copy": prepared(lambda y: y + 1, y)}, range(rounds), least_ms=least_ms)
    stats = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "backend": jax.default_backend(),
        "devices": jax.device_count(),
        "lorax_kit": __version__,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "square": square,
        "tflops": {name: 2 * square**3 / median(times[name]) / 1e9 for name in runs},
        "copy_gbytes": 2 * 4 * line / median(times["copy"]) / 1e6,
        "memory_bytes": stats.get("bytes_limit"),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def held_bytes(run: Callable[[], Any], expected: int, device: Any = None) -> int | None:
    """What a call holds on the device at most beyond what is there before it, as the device's own allocator counts.

    An allocator only keeps its highest mark. So memory is taken until what is in use, and the greater part of what XLA
    expects the call to need, reach that mark: the call then sets a new one.

    Args:
      run: the call; compiled, and run before.
      expected: bytes, as XLA says.
      device: the first one unless given.

    Returns:
      Bytes; None where the device does not count, where the memory does not suffice, or where the call needed less
      than nine tenths of what was expected. After a call that did not fit, what it donates may be gone.
    """
    device = jax.devices()[0] if device is None else device
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" not in stats or expected <= 0:
        return None
    short = stats["peak_bytes_in_use"] - stats["bytes_in_use"] - int(KNOWN * expected)
    if stats["bytes_in_use"] + max(short, 0) + expected > stats.get("bytes_limit", float("inf")):
        return None
    try:
        ballast = jax.block_until_ready(jnp.zeros((short,), jnp.uint8)) if short > 0 else None
        before = device.memory_stats()
        jax.block_until_ready(run())
    except jax.errors.JaxRuntimeError:  # enough memory, but not in one piece
        return None
    mark = device.memory_stats()["peak_bytes_in_use"]
    del ballast
    return int(mark - before["bytes_in_use"]) if mark > before["peak_bytes_in_use"] else None


def check_accelerator() -> None:
    """Raise `LoraxError` where JAX runs on the processor: the shapes of a card would take it hours."""
    if jax.default_backend() == "cpu":
        raise LoraxError(
            "JAX sees no accelerator here, and the shapes of one would take hours.\n"
            "  give --small, or a python whose jax knows the card"
        )
