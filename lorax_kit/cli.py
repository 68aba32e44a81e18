"""The command line: `lorax-kit study|train|evaluate|compress|inspect|report|bench`.

Facts go to standard output (JSON with --json), progress and errors to standard error. Bad input exits with 2 and one
clear message, an interruption with 130.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

INTERRUPTED = 130


def _config(path: str) -> dict[str, Any]:
    """A study's JSON file: {"problem": {...}, "study": {...}}."""
    from lorax_kit.core.errors import StudyError

    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise StudyError(f"{path!r} is not JSON: {e}.") from None
    if not isinstance(data, dict):
        raise StudyError(f"{path!r} must hold an object with 'problem' and 'study'.")
    unknown = sorted(set(data) - {"problem", "study"})
    if unknown:
        raise StudyError(f"{path!r} has the unknown key {', '.join(map(repr, unknown))}; known: 'problem', 'study'.")
    return data


def _echo(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(package_name="lorax_kit")
def cli() -> None:
    """Low-rank adaptation for any JAX function: rank ablations from clone to report."""


@cli.command()
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    required=True,
    help="JSON of problem and study, as experiments/demo.json.",
)
@click.option("--out", type=click.Path(file_okay=False), required=True, help="Run folder.")
@click.option("--overwrite", is_flag=True, help="Discard what the folder holds.")
@click.option(
    "--devices", type=click.IntRange(1), default=1, show_default=True, help="Spread trials over so many devices."
)
@click.option(
    "--memory-mib", type=click.IntRange(1), default=None, help="Memory budget per device; default: what is free."
)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def study(config: str, out: str, overwrite: bool, devices: int, memory_mib: int | None, as_json: bool) -> None:
    """Run a rank ablation, or go on with one, and write its report."""
    import jax

    from lorax_kit.core.errors import StudyError
    from lorax_kit.parallel import device_mesh
    from lorax_kit.report import read_run, summary_table, write_report
    from lorax_kit.study import Study, run
    from lorax_kit.workloads import Sentiment

    data = _config(config)
    design = Study.from_dict(data.get("study"))
    workload = Sentiment.from_dict(data.get("problem", {}))
    if devices > len(jax.devices()):
        raise StudyError(f"--devices {devices}: JAX sees {len(jax.devices())}.")
    mesh = None if devices == 1 else device_mesh("trial", jax.devices()[:devices])
    click.echo(f"{len(design.trials())} trials of {design.steps} steps; loading model and data", err=True)
    problem = workload.build()
    budget = None if memory_mib is None else memory_mib * 2**20
    command = shlex.join(["lorax-kit", *sys.argv[1:]])
    try:
        results = run(design, problem, out=out, mesh=mesh, memory_bytes=budget, overwrite=overwrite, command=command)
    except KeyboardInterrupt:
        if (Path(out) / "trials.jsonl").exists():
            click.echo(f"the finished trials are in {write_report(out)}", err=True)
        click.echo("the same command goes on from where it stopped", err=True)
        raise
    page = write_report(out)
    if as_json:
        _echo({"rows": results.rows, "compiles": results.compiles, "report": str(page)})
        return
    click.echo(summary_table(read_run(out)))
    best = results.best()
    click.echo(f"\nbest single trial by validation: {best['trial']} (test accuracy {best['test_accuracy']:.4f})")
    click.echo(f"report: {page}\ncheck it: lorax-kit evaluate {Path(out) / best['adapter']}")


