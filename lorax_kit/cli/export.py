"""`export`: a trained model for runtimes that know nothing of the project."""

from __future__ import annotations

from typing import Any

import click

from lorax_kit.cli.root import cli, echo, refuse_given


@cli.command()
@click.argument("adapter", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--format",
    "form",
    type=click.Choice(["safetensors", "stablehlo", "onnx"]),
    required=True,
    help="Params alone; a program for jax alone; a model for ONNX Runtime (the export extra).",
)
@click.option(
    "--problem", metavar="MODULE:OBJECT", default=None, help="The problem; default: the one it was trained on."
)
@click.option("--int8", is_flag=True, help="Matrices of the ONNX model in 8 bits.")
@click.option("--method", help="Compress first, by a method of `lorax-kit compress`; without, the adapter is merged.")
@click.option(
    "--keep", type=float, default=0.5, show_default=True, help="Share of the targets' parameters that --method keeps."
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Pattern of parameters that --method compresses, may be repeated; default: all linear.",
)
@click.option("--batches", type=click.IntRange(1), default=16, show_default=True, help="Of calibration for --method.")
@click.option(
    "--compressed",
    type=click.Path(exists=True, file_okay=False),
    help="The model that `lorax-kit compress ADAPTER --out` left in this folder, healed or not, instead of --method.",
)
@click.option(
    "--platform",
    "platforms",
    type=click.Choice(["cpu", "cuda", "rocm", "tpu"]),
    multiple=True,
    default=("cpu",),
    show_default=True,
    help="That runs the StableHLO; may be repeated.",
)
@click.option(
    "--rounds", type=click.IntRange(0), default=15, show_default=True, help="Alternating rounds of latency; 0: none."
)
@click.option("--out", type=click.Path(file_okay=False), required=True, help="Folder for the model and its words.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@click.option("--json", "as_json", is_flag=True, help="Print what was measured as JSON.")
def export(adapter: str, out: str, as_json: bool, **options: Any) -> None:
    """Export a trained model, and measure what was written against JAX on its problem's test set.

    ADAPTER is a folder of `train` or of a study. The folder --out holds the model and export.json, and vocab.txt of a
    classifier of texts.
    """
    from lorax_kit.benchmarks import table
    from lorax_kit.commands.deployment import export_adapter
    from lorax_kit.core.quantised import METHODS as QUANTISATIONS

    method = options["method"]
    if method is None:
        refuse_given({"keep": "--keep", "targets": "--target", "batches": "--batches"}, "--method")
    if method in QUANTISATIONS:
        refuse_given({"keep": "--keep"}, f"methods that leave something out: {method} keeps all")
    if options["form"] != "stablehlo":
        refuse_given({"platforms": "--platform"}, "--format stablehlo")
    row = export_adapter(adapter, out, **options)
    if as_json:
        echo(row)
        return
    metric = row["metric"]
    shown = ("format", "method", "int8", "bytes", "max_difference", f"{metric}_jax", metric, "latency_ratio")
    click.echo(table([row], shown))
    sizes = "; ".join(f"{name} ({', '.join(map(str, some))})" for name, some in row["sizes"].items())
    click.echo(f"inputs: {sizes}")
    click.echo(f"adapter {row['adapter_bytes']:,} bytes, base {row['base_bytes']:,}, exported {row['params_bytes']:,}")
    click.echo(f"{row['examples']:,} test examples; {', '.join(row['files'])} in {row['path']}")
