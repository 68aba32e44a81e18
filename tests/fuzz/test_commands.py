"""Arguments of every command: an exit code of 0 or 2, never a traceback."""

import importlib
import tempfile

import click
from click.testing import CliRunner
from hypothesis import strategies as st

from lorax_kit.checkpoint import orbax_files
from lorax_kit.cli import cli
from lorax_kit.doctor import self_test
from tests.fuzz.verdict import run, taken

WORDS = [
    "",
    " ",
    "0",
    "-1",
    "1",
    "3",
    "nan",
    "inf",
    "1e400",
    "9" * 400,
    "a=b",
    "=",
    "rank=2",
    "{}",
    "x" * 300,
    "é",
    "--",
]
PLACES = ["nowhere", "rows.csv", "empty", "spec.json", ".", "file.json", "tests.nowhere:x", "tests.tiny"]
HELP = ["-h", "--help", "--version"]


def commands(group, names=()):
    """(names, command) of every command below a group."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*names, name))
        else:
            yield (*names, name), command


COMMANDS = [(names, command) for names, command in commands(cli) if names[0] != "bench"]


def arguments(draw, command):
    """Some options of a command and some that it has not, with values that fit or do not."""
    out = []
    value = st.sampled_from([*WORDS, *PLACES])
    for parameter in command.params:
        needed = isinstance(parameter, click.Argument) or parameter.required
        if draw(st.integers(0, 5)) and not (needed and draw(st.integers(0, 9))):
            continue
        known = getattr(parameter.type, "choices", None)
        given = [draw(value if known is None or draw(st.booleans()) else st.sampled_from(list(known)))]
        given = [] if getattr(parameter, "is_flag", False) else given * max(parameter.nargs, 1)
        out += given if isinstance(parameter, click.Argument) else [draw(st.sampled_from(parameter.opts)), *given]
    if draw(st.integers(0, 3)) == 0:
        out.insert(draw(st.integers(0, len(out))), draw(st.sampled_from([*HELP, "--nothing", *WORDS])))
    return out


def test_arguments_of_every_command(tried, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(self_test, "CHECKS", ())  # of doctor: ten seconds
    orbax_files.ready()  # a second of imports, of the first command that needs them
    importlib.import_module("lorax_kit.commands")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.csv").write_text("text,label\ngood,yes\nbad,no\n")
    (tmp_path / "spec.json").write_text('{"rules": [["**", {"rank": 2}]]}')
    (tmp_path / "file.json").write_text("[1]")
    runner = CliRunner()

    def check(draw, said):
        names, command = draw(st.sampled_from(COMMANDS))
        argv = [*names, *arguments(draw, command)]
        said += [argv]
        result = taken(lambda: runner.invoke(cli, argv), tmp_path)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code in (0, 1, 2), result.exit_code
        assert result.exit_code == 0 or result.output.strip()

    run(check, 1000, tried, "command lines")