@cli.command()
@click.option("--rank", type=int, default=8, show_default=True, help="Rows of the factors.")
@click.option("--alpha", type=float, default=16.0, show_default=True, help="The update is scaled by alpha / rank.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Peak rate of AdamW, decaying linearly.")
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of factors, head and data order."
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("encoder/layer_*/**/kernel",),
    show_default=True,
    help="Pattern of parameters to adapt, may be repeated: * within a name, ** over names, {a,b} either.",
)
@click.option("--variant", default="lora", show_default=True, help="lora or dora.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option("--length", type=click.IntRange(2), default=48, show_default=True, help="Tokens per training example.")
@click.option("--epochs", type=click.IntRange(1), default=3, show_default=True)
@click.option("--steps-per-epoch", type=click.IntRange(1), default=None, help="Default: one pass over the data.")
@click.option("--model", default="minilm", show_default=True, help="minilm, or a Hugging Face BERT folder.")
@click.option("--source", default="rotten_tomatoes", show_default=True, help="rotten_tomatoes, imdb or all.")
@click.option("--out", type=click.Path(file_okay=False), required=True, help="Folder for the adapter and metrics.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(out: str, as_json: bool, **options: Any) -> None:
    """Train one adapter, with a progress bar per epoch."""
    from lorax_kit.workloads import Sentiment, train_adapter

    workload = Sentiment(**{name: options.pop(name) for name in ("model", "source", "batch_size", "length")})
    result = train_adapter(workload, out=Path(out), **options)
    if as_json:
        _echo(result)
    else:
        click.echo(f"test accuracy {result['test_accuracy']:.4f}; adapter: {result['adapter']}")


@cli.command()
@click.argument("adapter", type=click.Path(exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
def evaluate(adapter: str, as_json: bool) -> None:
    """Measure a saved adapter on the test split of the problem it was trained on."""
    from lorax_kit.workloads import evaluate_adapter

    result = evaluate_adapter(adapter)
    if as_json:
        _echo(result)
    else:
        click.echo(
            f"test accuracy {result['test_accuracy']:.4f}, loss {result['test_loss']:.4f} ({result['examples']})"
        )


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
        _echo(row)
    else:
        shown = ("method", "keep", "bytes_ratio", "model_ratio", "flops_ratio", "latency_ratio")
        click.echo(table([row], (*shown, "metric_before", "metric_after", "metric_healed")))


@cli.command()
@click.argument("model", default="minilm")
@click.option("--spec", type=click.Path(exists=True, dir_okay=False), help="JSON of a Spec: show how each site runs.")
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
) -> None:
    """List a model's parameters; with --spec, the sites it adapts, how each runs and why. MODEL may be an adapter."""
    from lorax_kit.checkpoint.adapter import adapter_bytes, read_document
    from lorax_kit.workloads import inspect_model

    if quantise is not None and spec is None:
        raise click.UsageError("--quantise keeps the parameters that a spec adapts in few bits: give --spec, too.")
    if (Path(model) / "spec").is_dir():
        if given := [f"--{n}" for n, v in {"spec": spec, "quantise": quantise, "html": html}.items() if v is not None]:
            raise click.UsageError(f"{given[0]} is about a model's parameters; MODEL is an adapter.")
        document = read_document(model)
        facts = {k: document[k] for k in ("base", "versions", "meta")} | {"spec": document["spec"].to_dict()}
        facts |= {"bytes": adapter_bytes(model), "arrays": document["arrays"]}
        click.echo(json.dumps(facts, indent=2) if as_json else _adapter_text(facts))
        return
    text = None if spec is None else Path(spec).read_text(encoding="utf-8")
    found, shown = inspect_model(model, text, batch_size, tokens, quantise)
    if html is not None:
        from lorax_kit.report.parameters import write_parameters

        write_parameters(html, found)
    if as_json:
        _echo(found)
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


@cli.command()
@click.argument("run_folder", type=click.Path(exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def report(run_folder: str, as_json: bool) -> None:
    """Write the report of a run folder anew: report.html, plots and results.csv."""
    from lorax_kit.report import read_run, summary_table, write_report

    page = write_report(run_folder)
    if as_json:
        _echo({"rows": list(read_run(run_folder).trials), "report": str(page)})
        return
    click.echo(summary_table(read_run(run_folder)))
    click.echo(f"report: {page}")


@cli.group()
def bench() -> None:
    """Measure on this machine, side by side in one run."""


@bench.command()
@click.option("--width", type=click.IntRange(8), default=384, show_default=True)
@click.option("--layers", type=click.IntRange(1), default=6, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--length", type=click.IntRange(2), default=128, show_default=True)
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True)
@click.option("--targets", type=click.Choice(["all-linear", "qv"]), default="all-linear", show_default=True)
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
    from lorax_kit.benchmarks.grid import write_rows
    from lorax_kit.transform import Costs

    shared: dict[str, Any] = {"peer": not no_peer, "costs": None if costs is None else Costs.read(costs)}
    if grid:
        rows = bench_grid(out, rounds=options["rounds"], kernel=options["kernel"], **shared)
    else:
        rows = [bench_step(**options, **shared)]
        if out is not None:
            write_rows(Path(out), rows)
    if as_json:
        _echo(rows)
    else:
        click.echo(table(rows, COLUMNS))


@bench.command()
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Alternating rounds per shape.")
@click.option("--out", type=click.Path(dir_okay=False), help="Write the costs to this file, for `adapt(costs=...)`.")
@click.option("--json", "as_json", is_flag=True, help="Print the costs and what they rest on as JSON.")
def calibrate(rounds: int, out: str | None, as_json: bool) -> None:
    """Measure what the forms of a low-rank product cost here: two minutes, for speed only, never needed."""
    from lorax_kit.benchmarks import calibrate as measure
    from lorax_kit.benchmarks.calibrate import calibration_table

    found = measure(rounds=rounds)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if as_json:
        _echo(found)
    else:
        click.echo(calibration_table(found))
        for name in ("activation", "weight"):
            click.echo(f"{name}: {found[name][0]:.3g} + {found[name][1]:.3g} r ns per entry")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit codes as the module says."""
    try:
        cli.main(args=None if argv is None else list(argv), prog_name="lorax-kit", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("lorax-kit: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        click.echo("lorax-kit: interrupted", err=True)
        sys.exit(INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as e:
        click.echo(e.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as e:
        _fail(e.format_message())
    except (ValueError, OSError, OverflowError, RecursionError) as e:
        # Every error that this package raises on purpose is a ValueError, or an OSError about a file.
        _fail(str(e))


def _fail(message: str) -> None:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    click.echo("lorax-kit: " + " | ".join(lines), err=True)
    sys.exit(2)
