"""`convert`, `combine` and `merge`: adapters between formats and methods, several into one, one into its model."""

from __future__ import annotations

from typing import Any

import click

from lorax_kit.cli.root import cli, echo

FOLDER = click.Path(exists=True, file_okay=False)
BASE = click.option("--base", required=True, help="The model: minilm, smollm2, a Hugging Face folder, or a GGUF file.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what is there, if of that kind and nothing else.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
FORMAT = click.Choice(["orbax", "peft"])


@cli.command()
@click.option("--from", "source", type=(FORMAT, FOLDER), required=True, help="Format and folder of the adapter.")
@click.option("--to", "target", type=(FORMAT, click.Path()), required=True, help="Format and folder to write.")
@BASE
@click.option("--lora", is_flag=True, help="Turn any method into plain LoRA, and say how far it is from it.")
@click.option("--rank", type=click.IntRange(1), help="Highest rank of --lora; default: all that the method has.")
@click.option("--energy", type=float, help="Share of the squared update that --lora keeps, instead of a rank.")
@click.option("--base-model", help="Name of the base model, for PEFT's config.")
@click.option("--task-type", help="PEFT's task, such as SEQ_CLS or CAUSAL_LM, for its config.")
@OVERWRITE
@JSON
def convert(as_json: bool, **options: Any) -> None:
    """Convert an adapter between orbax (ours) and PEFT, or from any method to plain LoRA."""
    from lorax_kit.commands.adapters.exchange import convert_adapter

    converted = convert_adapter(**options)
    if as_json:
        echo(converted)
        return
    click.echo(
        f"{converted['adapter']}: {len(converted['sites'])} sites, {len(converted['full'])} in full, "
        f"{converted['bytes']:,} bytes"
    )
    if converted["errors"]:
        worst = max(converted["errors"], key=converted["errors"].__getitem__)
        click.echo(f"furthest from the method's update: {worst}, by {converted['errors'][worst]:.1e} of it")
    for note in converted["notes"]:
        click.echo(f"note: {note}")


@cli.command()
@click.argument("adapters", nargs=-1, required=True, type=FOLDER)
@BASE
@click.option("--out", required=True, type=click.Path(), help="Folder of the new adapter.")
@click.option(
    "--how", default="svd", show_default=True, help="svd, linear, cat, ties, dare_ties, ...: lk.algebra.WAYS."
)
@click.option("--weight", "weights", type=float, multiple=True, help="Of each adapter, in their order; default: 1.")
@click.option("--rank", type=click.IntRange(1), help="Of the new LoRA; default: the highest of the adapters.")
@click.option("--energy", type=float, help="Share of the squared update to keep, instead of a rank.")
@click.option("--density", type=float, help="Share of the entries that ties, dare and magnitude keep.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Of what dare drops; default: 0.")
@OVERWRITE
@JSON
def combine(adapters: tuple[str, ...], weights: tuple[float, ...], as_json: bool, **options: Any) -> None:
    """Combine ADAPTERS of one base, of either format, into one LoRA: computed on their updates."""
    from lorax_kit.commands.adapters.exchange import combine_adapters

    combined = combine_adapters(adapters, weights=weights or None, **options)
    if as_json:
        echo(combined)
        return
    worst = max((site["error"] for site in combined["sites"]), default=0.0)
    click.echo(
        f"{combined['adapter']}: {len(combined['sites'])} sites, {combined['bytes']:,} bytes; "
        f"furthest off by {worst:.1e}"
    )


@cli.command()
@click.argument("adapter", type=FOLDER)
@click.option(
    "--base",
    default=None,
    help="The model: minilm, smollm2, a Hugging Face BERT or LLaMA folder, or a GGUF file. Default: the one of the "
    "adapter's task, of any family.",
)
@click.option("--without-head", is_flag=True, help="Leave out the head; goes without --base.")
@click.option("--out", required=True, type=click.Path(), help="Folder of the merged model, as Hugging Face has them.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True,
    help="What the weights are rounded to; the table says what of the update is lost by it.",
)  # fmt: skip
@OVERWRITE
@JSON
def merge(adapter: str, base: str | None, without_head: bool, as_json: bool, **options: Any) -> None:
    """Fold ADAPTER, of either format, into its model, and write a Hugging Face folder."""
    from lorax_kit.commands.adapters.merging import merge_adapter, merge_trained

    if base is not None and without_head:
        raise click.UsageError("--without-head is for the model that the adapter remembers: it goes without --base.")
    if base is None:
        merged = merge_trained(adapter, head=not without_head, **options)
    else:
        merged = merge_adapter(adapter, base=base, **options)
    table = merged.pop("table")
    if as_json:
        echo(merged)
    else:
        click.echo(f"{table}\n{merged['model']}: {merged['tensors']} tensors in {merged['dtype']}")
