"""What an installation is like, whether it keeps the package's promises, and how to mend what is wrong."""

from __future__ import annotations

from typing import Any

import jax

from lorax_kit.doctor.machine import devices, hardware
from lorax_kit.doctor.problem import Problem
from lorax_kit.doctor.self_test import try_promises
from lorax_kit.doctor.settings import in_force, memory_kept, precision
from lorax_kit.doctor.versions import software

__all__ = ["Problem", "examine"]


def examine() -> dict[str, Any]:
    """Describe this installation and try it, in about ten seconds.

    Returns:
      {"ok" (nothing fatal), "environment", "devices", "checks": [{"name", "ok", "seconds", "detail"}], "problems":
      [{"what", "mend", "fatal"}]}. Without a device there are no checks.
    """
    programs, problems = software()
    parts, more = hardware()
    values, surprises = in_force()
    present, missing = devices()
    problems += [*more, *surprises, *missing]
    backend = jax.default_backend() if present else None
    if backend is not None:
        problems += precision(backend, values["jax_default_matmul_precision"])
        problems += memory_kept(backend)
    checks = try_promises() if present else []
    problems += [Problem(f"{c.name}: {c.detail}", c.mend, fatal=True) for c in checks if not c.ok]
    problems.sort(key=lambda problem: not problem.fatal)
    return {
        "ok": not any(problem.fatal for problem in problems),
        "environment": {**programs, **parts, "backend": backend, "settings": values},
        "devices": present,
        "checks": [{"name": c.name, "ok": c.ok, "seconds": c.seconds, "detail": c.detail} for c in checks],
        "problems": [problem._asdict() for problem in problems],
    }
