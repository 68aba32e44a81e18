"""The command group that every command joins, how facts are printed, and what exit codes mean."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
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


def lines_of(file: str, encoding: str = "utf-8") -> list[str]:
    """The lines of a file that hold something.

    Raises:
      click.UsageError: no such encoding, bytes of another one, or no such line.
    """
    lines: list[str] = []
    try:
        with open(file, encoding="utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding) as handle:
            for line in handle:
                lines.append(line.strip())
    except LookupError:
        raise click.UsageError(f"the encoding {encoding!r} is not known; such as utf-8, latin-1, cp1252.") from None
    except UnicodeError:
        raise click.UsageError(f"{file!r} is not {encoding} text, after line {len(lines)}.") from None
    if not any(lines):
        raise click.UsageError(f"{file!r} holds no text.")
    return [line for line in lines if line]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit codes as the module says."""
    try:
        with _terminated_as_interrupted():
            cli.main(args=None if argv is None else list(argv), prog_name="lorax-kit", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("lorax-kit: interrupted", err=True)
        if argv is None:  # a process of our own: XLA's threads may still compute, and crash if Python is taken down
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        sys.exit(INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as e:
        _fail(e.format_message())
    except (ValueError, OSError, OverflowError, RecursionError, ImportError) as e:
        # What this package raises on purpose: a ValueError, an OSError about a file, an ImportError about an extra.
        _fail(str(e))


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Schedulers end a job by SIGTERM: it leaves what Ctrl-C leaves. Only a main thread may ask for signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str) -> None:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    click.echo("lorax-kit: " + " | ".join(lines), err=True)
    sys.exit(2)
