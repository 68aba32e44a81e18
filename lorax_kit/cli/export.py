"""`export`: a trained model for runtimes that know nothing of the project."""

from __future__ import annotations

from typing import Any

import click

from lorax_kit.cli.problems import FILES, file_options, files_of
from lorax_kit.cli.root import cli, echo, lines_of, refuse_given


@cli.command()
@click.argument("adapter", type=click.Path(exists=True, file_okay=False), required=False)
@click.option(
    "--model", default=None, help="Without an adapter: a model that writes, smollm2, a .gguf file or a folder."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["safetensors", "stablehlo", "onnx", "litert"]),
    help="Params alone; a program for jax alone; a model for ONNX Runtime (the export extra); of models that "
    "write, one for LiteRT (the litert extra).",
)
@click.option(
    "--problem", metavar="MODULE:OBJECT", default=None, help="The problem; default: the one it was trained on."
)
@file_options
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
@click.option(
    "--batches", type=click.IntRange(1), default=16, show_default=True, help="Calibration batches for --method."
)
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
    help="Platform that runs the StableHLO; may be repeated.",
)
@click.option(
    "--adapters",
    type=click.Choice(["merged", "separate"]),
    default="merged",
    show_default=True,
    help="Of a model that writes: in the weights; or as inputs of the program, so that one base serves many adapters.",
)
@click.option(
    "--onto",
    type=click.Path(exists=True, file_okay=False),
    help="Instead of --out: add ADAPTER, as a file, to an export with separate adapters.",
)
@click.option(
    "--slots", type=click.IntRange(2), default=256, show_default=True, help="Of LiteRT: tokens of the longest text."
)
@click.option(
    "--texts", type=click.Path(exists=True, dir_okay=False), help="A file of texts to measure a model that writes on."
)
@click.option(
    "--rounds", type=click.IntRange(0), default=15, show_default=True, help="Alternating rounds of latency; 0: none."
)
@click.option("--out", type=click.Path(file_okay=False), help="Folder for the model and its words.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@click.option("--json", "as_json", is_flag=True, help="Print what was measured as JSON.")
def export(adapter: str | None, model: str | None, onto: str | None, as_json: bool, **options: Any) -> None:
    """Export a trained model, and measure what was written against JAX on its problem's test set.

    ADAPTER is a folder of `train` or of a study. The folder --out holds the model and export.json, and vocab.txt of a
    classifier of texts. A model that writes (of the tasks lm, chat and translate, or --model) is exported with its
    cache, to be called token by token: decoder.FORMAT, of an encoder-decoder encoder.FORMAT, too, and tokenizer.json.

    It is measured on the rows that the adapter remembers, which --data finds where they have moved, or on --texts.
    """
    from lorax_kit.commands.export.written import add_adapter, writes

    if model is not None:
        refuse_given({name: f"--{name.replace('_', '-')}" for name in FILES}, "an ADAPTER, which remembers its rows")
    if (adapter is None) == (model is None):
        raise click.UsageError("give an ADAPTER, or --model: one of the two.")
    if onto is not None:
        if adapter is None or options["out"] is not None or options["form"] is not None:
            raise click.UsageError(
                "--onto adds an ADAPTER to an export that is there: it goes without --out and --format."
            )
        file = add_adapter(adapter, onto, overwrite=options["overwrite"])
        if as_json:
            echo({"file": str(file), "bytes": file.stat().st_size})
        else:
            click.echo(f"{file}: {file.stat().st_size:,} bytes")
        return
    for name in ("form", "out"):
        if options[name] is None:
            raise click.UsageError(f"Missing option '--{'format' if name == 'form' else name}'.")
    if options["method"] is None:
        refuse_given({"keep": "--keep", "targets": "--target", "batches": "--batches"}, "--method")
    if options["form"] != "stablehlo":
        refuse_given({"platforms": "--platform"}, "--format stablehlo")
    if options["form"] != "litert":
        refuse_given({"slots": "--slots"}, "--format litert")
    if options["method"] is not None and options["compressed"] is not None:
        raise click.UsageError("a model that is compressed already takes no method: give one of the two.")
    if model is not None or (options["problem"] is None and options["form"] != "safetensors" and writes(str(adapter))):
        _writer(str(model or adapter), as_json, options)
    else:
        refuse_given({"adapters": "--adapters", "texts": "--texts"}, "models that write")
        _whole(str(adapter), as_json, options)


def _export(options: dict[str, Any]) -> Any:
    """How the model is written, as `Export`."""
    from lorax_kit.commands.export.options import Export

    return Export(**{name: options[name] for name in ("form", "int8", "platforms", "rounds", "overwrite")})


def _by(options: dict[str, Any]) -> Any:
    """What makes the model smaller first: a `Recipe`, a folder of `lorax-kit compress`, or None."""
    from lorax_kit.commands import Recipe

    if options["method"] is None:
        return options["compressed"]
    return Recipe(**{name: options[name] for name in ("method", "keep", "batches")})


def _whole(adapter: str, as_json: bool, options: dict[str, Any]) -> None:
    """A model that is called once a batch."""
    from lorax_kit.benchmarks import table
    from lorax_kit.commands.export.called import export_adapter
    from lorax_kit.core.quantised import METHODS as QUANTISATIONS

    method = options["method"]
    if method in QUANTISATIONS:
        refuse_given({"keep": "--keep"}, f"methods that leave something out: {method} keeps all")
    row = export_adapter(
        adapter,
        options["out"],
        _export(options),
        by=_by(options),
        problem=options["problem"],
        files=files_of(options),
        targets=options["targets"],
    )
    if as_json:
        echo(row)
        return
    metric = row["metric"]
    shown = ("format", "method", "int8", "bytes", "max_difference", f"{metric}_jax", metric, "latency_ratio")
    click.echo(table([row], shown))
    sizes = "; ".join(f"{name} ({', '.join(map(str, some))})" for name, some in row["sizes"].items())
    click.echo(f"inputs: {sizes}")
    held = {"adapter": row["adapter_bytes"], "base": row["base_bytes"], "params before the export": row["params_bytes"]}
    click.echo(", ".join(f"{name} {size:,} bytes" for name, size in held.items()))
    click.echo(f"{row['examples']:,} test examples; {', '.join(row['files'])} in {row['path']}")


def _writer(source: str, as_json: bool, options: dict[str, Any]) -> None:
    """A model that is called token by token."""
    from lorax_kit.benchmarks import table
    from lorax_kit.commands.export.written import export_writer, smaller_writer

    refuse_given({"problem": "--problem"}, "models that are called once a batch")
    params, files, export, by = None, files_of(options), _export(options), _by(options)
    if by is not None:
        params = smaller_writer(source, by, targets=options["targets"], files=files)
    row = export_writer(
        source,
        options["out"],
        export,
        separate=options["adapters"] == "separate",
        slots=options["slots"],
        params=params,
        texts=[] if options["texts"] is None else lines_of(options["texts"]),
        files=files,
    )
    if as_json:
        echo(row)
        return
    shown = ("format", "int8", "bytes", "tokens_equal", "perplexity_jax", "perplexity", "latency_jax_ms", "latency_ms")
    click.echo(table([row], shown))
    click.echo(f"{row['prompts']} prompts, {row['tokens']:,} tokens told; {', '.join(row['files'])} in {row['path']}")


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--out", type=click.Path(dir_okay=False), help="An HTML page of the same table.")
@click.option("--overwrite", is_flag=True, help="Replace the page.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def exports(folders: tuple[str, ...], out: str | None, overwrite: bool, as_json: bool) -> None:
    """Compare exports by size, quality and latency, as each measured when it was written.

    FOLDERS are what `lorax-kit export` wrote.
    """
    from lorax_kit.benchmarks import table
    from lorax_kit.commands.export.table import COLUMNS, export_rows, exports_page

    rows = export_rows(folders) if out is None else exports_page(folders, out, overwrite=overwrite)
    if as_json:
        echo(rows)
    else:
        click.echo(table(rows, COLUMNS))
