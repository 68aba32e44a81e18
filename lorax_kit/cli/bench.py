"""`bench` and `doctor`: what this machine measures, and whether the installation on it works."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click

from lorax_kit.cli.root import as_line, cli, echo


def size_options(*, width: int, batch_size: int, length: int) -> Callable[[Any], Any]:
    """What is measured: --width, --layers, --batch-size and --length, with these defaults."""
    options = (
        click.option("--width", type=click.IntRange(8), default=width, show_default=True),
        click.option("--layers", type=click.IntRange(1), default=6, show_default=True),
        click.option("--batch-size", type=click.IntRange(1), default=batch_size, show_default=True),
        click.option("--length", type=click.IntRange(2), default=length, show_default=True),
    )
    return lambda command: reduce(lambda f, option: option(f), reversed(options), command)


def adapter_options(command: Any) -> Any:
    """What is adapted: --rank and --targets."""
    targets = click.Choice(["all-linear", "qv"])
    command = click.option("--targets", type=targets, default="all-linear", show_default=True)(command)
    return click.option("--rank", type=click.IntRange(1), default=8, show_default=True)(command)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Describe this installation, try it for ten seconds, and say what is wrong and how to mend it.

    Exits with 1 where the self-test fails, a version is out of range, or nothing can run.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a card that another process uses has little left
    from lorax_kit.doctor import examine
    from lorax_kit.doctor.text import as_text

    findings = examine()
    if as_json:
        echo(findings)
    else:
        click.echo(as_text(findings))
    if not findings["ok"]:
        sys.exit(1)


@cli.group()
def bench() -> None:
    """Measure on this machine, side by side in one run."""


@bench.command(keeps_memory=True)
@size_options(width=384, batch_size=8, length=128)
@adapter_options
@click.option(
    "--rounds", type=click.IntRange(1), default=15, show_default=True, help="Alternating rounds; medians are printed."
)
@click.option(
    "--kernel",
    type=click.Choice(["auto", "factored", "merged"]),
    default="auto",
    show_default=True,
    help="What runs the sites; auto leaves it to the cost model.",
)
@click.option(
    "--costs", type=click.Path(exists=True, dir_okay=False), help="What auto weighs: FILE of `bench calibrate`."
)
@click.option("--grid", is_flag=True, help="Many widths, lengths and ranks instead of the one given.")
@click.option("--no-peer", is_flag=True, help="Leave out torch and PEFT even where they are installed.")
@click.option(
    "--out", type=click.Path(file_okay=False), help="Folder for the table (steps.json, steps.csv) and the plots."
)
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON.")
def step(as_json: bool, grid: bool, no_peer: bool, out: str | None, costs: str | None, **options: Any) -> None:
    """One training step: full fine-tuning, naive LoRA, ours, and PEFT on torch where the interop extra is installed."""
    from lorax_kit.benchmarks import COLUMNS, bench_grid, bench_step, table
    from lorax_kit.benchmarks.steps.grid import write_rows
    from lorax_kit.transform import Costs

    shared: dict[str, Any] = {"peer": not no_peer, "costs": None if costs is None else Costs.read(costs)}
    if grid:
        rows = bench_grid(out, rounds=options["rounds"], kernel=options["kernel"], **shared)
    else:
        rows = [bench_step(**options, **shared)]
        if out is not None:
            write_rows(Path(out), rows)
    if as_json:
        echo(rows)
    else:
        click.echo(table(rows, COLUMNS))


@bench.command()
@size_options(width=768, batch_size=4, length=256)
@click.option("--keep", type=float, default=0.5, show_default=True, help="Share of the linear parameters to keep.")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Alternating rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print the row as JSON.")
def forward(as_json: bool, keep: float, rounds: int, **sizes: Any) -> None:
    """A forward pass with compressed parameters against the dense one."""
    from lorax_kit.benchmarks import FORWARD_COLUMNS, bench_forward, table
    from lorax_kit.benchmarks.case import make_case

    row = bench_forward(make_case(**sizes, rank=1, targets="all-linear"), keep=keep, rounds=rounds)
    if as_json:
        echo(row)
    else:
        click.echo(table([row], FORWARD_COLUMNS))


@bench.command()
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Alternating rounds per shape.")
@click.option("--out", type=click.Path(dir_okay=False), help="Write the costs to this file, for `adapt(costs=...)`.")
@click.option("--json", "as_json", is_flag=True, help="Print the costs and what they rest on as JSON.")
def calibrate(rounds: int, out: str | None, as_json: bool) -> None:
    """Measure what the forms of a low-rank product cost here: two minutes, for speed only, never needed."""
    from lorax_kit.benchmarks import calibrate as measure
    from lorax_kit.benchmarks.calibrate import calibration_table

    costs = measure(rounds=rounds)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(costs, indent=2) + "\n", encoding="utf-8")
    if as_json:
        echo(costs)
    else:
        click.echo(calibration_table(costs))
        for name in ("activation", "weight"):
            click.echo(f"{name}: {costs[name][0]:.3g} + {costs[name][1]:.3g} r ns per entry")


@bench.command(keeps_memory=True)
@click.option("--method", "names", multiple=True, help="Only this one beside LoRA, may be repeated; default: all.")
@size_options(width=384, batch_size=8, length=128)
@adapter_options
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Alternating rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON.")
def methods(as_json: bool, **options: Any) -> None:
    """One training step of every method beside LoRA's of the same rank."""
    from lorax_kit.benchmarks import METHOD_COLUMNS, bench_methods, table

    rows = bench_methods(**options)
    if as_json:
        echo(rows)
    else:
        click.echo(table(rows, METHOD_COLUMNS))


