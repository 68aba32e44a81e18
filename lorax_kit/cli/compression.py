"""`compress`: a smaller model, and what it costs."""

from __future__ import annotations

from typing import Any

import click

from lorax_kit.cli.root import cli, echo


@cli.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--method",
    default="whitened",
    show_default=True,
    help="svd, fisher, asvd, whitened, any of them with +int8, +int4 or +nf4; magnitude, wanda, either with -2:4; "
    "int8, int4, nf4.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("encoder/layer_*/**/kernel",),
    show_default=True,
    help="Pattern of parameters to compress, may be repeated.",
)
@click.option("--keep", type=float, default=0.5, show_default=True, help="Share of the targets' parameters to keep.")
@click.option("--allocation", default="loss", show_default=True, help="Of ranks: loss, energy or uniform.")
@click.option("--batches", type=click.IntRange(1), default=16, show_default=True, help="Of calibration, 32 texts each.")
@click.option("--heal", "steps", type=click.IntRange(0), default=0, show_default=True, help="Steps of healing.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Peak rate of healing.")
@click.option(
    "--rank",
    type=click.IntRange(0),
    default=8,
    show_default=True,
    help="Of healing's updates of one factor at a time; 0 trains both factors in full.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of healing.")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Rounds of latency.")
@click.option("--json", "as_json", is_flag=True, help="Print the row as JSON.")
def compress(model: str, as_json: bool, rank: int, targets: tuple[str, ...], **options: Any) -> None:
    """Compress a trained model, heal it, print what was lost and saved. MODEL is an adapter of `train` or a study."""
    from lorax_kit.benchmarks import table
    from lorax_kit.workloads import compress_subject, sentiment_subject

    row, _ = compress_subject(sentiment_subject(model, targets=targets), rank=rank or None, **options)
    if as_json:
        echo(row)
    else:
        shown = ("method", "keep", "bytes_ratio", "model_ratio", "flops_ratio", "latency_ratio")
        click.echo(table([row], (*shown, "metric_before", "metric_after", "metric_healed")))
