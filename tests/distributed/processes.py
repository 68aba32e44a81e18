"""Real processes of `jax.distributed` on this machine, and what they found."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(devices):
    """Of a process with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def start(count, devices, settings):
    """`count` processes of a training, each with some devices; not waited for."""
    port = free_port()
    argv = [sys.executable, str(ROOT / "tests/distributed/member.py")]
    given = [{**settings, "process": i, "count": count, "port": port} for i in range(count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [subprocess.Popen([*argv, json.dumps(x)], env=environment(devices), text=True, **pipes) for x in given]


def ended(procs, limit=300):
    """(return codes, stdouts, stderrs) once all have ended; those that have not are killed, which is told as None."""
    until, codes, outputs = time.monotonic() + limit, [], []
    for proc in procs:
        try:
            outputs.append(proc.communicate(timeout=max(until - time.monotonic(), 1)))
            codes.append(proc.returncode)
        except subprocess.TimeoutExpired:
            proc.kill()
            outputs.append(proc.communicate())
            codes.append(None)
    return codes, [out for out, _ in outputs], [err for _, err in outputs]


def together(count, devices, settings):
    """The factors that processes train, as numbers."""
    codes, outs, errors = ended(start(count, devices, settings))
    assert codes == [0] * count, "\n".join(error[-2000:] for error in errors)
    for out in outs:
        assert f"DEVICES {count * devices}" in out
    (line,) = [line for out in outs for line in out.splitlines() if line.startswith("FACTORS")]
    return np.asarray(json.loads(line.removeprefix("FACTORS")))


def run(settings):
    """Those that one process with one device trains."""
    return together(1, 1, settings)
