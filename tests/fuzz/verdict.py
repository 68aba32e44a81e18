"""What must hold of every input: it is taken or refused in words, within a second, and writes nothing elsewhere."""

import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import click
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import lorax_kit

SCALE = float(os.environ.get("FUZZ_SCALE", "0.01"))
"""Of the numbers of examples of `make test-fuzz`."""
SECONDS = 1.0
"""Processor time of this thread that one input may take."""
HANGS = 20
SHRINK = "FUZZ_SHRINK" in os.environ
"""Whether to look for the smallest input that fails: minutes for each."""
PACKAGE = str(Path(lorax_kit.__file__).parent)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
CACHES = ("__pycache__", ".jax_cache", "/dev/")

_watched: dict[str, object] = {"folder": None, "outside": []}


def examples(full):
    """Hypothesis settings for so many examples at full scale: the same ones in every run."""
    number = max(3, round(full * SCALE))
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if SHRINK else (Phase.generate,),
    )


@contextmanager
def noted(failures, text):
    """Go on after a failure, which is noted with the text of what failed; to shrink one it is raised."""
    try:
        yield
    except Exception as e:
        if SHRINK:
            raise
        failures.append(
            f"{text}\n{type(e).__name__}: {str(e)[:600]}\n{''.join(traceback.format_tb(e.__traceback__)[-2:])}"
        )


def _audit(event, args):
    folder = _watched["folder"]
    if folder is None or not (event == "open" or event in CHANGES):
        return
    if event == "open":
        changed = args[:1] if isinstance(args[2], int) and args[2] & WRITES else ()
    else:
        changed = [x for x in args if isinstance(x, str | bytes | os.PathLike)]
    for path in changed:
        if isinstance(path, int):
            continue
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(f"{folder}/") and path != folder and not any(cache in path for cache in CACHES):
            _watched["outside"].append(path)


sys.addaudithook(_audit)


@contextmanager
def writing_only_in(folder):
    """Fail where files outside a folder are written, moved or removed (as Python tells its audit hooks)."""
    _watched.update(folder=str(folder), outside=[])
    try:
        yield
    finally:
        _watched["folder"] = None
    assert _watched["outside"] == []


@contextmanager
def in_time():
    """Fail where this thread computes for more than a second; what hangs is interrupted."""

    def interrupt(*_):
        raise AssertionError(f"no end after {HANGS} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(HANGS)
    start = time.thread_time()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    seconds = time.thread_time() - start
    assert seconds < SECONDS, f"{seconds:.2f} s"


def in_words(error):
    """Whether an error is the package's own, or of click, in at most four lines."""
    if isinstance(error, click.ClickException | click.exceptions.Exit):
        return True
    own = type(error).__module__.startswith("lorax_kit")
    raised_here = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)
    documented = type(error) in (ValueError, FileNotFoundError, FileExistsError, ImportError) and raised_here
    lines = str(error).splitlines()
    return (own or documented) and 0 < len(lines) <= 4


NOTHING = object()
"""What a refused input gives."""


def taken(call, folder="/nowhere"):
    """What a call gives, or NOTHING where it refuses in words; anything else fails."""
    with writing_only_in(folder), in_time():
        try:
            return call()
        except Exception as e:
            if not in_words(e):
                raise
            return NOTHING


def run(check, full, tried, what):
    """`check(draw)` on so many inputs at full scale, of which all that fail are told at the end."""
    failures = []

    @examples(full)
    @given(data=st.data())
    def one(data):
        tried(f"inputs: {what}")
        said = []
        with noted(failures, said):
            check(data.draw, said)

    one()
    assert not failures, f"{len(failures)} failed\n" + "\n\n".join(failures[:8])
