"""The command group that every command joins, how facts are printed, and what exit codes mean."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from types import FrameType
from typing import Any, NoReturn

import click

from lorax_kit.errors import ProcessLostError
from lorax_kit.measure import keep_memory

INTERRUPTED = 130
LOST = 75
"""Another process of the program is gone: EX_TEMPFAIL, so that a scheduler may start all of them again."""
OWN_PROCESS = "own process"
"""What a context's `obj` is where no other program calls the commands."""
UNRAISABLE = re.compile(r"weakref(set)?\.py:|:_xla_gc_callback$|:__del__$")
"""FILE:FUNCTION of callbacks in which Python prints an exception, and goes on."""
SETTING = re.compile(r"(?<=[\s:])(?P<name>[a-z_]+)=(?P<value>'[^']*'|[^\s,;]+)|\bproblem (?P<said>[a-z_]+)(?= is )")
"""A setting in a message: NAME=VALUE as in Python, or "problem NAME is ..."."""


class Command(click.Command):
    """A command whose errors name its options, where those of the package name settings as Python does.

    Args:
      keeps_memory: it runs the same programs over and over, so that its process keeps the memory they free.
    """

    def __init__(self, *args: Any, keeps_memory: bool = False, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.keeps_memory = keeps_memory

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        if self.keeps_memory and ctx.find_root().obj == OWN_PROCESS:
            keep_memory()
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, ProcessLostError):  # the reader of what we print has gone: click ends quietly
            raise
        except (ValueError, OSError, OverflowError, RecursionError, ImportError) as e:
            if _was_interrupted(e):
                raise KeyboardInterrupt from e
            # What this package raises on purpose: a ValueError, an OSError about a file, an ImportError about an extra.
            raise click.ClickException(in_options(str(e), self)) from e


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error came up while an interruption was passed on: a zip file that is closed too early hides it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def in_options(message: str, command: click.Command) -> str:
    """A message, each setting in it that the command takes as the option to give.

    A setting within parentheses is of a call in Python, and stays.
    """
    options = {p.name: p for p in command.params if isinstance(p, click.Option)}

    def option(match: re.Match[str]) -> str:
        name, value = match["name"] or match["said"], (match["value"] or "").strip("'")
        before = message[: match.start()]
        if before.count("(") > before.count(")") or (match["said"] and "further" not in options):
            return match[0]
        if name in options and name != "source":  # of film reviews, there; a column of that name goes by --column
            told = [options[name].opts[-1], *([] if options[name].is_flag else [value])]
        elif name in _task_settings() and "further" in options:
            told = ["--column" if value == "COLUMN" else "--with", f"{name}={value}" if value else name]
        elif name in _task_settings() and "config" in options:
            told = [f'"{name}": "{value}"']
        else:
            return match[0]
        return " ".join(word for word in told if word)

    return SETTING.sub(option, message)


def _task_settings() -> set[str]:
    """The names of all settings of tasks."""
    from lorax_kit.problems.load import TASKS

    return {field.name for task in TASKS.values() for field in fields(task)}


class Group(click.Group):
    """A group of such commands."""

    command_class = Command
    group_class = type


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(package_name="lorax_kit")
def cli() -> None:
    """Low-rank adaptation for any JAX function: rank ablations from clone to report."""


def echo(data: Any) -> None:
    """Facts as JSON; what is not finite as null."""
    from lorax_kit.study.folder.store import plain

    click.echo(json.dumps(plain(data), indent=2))


def as_line(data: Any) -> str:
    """Facts as one line of JSON."""
    from lorax_kit.study.folder.store import plain

    return json.dumps(plain(data))


def given(name: str) -> bool:
    """Whether the option of this parameter stands on the command line."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def refuse_given(options: dict[str, str], needed: str) -> None:
    """Raise for options on the command line that would do nothing."""
    for name, flag in options.items():
        if given(name):
            raise click.UsageError(f"{flag} goes with {needed}.")


def lines_of(file: str) -> list[str]:
    """The lines of a UTF-8 text.

    Raises:
      DataError: bytes of another encoding, or a line that is empty.
      click.UsageError: no such line.
    """
    from lorax_kit.data.table import read_lines

    lines = list(read_lines(file))
    if not lines:
        raise click.UsageError(f"{file!r} holds no text.")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit codes as the module says."""
    own, hook = OWN_PROCESS if argv is None else None, sys.unraisablehook
    try:
        with _terminated_as_interrupted():
            cli.main(args=None if argv is None else list(argv), prog_name="lorax-kit", standalone_mode=False, obj=own)
        return
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.unraisablehook = lambda _: None  # a file that is half written would tell how it was closed
        message, code = "interrupted", INTERRUPTED
    except ProcessLostError as e:  # JAX would wait for the lost one while Python is taken down
        message, code = _in_one_line(str(e)), LOST
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as e:
        _fail(e.format_message())
    gc.collect()  # no longer held by the exception: a block that was interrupted as it was left ends now
    sys.unraisablehook = hook
    _end(message, code, at_once=argv is None)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Schedulers end a job by SIGTERM, terminals by SIGHUP: each leaves what Ctrl-C leaves.

    Only a main thread may ask for signals. A signal that is ignored from the start (nohup) stays so. Where an exception
    would be lost, in a callback of the garbage collector, say, the signal is sent again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: FrameType | None) -> None:
        while frame is not None:
            if UNRAISABLE.search(f"{frame.f_code.co_filename}:{frame.f_code.co_name}"):
                threading.Timer(0.05, os.kill, (os.getpid(), signum)).start()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, interrupt)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _end(message: str, code: int, *, at_once: bool) -> NoReturn:
    """End this process; at once where it is our own: XLA's threads may still compute, and crash with Python."""
    with suppress(OSError):  # a terminal that was closed hears nothing
        click.echo(f"lorax-kit: {message}", err=True)
    if at_once:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, AttributeError):  # None where it was closed from the start
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _in_one_line(message: str) -> str:
    return " | ".join(line.strip() for line in message.strip().splitlines() if line.strip())


def _fail(message: str) -> None:
    click.echo(f"lorax-kit: {_in_one_line(message)}", err=True)
    sys.exit(2)