@bench.command(keeps_memory=True)
@size_options(width=384, batch_size=16, length=32)
@click.option("--steps", type=click.IntRange(1), default=40, show_default=True, help="Steps of every trial.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Alternating rounds.")
@click.option("--no-peer", is_flag=True, help="Leave out torch and PEFT even where they are installed.")
@click.option("--json", "as_json", is_flag=True, help="Print the row as JSON.")
def study(as_json: bool, no_peer: bool, **options: Any) -> None:
    """24 trials of a study in one program, against the same trials one after the other, ours and PEFT's."""
    from lorax_kit.benchmarks import STUDY_COLUMNS, bench_study, table

    row = bench_study(**options, peer=not no_peer)
    if as_json:
        echo(row)
    else:
        click.echo(table([row], STUDY_COLUMNS))


@bench.command()
@click.option("--model", default="smollm2", show_default=True, help="smollm2, a .gguf file or a LLaMA folder.")
@click.option("--new", type=click.IntRange(2), default=48, show_default=True, help="Tokens that each row writes.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Alternating rounds.")
@click.option("--mixed", is_flag=True, help="32 rows, each with an adapter of its own, against one adapter for all.")
@click.option("--no-peer", is_flag=True, help="Leave out torch even where it is installed.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def decode(as_json: bool, mixed: bool, no_peer: bool, **options: Any) -> None:
    """Writing: tokens a second at batch 1 and 8, against transformers on torch with the same weights."""
    from lorax_kit.benchmarks import DECODE_COLUMNS, MIXED_DECODE_COLUMNS, bench_decode, bench_mixed_decode, table

    rows = [bench_mixed_decode(**options)] if mixed else bench_decode(**options, peer=not no_peer)
    if as_json:
        echo(rows)
    else:
        click.echo(table(rows, MIXED_DECODE_COLUMNS if mixed else DECODE_COLUMNS))


@bench.command()
@click.option("--seconds", type=click.FloatRange(0), default=480, show_default=True, help="Begin no row beyond these.")
@click.option("--small", is_flag=True, help="Tiny shapes: whether it runs, on any processor.")
@click.option("--no-peer", is_flag=True, help="Leave out torch and PEFT even where they are installed.")
@click.option("--out", type=click.Path(dir_okay=False), help="Append the rows to this file as JSON lines, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON, one a line.")
def device(seconds: float, small: bool, no_peer: bool, out: str | None, as_json: bool) -> None:
    """Measure an accelerator in eight minutes: steps, stacked trials, forms, memory, each row as it is done."""
    from lorax_kit.benchmarks.device import check_accelerator, device_rows, run_rows, share_memory, shown

    share_memory()
    if not small:
        check_accelerator()
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)

    def write(row: dict[str, Any]) -> None:
        text = as_line(row)
        click.echo(text if as_json else shown(row))
        if out is not None:
            with Path(out).open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    run_rows(device_rows(small=small, peer=not no_peer), seconds=seconds, write=write)


@bench.command()
@click.option("--model", "models", multiple=True, type=click.Choice(["135M", "7B", "70B"]), help="Default: each.")
@click.option(
    "--devices", multiple=True, type=click.IntRange(1), help="How many, may be repeated; default: 8, 64, 256."
)
@click.option("--targets", multiple=True, type=click.Choice(["all-linear", "qv"]), help="Default: each.")
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True)
@click.option("--length", type=click.IntRange(2), default=128, show_default=True, help="Tokens of each device's text.")
@click.option("--json", "as_json", is_flag=True, help="Print rows as JSON.")
def scale(as_json: bool, **options: Any) -> None:
    """What a step holds, computes and sends on many devices: compiled for virtual ones, without weights."""
    from lorax_kit.benchmarks import SCALE_COLUMNS, bench_scale, table

    rows = bench_scale(**options)
    if as_json:
        echo(rows)
    else:
        click.echo(table(rows, SCALE_COLUMNS))
