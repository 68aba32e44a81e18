"""Options that name a model, a task and data: --model, --task, --data and what goes with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any

import click

from lorax_kit.cli.root import refuse_given

TASKS = ("classify", "regress", "lm", "chat", "qa", "translate", "choose")


def problem_option(text: str) -> Any:
    """--problem MODULE:OBJECT. Its module is imported at once: it may register the method that --variant names."""

    def imported(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value is not None and ":" in value:
            import_registering(value)
        return value

    return click.option("--problem", metavar="MODULE:OBJECT", default=None, callback=imported, help=text)


def import_registering(address: str) -> None:
    """Import the module of a problem's address before anything names what it may register.

    Raises:
      click.UsageError: it cannot be imported.
    """
    from lorax_kit.errors import StudyError
    from lorax_kit.problem.address import import_module_of

    try:
        import_module_of(address)
    except StudyError as e:
        raise click.UsageError(str(e)) from None


FILE_OPTIONS = (
    click.option(
        "--data",
        type=click.Path(exists=True, dir_okay=False),
        default=None,
        help="Rows of your own: CSV, TSV, JSON Lines, Parquet; what the next two do not give is split off. Of an "
        "adapter: where its rows lie now.",
    ),
    click.option("--val-data", type=click.Path(exists=True, dir_okay=False), default=None, help="Rows of validation."),
    click.option("--test-data", type=click.Path(exists=True, dir_okay=False), default=None, help="Rows of the test."),
)
OPTIONS = (
    click.option(
        "--model", default=None, help="minilm, smollm2, a .gguf file or a Hugging Face folder; default: the task's."
    ),
    click.option(
        "--task",
        type=click.Choice(TASKS),
        default=None,
        help="What --data is for; without it, film reviews or --problem.",
    ),
    *FILE_OPTIONS,
    click.option("--text", default=None, help="Column of texts; default: text."),
    click.option("--label", default=None, help="Column of classes or numbers; default: label."),
    click.option(
        "--column",
        "columns",
        metavar="ROLE=COLUMN",
        multiple=True,
        help="Any other column, may be repeated: question=q, context=passage, answer=a, source=en, target=sv, ...",
    ),
    click.option(
        "--with",
        "further",
        metavar="KEY=VALUE",
        multiple=True,
        help="A further setting of the task, may be repeated: val=0.2, separator=|, overlap=32, encoding=latin-1, ...; "
        "of --problem, a keyword of its function.",
    ),
    click.option(
        "--batch-size", type=click.IntRange(1), default=None, help="Examples of a batch; default: the task's."
    ),
    click.option(
        "--length", type=click.IntRange(2), default=None, help="Tokens of an example; default: what most of them need."
    ),
    click.option(
        "--quantise",
        type=click.Choice(["int8", "int4", "nf4"]),
        default=None,
        help="Keep the kernels of the model's layers in so many bits, as they are loaded.",
    ),
    click.option("--source", default=None, help="Of film reviews: rotten_tomatoes (the default), imdb or all."),
    problem_option("A problem of your own in Python."),
)
FILES = ("data", "val_data", "test_data")
OF_FILES = ("data", "val_data", "test_data", "text", "label", "columns", "further", "quantise")
NAMES = ("model", "task", *OF_FILES, "batch_size", "length", "source", "problem")
FLAGS = {name: f"--{name.replace('_', '-')}" for name in NAMES} | {"columns": "--column", "further": "--with"}


def file_options(command: Any) -> Any:
    """Add the options that say where an adapter's rows lie now; `files_of` reads them."""
    return reduce(lambda f, option: option(f), reversed(FILE_OPTIONS), command)


def problem_options(command: Any) -> Any:
    """Add the options to a command; `problem_settings` reads what they give."""
    return reduce(lambda f, option: option(f), reversed(OPTIONS), command)


def problem_settings(options: dict[str, Any]) -> Any:
    """What the options name, as `problem_from` takes it; they are taken out of `options`.

    Raises:
      click.UsageError: options that do not go together.
    """
    taken = {name: options.pop(name) for name in NAMES}
    if taken["problem"] is not None:
        own = ("problem", "further")
        refuse_given({name: flag for name, flag in FLAGS.items() if name not in own}, "--task or film reviews")
        keywords = {name: _value(value) for name, value in pairs_of("--with", taken["further"])}
        return {"address": taken["problem"], **keywords} if keywords else taken["problem"]
    plain = ("model", "batch_size", "length")
    settings = {name: taken[name] for name in plain if taken[name] is not None}
    if taken["task"] is None:
        refuse_given({name: FLAGS[name] for name in OF_FILES}, "--task: say what the rows are for")
        return settings | ({} if taken["source"] is None else {"source": taken["source"]})
    if taken["data"] is None:
        raise click.UsageError(f"--task {taken['task']} needs --data, a file of rows.")
    refuse_given({"source": "--source"}, "film reviews, not --task; a column of that role is --column source=COLUMN")
    named = ("data", "val_data", "test_data", "text", "label", "quantise")
    settings |= {"task": taken["task"]} | {name: taken[name] for name in named if taken[name] is not None}
    for flag, pairs in (("--column", taken["columns"]), ("--with", taken["further"])):
        for name, value in pairs_of(flag, pairs):
            if name in settings:
                raise click.UsageError(f"{flag} {name}=...: {name} is given twice.")
            settings[name] = value if flag == "--column" else _value(value)
    return settings


def described(model: str | None, options: dict[str, Any], what: str, moved: bool = False) -> Any:
    """The problem on which a command measures `what`, an argument that may be left out where --task says enough.

    Args:
      moved: --data, --val-data and --test-data may say where the rows of an adapter lie now: they stay in `options`.

    Returns:
      Settings as `problem_from` takes them, or None where the argument is an adapter that remembers its problem, whose
      address --problem may replace: `options["problem"]`.

    Raises:
      click.UsageError: options that do not go together.
    """
    if options["task"] is None:
        kept = ("task", "problem", *(FILES if moved else ()))
        refuse_given({name: FLAGS[name] for name in NAMES if name not in kept}, "--task")
        if model is None:
            raise click.UsageError(f"give {what}, or --model, --task and --data.")
        for name in NAMES:
            if name not in kept[1:]:
                options.pop(name)
        return None
    if model is not None and options["model"] is not None:
        raise click.UsageError(f"the model is given twice: {model} and --model {options['model']}.")
    options["model"] = options["model"] or model
    return problem_settings(options)


def files_of(options: dict[str, Any]) -> dict[str, str] | None:
    """Where the rows of an adapter lie now, None where they were; taken out of `options`."""
    given = {name: options.pop(name, None) for name in FILES}
    return {name: file for name, file in given.items() if file is not None} or None


def pairs_of(flag: str, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names and values of an option that is NAME=VALUE.

    Raises:
      click.UsageError: another form.
    """
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals or not value:
            raise click.UsageError(f"{flag} {text!r} must be NAME=VALUE.")
        yield name, value


def _value(text: str) -> Any:
    """A number, true, false, null, or text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
