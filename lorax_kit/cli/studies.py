"""`study` and `report`: a rank ablation from a configuration to its page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lorax_kit.cli.problems import import_registering, problem_option
from lorax_kit.cli.root import cli, echo, refuse_given


def _config(path: str) -> dict[str, Any]:
    """A study's JSON file: {"problem": {...}, "study": {...}}."""
    from lorax_kit.errors import StudyError
    from lorax_kit.json_text import read_json

    try:
        data = read_json(path)
    except ValueError as e:
        raise StudyError(f"{path!r} is not JSON: {e}.") from None
    if not isinstance(data, dict):
        raise StudyError(f"{path!r} must hold an object with 'problem' and 'study'.")
    unknown = sorted(set(data) - {"problem", "study"})
    if unknown:
        raise StudyError(f"{path!r} has the unknown key {', '.join(map(repr, unknown))}; known: 'problem', 'study'.")
    return data


@cli.command(keeps_memory=True)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    required=True,
    help="JSON of problem and study, as experiments/demo.json. The problem is an object of settings, or an address: "
    "'module:object' of a function marked by lk.problem_builder.",
)
@click.option("--out", type=click.Path(file_okay=False), default=None, help="Run folder.")
@click.option(
    "--seeds", type=click.IntRange(1), default=None, help="Train with seeds 0 to N-1: a folder grows by them."
)
@click.option(
    "--dry-run", is_flag=True, help="Print programs, trials, parameters, memory, FLOPs and time; train nothing."
)
@click.option(
    "--track",
    type=click.Choice(["tensorboard", "wandb"]),
    multiple=True,
    help="Log to OUT/tensorboard, or to offline runs in OUT/wandb; needs the track extra.",
)
@click.option("--overwrite", is_flag=True, help="Discard what the folder holds.")
@click.option(
    "--devices",
    type=click.IntRange(1),
    default=None,
    help="Spread trials over so many devices; default: one, and all of several processes.",
)
@click.option(
    "--data", type=click.IntRange(1), default=1, show_default=True, help="Split each batch over so many devices, too."
)
@click.option(
    "--fsdp",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Hold the base in parts on so many devices, over which batches are split, too.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=None,
    help="Train groups of trials on so many workers of a Ray cluster: that at RAY_ADDRESS, or this machine.",
)
@click.option("--worker-cpus", type=click.FloatRange(0), default=1, show_default=True, help="CPUs of each worker.")
@click.option("--worker-gpus", type=click.FloatRange(0), default=0, show_default=True, help="GPUs of each worker.")
@click.option(
    "--distributed",
    is_flag=True,
    help="This is one of several processes that run the command together, as Slurm, Open MPI or a TPU pod began them.",
)
@click.option("--coordinator", default=None, help="HOST:PORT of process 0, where no scheduler tells.")
@click.option("--processes", type=click.IntRange(1), default=None, help="How many there are.")
@click.option("--process", type=click.IntRange(0), default=None, help="Which one this is.")
@click.option(
    "--memory-mib", type=click.IntRange(1), default=None, help="Memory budget per device; default: what is free."
)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON; with --dry-run the plan.")
def study(
    config: str,
    out: str | None,
    seeds: int | None,
    dry_run: bool,
    track: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
    **machine: Any,
) -> None:
    """Run a study, go on with one, or let one grow, and write its report."""
    import jax

    from lorax_kit.parallel import quiet_stdout
    from lorax_kit.problems import problem_from
    from lorax_kit.report import write_report
    from lorax_kit.study import Study, run
    from lorax_kit.study.folder.store import finished_trials
    from lorax_kit.study.outline import outline

    if out is None and not dry_run:
        raise click.UsageError("Missing option '--out'.")
    read = _config(config)
    address = read["problem"].get("address") if isinstance(read.get("problem"), dict) else None
    if isinstance(address, str) and ":" in address:
        import_registering(address)
    design = Study.from_dict(read.get("study"))
    if seeds is not None:
        if any("seed" in grid for grid in design.grids):
            raise click.UsageError("--seeds: a grid of the study names its own seeds.")
        design = replace(design, seed=range(seeds))
    machines = _machines(**machine)
    first = jax.process_index() == 0
    names = {trial.name for trial in design.trials()}
    known = names & set(finished_trials(out)) if out and not overwrite else set()
    if first:
        done = f", {len(known)} finished" if known else ""
        click.echo(f"{len(names)} trials of {design.steps} steps{done}; loading model and data", err=True)
    problem = problem_from(read.get("problem", {}))
    if dry_run:
        planned = outline(design, problem, **machines, done=known)
        echo(planned) if as_json else click.echo(_planned(planned))
        return
    assert out is not None
    options: dict[str, Any] = {
        "overwrite": overwrite,
        "command": shlex.join(["lorax-kit", *sys.argv[1:]]),
        "progress": first,
        "trackers": [_tracker(name, Path(out)) for name in track] if first else [],
    }
    try:
        with quiet_stdout() if jax.process_count() > 1 else nullcontext():
            results = run(design, problem, out=out, **machines, **options)
    except KeyboardInterrupt:
        if first and (Path(out) / "trials.jsonl").exists():
            click.echo(f"the finished trials are in {write_report(out)}", err=True)
        click.echo("the same command goes on from where it stopped", err=True)
        raise
    if first:  # one process writes and prints
        _print_results(results, problem, out, names, as_json)


