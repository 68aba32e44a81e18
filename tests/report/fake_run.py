"""Builds run folders with the numbers a small sentiment study would leave, in the form `study.folder.store` writes."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np

SITES = [
    f"encoder/layer_{layer}/attention/{part}/kernel"
    for layer in range(4)
    for part in ("query", "key", "value", "output")
]
GROUP = 30  # most trials that train together


def build(
    folder,
    *,
    ranks=(1, 2, 4, 8, 16),
    rates=(1e-3,),
    seeds=6,
    targets=("attention",),
    variants=("lora",),
    alphas=(16,),
    probe=True,
    spectra=True,
    diverged=lambda trial: False,
    change=lambda trial: {},
    keep=None,
    steps=200,
    test=True,
    finished=True,
    sites=SITES,
    study=None,
):
    """Write a run folder.

    `keep` limits how many trials ended, `alphas` may hold functions of rank, `diverged` chooses trials that
    fail, `change` overrides keys of a trial's row, `study` keys of study.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    points = product(variants, targets, ranks, alphas, rates, range(seeds))
    trials = [
        trial(rng, target, variant, float(alpha(rank) if callable(alpha) else alpha), rank, lr, seed, steps, test)
        for variant, target, rank, alpha, lr, seed in points
    ]
    if probe:
        trials += [trial(rng, "head", "lora", 0.0, 0, 1e-3, seed, steps, test) for seed in range(seeds)]
    trials = [row | change(row) for row in trials]
    trials = [diverge(row, steps) if diverged(row) else row for row in trials]
    planned = [row["trial"] for row in trials]
    trials = trials[:keep]
    write_lines(folder / "trials.jsonl", trials)
    write_lines(folder / "curves.jsonl", [line for row in trials for line in curve(rng, row, steps)])
    if spectra:
        done = [row for row in trials if row["rank"] and row["status"] == "done"]
        write_lines(
            folder / "spectra.jsonl", [spectrum(rng, row, d, site) for row in done for d, site in enumerate(sites)]
        )
    whole = finished and keep is None
    info = {
        "name": "demo",
        "command": "lorax-kit study --config experiments/demo.json --out runs/demo",
        "design": {"rank": list(ranks), "lr": list(rates), "seed": list(range(seeds)), "stream": "shared"},
        "spec": {"rules": [["**/attention/*/kernel", {"kind": "lora", "variant": "lora", "rank": 8, "alpha": 16.0}]]},
        "environment": {"python": "3.11.9", "jax": "0.10.2", "platform": "cpu", "devices": ["cpu"]},
        "task": {"name": "sentiment", "train": 2000, "val": 500, "test": 1000, "classes": ["neg", "pos"]},
        "started": "2025-01-07T10:00:00+00:00",
        "finished": "2025-01-07T10:05:12+00:00" if whole else None,
        "seconds": 312.4,
        "trials": planned,
        "compiles": 1,
        "groups": groups(len(planned), len(trials)),
    }
    (folder / "study.json").write_text(json.dumps(info | (study or {})))
    return folder


def groups(planned, ended):
    """Equal groups; those that never started are not recorded."""
    count = math.ceil(planned / GROUP)
    size = math.ceil(planned / count)
    return [
        {
            "trials": min(size, planned - start),
            "size": size,
            "estimated_bytes": 310_000_000,
            "temp_bytes": 330_000_000,
            "seconds": 290.1,
            "compile_seconds": 0.0 if start else 11.3,
        }
        for start in range(0, min(planned, ended), size)
    ]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def trial(rng, target, variant, alpha, rank, lr, seed, steps, test):
    gain = 0.0 if rank == 0 else 0.055 * (1 - math.exp(-(rank**0.7) / 1.6))
    gain += 0.01 * (target == "all") + 0.004 * (variant == "dora")
    gain -= 0.012 * (math.log10(lr) + 3) ** 2
    luck = 0.006 * math.sin(7.3 * seed)  # shared by all conditions of a seed: why pairing pays
    accuracy = 0.80 + gain + luck + rng.normal(0, 0.003)
    per_rank = 2 * 384 * len(SITES) * (2 if target == "all" else 1)
    tested = round((accuracy - 0.004 + rng.normal(0, 0.003)) * 1000) / 1000
    name = f"r{rank}_a{alpha:g}_lr{lr:g}_{target}_s{seed}" if rank else f"probe_lr{lr:g}_s{seed}"
    return {
        "trial": name if variant == "lora" else f"{variant}_{name}",
        "rank": rank,
        "alpha": alpha,
        "lr": lr,
        "seed": seed,
        "targets": target,
        "variant": variant,
        "params": 770 + per_rank * rank,
        "factor_bytes": 4 * (770 + per_rank * rank),
        "adapter_bytes": 4 * (770 + per_rank * rank) + 3000 + seed,
        "steps": steps,
        "train_loss": 0.42 - 2 * gain,
        "val_loss": 0.45 - 1.5 * gain - luck,
        "val_accuracy": round(accuracy * 500) / 500,
        "test_loss": 0.46 - 1.5 * gain - luck if test else None,
        "test_accuracy": tested if test else None,
        "train_seconds": 290.1 / GROUP,
        "compiles": 1,
        "status": "done",
        "failed_step": None,
        "adapter": f"adapters/{name}",
    }


def diverge(row, steps):
    lost = ("adapter_bytes", "train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "adapter")
    return row | dict.fromkeys(lost) | {"status": "diverged", "steps": steps // 3, "failed_step": steps // 3}


def curve(rng, row, steps):
    final = 0.3 if row["rank"] == 0 else 0.22 - 0.03 * math.log2(row["rank"] + 1)
    lines = []
    for step in range(1, steps + 1):
        if step == row["failed_step"]:
            return [*lines, {"trial": row["trial"], "step": step, "loss": None}]
        clean = final + 0.45 * math.exp(-step / 40)
        line = {"trial": row["trial"], "step": step, "loss": clean + rng.normal(0, 0.05)}
        if step % 25 == 0:
            line |= {"val_loss": clean + 0.06 + 0.0002 * step, "val_accuracy": 0.8 - 0.3 * math.exp(-step / 40)}
        lines.append(line)
    return lines


def spectrum(rng, row, depth, site):
    rank = row["rank"]
    values = np.sort(2 / rank**0.5 * np.exp(-np.arange(rank) / (1.5 + 0.2 * depth)) * rng.uniform(0.8, 1.2, rank))[::-1]
    share = values / values.sum()
    held = np.cumsum(values**2) / (values**2).sum()
    return {
        "trial": row["trial"],
        "site": site,
        "rank": rank,
        "singular_values": values.tolist(),
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
        "rank90": int(1 + (held < 0.9).sum()),
    }


def from_scores(folder, scores, **study):
    """A run with exact accuracies: `scores` maps (rank, lr) to one (validation, test) pair per seed, None: diverged."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for (rank, lr), pairs in scores.items():
        for seed, pair in enumerate(pairs):
            row = trial(rng, "attention" if rank else "head", "lora", 16.0 if rank else 0.0, rank, lr, seed, 10, True)
            found = pair or (None, None)
            row |= {"val_accuracy": found[0], "test_accuracy": found[1]}
            rows.append(row if pair else diverge(row, 10))
    write_lines(folder / "trials.jsonl", rows)
    info = {"name": "exact", "trials": [row["trial"] for row in rows], "finished": "2025-01-07T10:05:12+00:00"}
    (folder / "study.json").write_text(json.dumps(info | study))
    return folder
