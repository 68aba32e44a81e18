"""Processor, memory, folders and devices of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from lorax_kit.doctor.problem import Problem

LITTLE_SPACE = 2**30
ACCELERATORS = (
    ("/dev", "nvidia[0-9]*", "an NVIDIA GPU", "pip install 'jax[cuda12]'"),
    ("/dev", "kfd", "an AMD GPU", "install JAX's ROCm plugin, https://docs.jax.dev/en/latest/installation.html"),
    ("/dev", "accel[0-9]*", "a TPU", "pip install 'jax[tpu]'"),
)
"""Folder and pattern of a device file, what it says is there, and what makes JAX use it."""


def hardware() -> tuple[dict[str, Any], list[Problem]]:
    """{"platform", "cores", "memory_bytes", "run_folder", "temp_folder"}, and what of them is wrong."""
    runs, run_problems = _run_folder()
    temp, temp_problems = _temp_folder()
    facts = {
        "platform": platform.platform(terse=True),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory(),
        "run_folder": runs,
        "temp_folder": temp,
    }
    return facts, [*run_problems, *temp_problems]


def memory() -> dict[str, int | None]:
    """Bytes of memory, {"total", "available"}, within the limit of a container; None: not told here."""
    told: dict[str, int] = {}
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        told = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in file)}
    total, available = told.get("MemTotal"), told.get("MemAvailable")
    if total is None:
        with contextlib.suppress(ValueError, OSError):
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())  # "max" where there is none
        left = limit - int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, available = min(total or limit, limit), min(available or left, left)
    return {"total": total, "available": available}


def folder_facts(path: Path) -> dict[str, Any]:
    """{"path", "free_bytes", "writable", "locks"} of a folder."""
    facts: dict[str, Any] = {"path": str(path), "free_bytes": None, "writable": False, "locks": False}
    with contextlib.suppress(OSError):
        facts["free_bytes"] = shutil.disk_usage(path).free
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"lorax")
            file.flush()
            facts["writable"] = True
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            facts["locks"] = True
    return facts


def _run_folder() -> tuple[dict[str, Any], list[Problem]]:
    """The folder that holds, or would hold, `runs/`."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        gone = Problem("the current folder was removed", "change to one that is there", fatal=True)
        return {"path": None, "free_bytes": None, "writable": False, "locks": False}, [gone]
    facts = folder_facts(here / "runs" if (here / "runs").is_dir() else here)
    path, problems = repr(facts["path"]), []
    if not facts["writable"]:
        problems.append(Problem(f"{path} cannot be written", "give commands --out in another folder"))
    elif not facts["locks"]:
        problems.append(
            Problem(f"the file system of {path} has no locks, and trainings need them", "give --out on a local disk")
        )
    if facts["free_bytes"] is not None and facts["free_bytes"] < LITTLE_SPACE:
        free = facts["free_bytes"] // 2**20
        problems.append(
            Problem(f"{path} has {free} MiB of free space", "delete old runs, or give --out on another disk")
        )
    return facts, problems


def _temp_folder() -> tuple[dict[str, Any], list[Problem]]:
    """The folder for temporary files."""
    mend = "export TMPDIR=FOLDER, one that you may write"
    try:
        facts = folder_facts(Path(tempfile.gettempdir()))
    except FileNotFoundError as e:  # Python tried all that it knows
        return {"path": None, "free_bytes": None, "writable": False, "locks": False}, [Problem(str(e), mend, True)]
    if facts["writable"]:
        return facts, []
    return facts, [Problem(f"the folder for temporary files, {facts['path']!r}, cannot be written", mend, fatal=True)]


def devices() -> tuple[list[dict[str, Any]], list[Problem]]:
    """The devices that JAX sees, alike ones together: {"platform", "kind", "count", "memory_bytes" of each}."""
    try:
        seen = jax.devices()
    except (RuntimeError, AssertionError) as e:  # an assertion, where JAX_PLATFORMS names a plugin that is missing
        what = f"JAX cannot start its backend: {' '.join(str(e).split())[:300] or type(e).__name__}"
        return [], [Problem(what, _backend_mend(), fatal=True)]
    counted = Counter((d.platform, d.device_kind, _memory_of(d)) for d in seen)
    rows = [{"platform": p, "kind": k, "count": n, "memory_bytes": m} for (p, k, m), n in counted.items()]
    return rows, _unused() if jax.default_backend() == "cpu" else []


def _memory_of(device: Any) -> int | None:
    """Bytes that programs may take of a device; None: not told."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None


def _backend_mend() -> str:
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return f"unset JAX_PLATFORMS, which is {platforms!r}, or install the plugin that it names"
    return "install the plugin again that fits jax, or run on the processor: export JAX_PLATFORMS=cpu"


def _unused() -> list[Problem]:
    """Accelerators that this machine has and JAX does not use."""
    platforms = os.environ.get("JAX_PLATFORMS")
    problems = []
    for folder, pattern, name, install in ACCELERATORS:
        if any(Path(folder).glob(pattern)):
            mend = "unset JAX_PLATFORMS, which is 'cpu'" if platforms == "cpu" else install
            problems.append(Problem(f"this machine has {name}, and JAX runs on the processor alone", mend))
    return problems