def _machines(
    devices: int | None,
    data: int,
    fsdp: int,
    workers: int | None,
    worker_cpus: float,
    worker_gpus: float,
    distributed: bool,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    memory_mib: int | None,
) -> dict[str, Any]:
    """What a study runs on: mesh, workers and memory, as `lorax_kit.study.run` takes them; joins other processes."""
    import jax

    from lorax_kit.errors import StudyError
    from lorax_kit.parallel import join, study_mesh
    from lorax_kit.study import Workers

    if distributed or any(x is not None for x in (coordinator, processes, process)):
        join(coordinator, processes, process)
    if devices is None:
        devices = max(len(jax.devices()) // (data * fsdp), 1) if jax.process_count() > 1 else 1
    needed = devices * data * fsdp
    if needed > len(jax.devices()):
        raise StudyError(
            f"--devices {devices} --data {data} --fsdp {fsdp} needs {needed}: JAX sees {len(jax.devices())}."
        )
    return {
        "mesh": None if needed == 1 else study_mesh(devices, data, fsdp=fsdp),
        "workers": None if workers is None else Workers(workers, worker_cpus, worker_gpus),
        "memory_bytes": None if memory_mib is None else memory_mib * 2**20,
    }


def _print_results(results: Any, problem: Any, out: str, names: Collection[str], as_json: bool) -> None:
    """Write the page of a finished study, and print its table and best trial, or its rows."""
    from lorax_kit.report import read_run, summary_table, write_report
    from lorax_kit.study.folder.store import finished_trials

    page = write_report(out)
    if as_json:
        echo({"rows": results.rows, "compiles": results.compiles, "report": str(page)})
        return
    click.echo(summary_table(read_run(out)))
    best = results.best()
    tested = format(best[f"test_{problem.metric}"], problem.chief.format)
    of = "" if set(finished_trials(out)) <= set(names) else f" of this configuration's {len(names)}"
    click.echo(f"\nbest single trial by validation {problem.metric}{of}: {best['trial']} (test: {tested})")
    address = f" --problem {problem.address}" if problem.address else ""
    click.echo(f"report: {page}\ncheck it: lorax-kit evaluate {Path(out) / best['adapter']}{address}")


def _tracker(name: str, out: Path) -> Any:
    from lorax_kit.study.trackers import tensorboard, wandb

    return tensorboard(out / "tensorboard") if name == "tensorboard" else wandb(out.name, out / "wandb")


def _planned(planned: dict[str, Any]) -> str:
    """The plan of a study as text."""
    from lorax_kit.benchmarks.timing import table

    rows = [
        {
            "program": number,
            "method": row["method"],
            "optimizer": row["optimizer"],
            "trials": row["trials"],
            "trained together": "+".join(map(str, row["groups"])),
            "ranks": ",".join(map(str, row["ranks"])),
            "params": "-".join(f"{n:,}" for n in sorted(set(row["params"]))),
            "MiB a step": round(row["estimated_bytes"] / 2**20),
            "GFLOP a step": row["flops_per_step"] / 1e9,
            "seconds": row["expected_seconds"],
        }
        for number, row in enumerate(planned["programs"], 1)
    ]
    if not rows:
        return "every trial is finished: nothing to train"
    total = f"{len(planned['trials'])} trials to train, {planned['flops'] / 1e12:.3g} TFLOP of products, about "
    total += f"{planned['expected_seconds']:,.2g} seconds of steps; compilation and tests come on top"
    return f"{table(rows, list(rows[0]))}\n{total}"


@cli.command()
@click.argument("run_folders", type=click.Path(exists=True, file_okay=False), nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False),
    default=None,
    help="Page of several folders; side_by_side.html in the first.",
)
@click.option(
    "--margin",
    type=float,
    default=None,
    help="Largest loss of the metric that does not matter, in its units; default: the study's, else 0.01 of a share.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def report(run_folders: tuple[str, ...], out: str | None, margin: float | None, as_json: bool) -> None:
    """Write the report of a run folder, or of a comparison, anew: report.html, plots, tables and results.csv.

    Of several run folders, one page on which they stand side by side. Of a folder of `train`, where its page is.
    """
    from lorax_kit.report import read_run, summary_table, write_report, write_side_by_side
    from lorax_kit.report.claims import not_inferior_text
    from lorax_kit.report.conditions import summarise
    from lorax_kit.report.pages.compression import comparison_table, read_rows, write_comparison
    from lorax_kit.report.tables.together import together_rows, together_table
    from lorax_kit.report.together import read_together

    if len(run_folders) > 1:
        page = write_side_by_side(run_folders, out, margin=margin)
        together = read_together(run_folders, margin=margin)
        if as_json:
            echo({"rows": together_rows(together), "report": str(page)})
            return
        click.echo(together_table(together))
        click.echo(f"report: {page}")
        return
    (run_folder,) = run_folders
    refuse_given({"out": "--out"}, "several run folders")
    if (Path(run_folder) / "comparison.json").exists():
        refuse_given({"margin": "--margin"}, "the folder of a study")
        page = write_comparison(run_folder)
        if as_json:
            echo({"rows": read_rows(Path(run_folder))[0], "report": str(page)})
            return
        click.echo(comparison_table(run_folder))
        click.echo(f"report: {page}")
        return
    if (Path(run_folder) / "metrics.jsonl").exists():
        refuse_given({"margin": "--margin"}, "the folder of a study")
        _trained(Path(run_folder), as_json)
        return
    page = write_report(run_folder, margin=margin)
    if as_json:
        echo({"rows": list(read_run(run_folder).trials), "report": str(page)})
        return
    run = read_run(run_folder)
    claim = not_inferior_text(summarise(run, margin=margin))
    click.echo("\n".join([summary_table(run), *([claim] if claim else []), f"report: {page}"]))


def _trained(folder: Path, as_json: bool) -> None:
    """Name the page that `train` wrote when it ended."""
    from lorax_kit.files.lines import read_lines
    from lorax_kit.problems.packaged.sentiment import adapter_folder

    adapter, page = adapter_folder(folder), folder / "report.html"
    if not page.exists():
        raise click.UsageError(f"{str(folder)!r} holds a training without its page: `train` writes it when it ends.")
    if as_json:
        echo({"rows": read_lines(folder / "metrics.jsonl"), "adapter": str(adapter), "report": str(page)})
        return
    click.echo(f"{folder} holds one training, not a study; adapter: {adapter}; report: {page}")


@cli.command()
@click.argument("run_folder", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--held-out",
    metavar="PROBLEM",
    default=None,
    help="Another problem of the same base, to measure forgetting: MODULE:OBJECT, plays, or sentiment.",
)
@problem_option("The study's; default: what its adapters name.")
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, help="How many of each rank.")
@click.option("--no-intruders", is_flag=True, help="Leave out intruder dimensions, which take an SVD of every matrix.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def analyse(
    run_folder: str, held_out: str | None, problem: str | None, seeds: int, no_intruders: bool, as_json: bool
) -> None:
    """Analyse a study's adapters: shared directions, intruder dimensions, forgetting. The report shows them."""
    from lorax_kit.benchmarks import table
    from lorax_kit.commands.analysis import analyse_run, held_out_problem
    from lorax_kit.problems import problem_from

    analysis = analyse_run(
        run_folder,
        problem=None if problem is None else problem_from(problem),
        held_out=held_out_problem(held_out),
        seeds=seeds,
        intruders=not no_intruders,
    )
    if as_json:
        echo(analysis)
        return
    click.echo(
        f"{analysis['setting']}\n"
        f"{table(analysis['by_rank'], list(analysis['by_rank'][0]))}\nreport: {analysis['report']}"
    )
