"""`compress`: a smaller model and what it costs, or many of them compared."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click

from lorax_kit.cli.problems import described, files_of, problem_options
from lorax_kit.cli.root import cli, echo, refuse_given


@cli.command()
@click.argument("subject", metavar="[MODEL]", required=False)
@click.option(
    "--method",
    "methods",
    multiple=True,
    help="svd, fisher, asvd or whitened (the default), any with +int8, +int4, +nf4 (quantised factors) or "
    "+residual-int8, +residual-int4, +residual-nf4 (what they leave is kept in few bits); magnitude, wanda, either "
    "with -2:4; int8, int4, nf4; student; original_tuned. With --compare it may be repeated; default: most of them.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Pattern of parameters to compress, may be repeated; default: all linear ones of the layers.",
)
@click.option(
    "--keep",
    "keeps",
    type=click.FloatRange(0, 1, min_open=True),
    multiple=True,
    default=(0.5,),
    show_default=True,
    help="Share of the targets' parameters to keep; with --compare it may be repeated.",
)
@click.option(
    "--allocation",
    type=click.Choice(["loss", "energy", "uniform"]),
    default="loss",
    show_default=True,
    help="Of ranks: by predicted loss, by each one's own energy, or the same share everywhere.",
)
@click.option("--sequential", is_flag=True, help="Compress layer after layer, each calibrated anew.")
@click.option("--batches", type=click.IntRange(1), default=16, show_default=True, help="Calibration batches.")
@click.option(
    "--heal",
    "steps",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Steps of healing low-rank or pruned models, or of training the student or the original.",
)
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Peak rate of healing.")
@click.option(
    "--rank",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="Rank of healing's updates of one factor at a time, or of a pruned matrix; 0 trains them in full.",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Share of healing's loss that follows the original's outputs; the rest follows the labels.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Healing's seed.")
@click.option(
    "--rounds", type=click.IntRange(0), default=15, show_default=True, help="Alternating rounds of latency; 0: none."
)
@click.option("--compare", is_flag=True, help="Compare methods: report.html, plots and results.csv in --out.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="With --compare: from --seed on.")
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    help="Folder for the smaller model (model.safetensors, row.json); with --compare its folder, to go on with or new.",
)
@problem_options
@click.option("--json", "as_json", is_flag=True, help="Print the row, or rows, as JSON.")
def compress(
    subject: str | None,
    methods: tuple[str, ...],
    targets: tuple[str, ...],
    keeps: tuple[float, ...],
    compare: bool,
    seeds: int,
    out: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a trained model smaller, heal it, print what was lost and saved.

    MODEL is an adapter of `train` or of a study, judged on its problem's test set; or smollm2, a .gguf file or a
    Hugging Face folder, judged on what --task and --data say, a decoder without them on plays.
    """
    settings = described(subject, options, "MODEL, an adapter or a pretrained model", moved=True)
    address, files = options.pop("problem", None), files_of(options)
    from lorax_kit.benchmarks import table
    from lorax_kit.commands import Healing, Recipe, compress_subject, save_small, subject_of
    from lorax_kit.commands.compress.recipe import Method
    from lorax_kit.core.quantised import METHODS as QUANTISATIONS
    from lorax_kit.files.staging import refuse_existing

    if not options["steps"]:
        refuse_given({name: f"--{name}" for name in ("lr", "rank", "share", "seed", "seeds")}, "--heal")
    healing = Healing(
        rank=options["rank"] or None, **{name: options[name] for name in ("steps", "lr", "share", "seed")}
    )
    calibration = {name: options[name] for name in ("allocation", "batches")}
    load = partial(subject_of, subject, targets=targets, address=address, settings=settings, files=files)
    if compare:
        if out is None:
            raise click.UsageError("--compare writes a report: give --out, its folder.")
        if options["sequential"]:
            raise click.UsageError("--compare has no --sequential: give it to one method.")
        from lorax_kit.commands.compress.comparison import Comparison

        grid: dict[str, Any] = {"keeps": keeps, "seeds": seeds, **calibration}
        if methods:
            grid |= {"methods": methods, "heal": [name for name in methods if Method.parse(name).healed]}
        comparison = Comparison(healing=healing, **grid)
        _compare(load(), comparison, options["rounds"], out, as_json)
        return
    if len(methods) > 1 or len(keeps) > 1 or seeds > 1:
        raise click.UsageError("several methods, shares or seeds go with --compare.")
    if out is not None:
        refuse_existing(Path(out), None, None)
    method = methods[0] if methods else "whitened"
    recipe = Recipe(method=method, keep=keeps[0], sequential=options["sequential"], **calibration)
    if recipe.way.kind != "low-rank":
        refuse_given({"allocation": "--allocation"}, "low-rank methods")
    if method in QUANTISATIONS:
        refuse_given({"keeps": "--keep"}, f"methods that leave something out: {method} keeps all")
    chosen = load()
    row, small = compress_subject(chosen, recipe, healing, rounds=options["rounds"])
    if out is not None:
        save_small(out, chosen, row, small)
    if as_json:
        echo(row)
    else:
        click.echo(
            f"{row['subject']}: {row['metric']}; bytes of the targets, of the whole model, against the original's"
        )
        shown = ("method", "keep", "bytes_ratio", "model_ratio", "flops_ratio", "latency_ratio")
        click.echo(table([row], (*shown, "metric_before", "metric_after", "metric_healed", "agreement_after")))


def _compare(subject: Any, comparison: Any, rounds: int, out: str, as_json: bool) -> None:
    from lorax_kit.commands.compress.comparison import RowFailed, compare
    from lorax_kit.report.pages.compression import comparison_table, write_comparison
    from lorax_kit.report.run_folder import RunFolderError

    command = shlex.join(["lorax-kit", *sys.argv[1:]])
    try:
        rows = compare(subject, out, comparison, rounds=rounds, command=command)
    except (KeyboardInterrupt, RowFailed) as e:
        with suppress(RunFolderError):  # no row yet
            click.echo(f"the finished rows are in {write_comparison(out)}", err=True)
        if isinstance(e, KeyboardInterrupt):
            click.echo("the same command goes on from where it stopped", err=True)
        raise
    page = write_comparison(out)
    if as_json:
        echo({"rows": rows, "report": str(page)})
        return
    click.echo(comparison_table(out))
    click.echo(f"report: {page}")
