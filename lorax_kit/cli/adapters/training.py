"""`train`, `evaluate` and `inspect`: one adapter, or one model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from lorax_kit.cli.adapters.settings import FLAGS, setting_of, setting_options
from lorax_kit.cli.problems import described, files_of, problem_options, problem_settings
from lorax_kit.cli.root import cli, echo, refuse_given


@cli.command(keeps_memory=True)
@problem_options
@setting_options
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Peak rate of AdamW, decaying linearly.")
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of factors, head and data order."
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Parameters to adapt, may be repeated: * within a name, ** over names, {a,b} either; or all-linear. Default: "
    "the kernels of the problem's layers, of film reviews encoder/layer_*/**/kernel.",
)
@click.option("--epochs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--steps-per-epoch", type=click.IntRange(1), default=None, help="Default: one pass over the data.")
@click.option("--save-memory", is_flag=True, help="Form all but each layer's input again in the backward pass.")
@click.option("--max-memory", metavar="SIZE", help="Fail before the process takes more, such as 3GiB.")
@click.option("--out", type=click.Path(file_okay=False), required=True, help="Folder for the adapter and metrics.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(
    out: str,
    as_json: bool,
    variant: str,
    rank: int,
    alpha: float,
    more: tuple[str, ...],
    max_memory: str | None,
    **options: Any,
) -> None:
    """Train one adapter, with a progress bar per epoch.

    On rows of your own: --task classify --data my.csv --text COLUMN --label COLUMN. Without a task: on film reviews.
    """
    setting = setting_of(variant, rank, alpha, more)
    described = problem_settings(options)
    from lorax_kit.commands import train_adapter
    from lorax_kit.commands.adapters.memory import bytes_of
    from lorax_kit.problems import problem_from

    most = None if max_memory is None else bytes_of(max_memory)
    result = train_adapter(problem_from(described), setting, out=Path(out), max_memory=most, **options)
    if as_json:
        echo(result)
    else:
        click.echo(f"{_tested(result)}; adapter: {result['adapter']}; report: {result['report']}")


@cli.command()
@click.argument("adapter", required=False)
@problem_options
@click.option(
    "--texts",
    type=click.Path(dir_okay=False),
    help="Write after each prompt of the test set, too (chat, translate), into this JSON Lines file, and measure BLEU, "
    "chrF, exact match and F1.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def evaluate(adapter: str | None, texts: str | None, as_json: bool, **options: Any) -> None:
    """Measure a saved adapter on the test split of the problem it was trained on; or a model as it is.

    ADAPTER is a folder of `train` or of a study, which remembers its problem, or the smaller model that
    `compress --out` left; --data, --val-data and --test-data say where its rows lie now, or give others. With --model,
    --task and --data the model is measured without one; a head that it lacks is drawn at random.
    """
    settings = described(adapter, options, "ADAPTER, a folder of train or of a study", moved=True)
    from lorax_kit.commands import evaluate_adapter, evaluate_base, evaluate_small
    from lorax_kit.problems import problem_from

    if settings is None:
        files = files_of(options)
        if (Path(str(adapter)) / "row.json").is_file():
            refuse_given({"texts": "--texts"}, "an adapter, or --model; a compressed model is measured as it is")
            result = evaluate_small(str(adapter), options["problem"], files=files)
        else:
            result = evaluate_adapter(str(adapter), options["problem"], texts, files=files)
    else:
        result = evaluate_base(problem_from(settings), texts)
    if as_json:
        echo(result)
    else:
        left = f", {result['left_out']} rows left out: longer than a batch" if result.get("left_out") else ""
        click.echo(f"{_tested(result)} ({result['examples']} examples{left})")


def _tested(result: dict[str, Any]) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {x:.4f}" for k, x in result.items() if k.startswith("test_"))


@cli.command()
@click.argument("model", default="minilm")
@click.option(
    "--spec",
    metavar="FILE|all-linear",
    help="JSON of a Spec, or all-linear for every parameter that is multiplied: show how each site runs.",
)
@setting_options
@click.option(
    "--quantise",
    type=click.Choice(["int8", "int4", "nf4"]),
    help="Show it over a base that keeps the adapted parameters in so many bits.",
)
@click.option("--tokens", type=click.IntRange(2), default=128, show_default=True, help="Tokens per example.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--html", type=click.Path(dir_okay=False), help="Write a picture of the parameter tree to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(
    model: str,
    spec: str | None,
    quantise: str | None,
    tokens: int,
    batch_size: int,
    html: str | None,
    as_json: bool,
    **setting: Any,
) -> None:
    """List a model's parameters; with --spec, the sites it adapts, how each runs and why. MODEL may be an adapter.

    With --spec all-linear the setting is that of --variant, --rank, --alpha and --set.
    """
    from lorax_kit.checkpoint.adapter import adapter_bytes, read_document
    from lorax_kit.commands import inspect_model
    from lorax_kit.core.specs.spec import Spec
    from lorax_kit.problems.packaged.sentiment import adapter_folder

    if html is not None:
        # Here, since it may say that an extra is missing.
        from lorax_kit.report.pages.parameters import write_parameters

    if spec not in (None, "all-linear") and not Path(str(spec)).is_file():
        raise click.UsageError(f"--spec {spec!r} is neither a file nor all-linear.")
    if spec != "all-linear":
        refuse_given(FLAGS, "--spec all-linear; a file has settings of its own")
    if quantise is not None and spec is None:
        raise click.UsageError("--quantise keeps the parameters that a spec adapts in few bits: give --spec, too.")
    if (adapter_folder(model) / "spec").is_dir():
        model = str(adapter_folder(model))
        if given := [f"--{n}" for n, v in {"spec": spec, "quantise": quantise, "html": html}.items() if v is not None]:
            raise click.UsageError(f"{given[0]} is about a model's parameters; MODEL is an adapter.")
        document = read_document(model, typed=False)
        facts = {k: document[k] for k in ("base", "versions", "meta", "spec")}
        facts |= {"bytes": adapter_bytes(model), "arrays": document["arrays"]}
        click.echo(json.dumps(facts, indent=2) if as_json else _adapter_text(facts))
        return
    what = None
    if spec is not None:
        what = setting_of(**setting) if spec == "all-linear" else Spec.from_json(Path(spec).read_bytes())
    data, shown = inspect_model(model, what, batch_size, tokens, quantise)
    if html is not None:
        write_parameters(html, data)
    if as_json:
        echo(data)
    else:
        click.echo(shown)


def _adapter_text(facts: dict[str, Any]) -> str:
    rules = (f"{pattern}: {', '.join(f'{k} {v}' for k, v in s.items())}" for pattern, s in facts["spec"]["rules"])
    arrays = (f"{n}  {'x'.join(map(str, x['shape']))}  {x['dtype']}" for n, x in facts["arrays"].items())
    size = sum(math.prod(x["shape"]) for x in facts["arrays"].values())
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    return "\n".join(
        [
            *rules,
            "",
            *arrays,
            "",
            f"{size:,} parameters, {facts['bytes']:,} bytes on disk",
            f"base {facts['base']}",
            versions,
        ]
    )
