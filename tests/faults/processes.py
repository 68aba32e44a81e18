"""Calls in processes of their own, killed before their Nth operation on a file; forked from one with all imports."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lorax_kit.cli", "lorax_kit.checkpoint", "lorax_kit.commands", "lorax_kit.problems"])
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "tempfile.mkdtemp"}


def _watch(folder, kill_at, count):
    """Count operations that change what lies in a folder; kill this process before one of them."""
    seen = [0]

    def hook(event, args):
        if event not in OPERATIONS or not any(isinstance(x, str | Path) and str(x).startswith(folder) for x in args):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        seen[0] += 1
        count.value = seen[0]
        if seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _run(target, args, folder, kill_at, count, output):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import jax

    from lorax_kit.study.programs import engine
    from lorax_kit.training import fit

    jax.config.update("jax_numpy_dtype_promotion", "standard")
    engine.SAVE_SECONDS = 0.0
    sys.modules[fit.__module__].SAVE_SECONDS = 0.0
    _watch(str(folder), kill_at, count)
    target(*args)
    sys.stdout.flush()
    os._exit(0)


class Process:
    """A call under way; `folder` is what it writes to."""

    def __init__(self, target, args, folder, kill_at=0):
        self.count, self.output = CONTEXT.Value("i", 0), Path(folder).parent / f"{time.monotonic_ns()}.txt"
        self._process = CONTEXT.Process(target=_run, args=(target, args, folder, kill_at, self.count, self.output))
        self._process.start()

    def wait_until(self, ready, seconds=120):
        """Wait for a condition, or for its end."""
        until = time.monotonic() + seconds
        while not ready() and self._process.is_alive() and time.monotonic() < until:
            time.sleep(0.02)

    def kill_after(self, seconds, number=signal.SIGKILL):
        """Send it a signal, unless it ends before."""
        self._process.join(seconds)
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def end(self, seconds=120):
        """(exit code, what it printed) at its end."""
        self._process.join(seconds)
        return self._process.exitcode, self.output.read_text() if self.output.exists() else ""


def command(*argv):
    """A call of the command line, whose problems are ours."""
    from lorax_kit.cli import main

    main(list(argv))


def last_json(text):
    """What a command printed as JSON behind its bars."""
    return json.loads(text[text.index("{\n") :])
