"""`predict`: the answers of an adapter to new texts or rows."""

from __future__ import annotations

from typing import Any

import click

from lorax_kit.cli.problems import pairs_of
from lorax_kit.cli.root import cli, echo, lines_of, refuse_given


@cli.command()
@click.argument("adapter")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option(
    "--texts", "file", type=click.Path(exists=True, dir_okay=False), help="A file of texts, a line each, in UTF-8."
)
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False),
    default=None,
    help="A file of rows, CSV, TSV, JSON Lines or Parquet, with the adapter's columns but for that of the answers.",
)
@click.option(
    "--column",
    "columns",
    metavar="ROLE=COLUMN",
    multiple=True,
    help="A column that --data names otherwise than the adapter's rows, may be repeated: text=body, question=q, ...",
)
@click.option("--encoding", default=None, help="Of --data; default: that of the adapter's rows.")
@click.option("--json", "as_json", is_flag=True, help="Print what was asked and the answers, all probabilities too.")
def predict(
    adapter: str,
    texts: tuple[str, ...],
    file: str | None,
    data: str | None,
    columns: tuple[str, ...],
    encoding: str | None,
    as_json: bool,
) -> None:
    """Answer new texts: a class and its probability, a number, a span of a passage, one of several choices.

    ADAPTER is a folder of `train` or of a study, of film reviews or of the tasks classify, regress, qa and choose; the
    last two read several columns: --data. An answer is a line, its parts separated by tabs. The rows that the adapter
    was trained on are not needed. Models that write: `lorax-kit generate`.
    """
    if data is None:
        refuse_given({"columns": "--column", "encoding": "--encoding"}, "--data")
    from lorax_kit.commands.adapters.prediction import predict as answered

    asked = [*texts, *(lines_of(file) if file is not None else ())]
    predicted = answered(adapter, asked, data=data, columns=dict(pairs_of("--column", columns)), encoding=encoding)
    if predicted["cut"]:
        click.echo(
            f"{predicted['cut']} of {len(predicted['answers'])} are longer than in training: they were cut", err=True
        )
    if as_json:
        echo(predicted)
        return
    for one in predicted["answers"]:
        click.echo(_line(one))


def _line(answer: dict[str, Any]) -> str:
    if "labels" in answer:
        shares = [f"{answer['probabilities'][label]:.4f}" for label in answer["labels"]]
        return "\t".join([", ".join(answer["labels"]), ", ".join(shares)])
    name = next(name for name in ("label", "value", "answer") if name in answer)
    value = f"{answer[name]:.6g}" if name == "value" else " ".join(answer[name].split())
    return "\t".join([value, *(f"{answer[more]:.4f}" for more in ("probability", "score") if more in answer)])
