"""`generate`: texts from a pretrained model or an adapter."""

from __future__ import annotations

import sys
from typing import Any

import click

from lorax_kit.cli.root import cli, echo, lines_of


@cli.command()
@click.argument("adapter", required=False)
@click.option("--model", default=None, help="smollm2, a .gguf file or a Hugging Face folder, as it is.")
@click.option("--prompt", "prompts", multiple=True, help="What to go on from; may be repeated.")
@click.option("--prompts", "file", type=click.Path(exists=True, dir_okay=False), help="A file of prompts, a line each.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(1), default=None, help="Draw from so many of the likeliest tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from those that hold this probability.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="Leave out what is less likely, in shares.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True)
@click.option("--beams", type=click.IntRange(1), default=1, show_default=True, help="Beam search with so many.")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Texts a prompt.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=None, help="Of what is drawn; default: 0.")
@click.option("--stop", multiple=True, help="A text ends before this string; may be repeated.")
@click.option("--chat", is_flag=True, help="Lay prompts out as a conversation; adapters of chats do so by themselves.")
@click.option("--system", default=None, help="What a conversation begins with.")
@click.option("--stream/--no-stream", default=None, help="Show a text as it comes; default: on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print texts, tokens, why each ended and how fast, as JSON.")
def generate(
    adapter: str | None,
    model: str | None,
    prompts: tuple[str, ...],
    file: str | None,
    stream: bool | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write after each prompt, and print what was written.

    ADAPTER is a folder of `train` or of a study on a model that writes: prompts are laid out as in its training.
    """
    if (adapter is None) == (model is None):
        raise click.UsageError("give an ADAPTER, or --model: one of the two.")
    asked = [*prompts, *(lines_of(file) if file is not None else ())]
    if not asked:
        raise click.UsageError("give --prompt, or --prompts with a file of them.")
    from lorax_kit.commands.adapters.generation import author_of, streamed
    from lorax_kit.commands.adapters.generation import generate as written
    from lorax_kit.generate import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = Sampling(**{name: options.pop(name) for name in names})
    options = {name: value for name, value in options.items() if name != "seed" or value is not None}
    author = author_of(str(adapter or model))
    single = len(asked) == 1 and options["samples"] == options["beams"] == 1
    if stream and (as_json or not single):
        raise click.UsageError("--stream shows one text as it comes: it goes without --samples, --beams and --json.")
    if single and not as_json and (sys.stdout.isatty() if stream is None else stream):
        for name in ("samples", "beams"):
            options.pop(name)
        for piece in streamed(author, asked[0], sampling=sampling, **options):
            click.echo(piece, nl=False)
        click.echo()
        return
    generated = written(author, asked, sampling=sampling, **options)
    if as_json:
        echo({"model": str(adapter or model), **generated})
        return
    for one in generated["texts"]:
        click.echo(one["text"])
