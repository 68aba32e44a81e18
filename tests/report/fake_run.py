"""Builds run folders with the numbers a small sentiment study would leave."""

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


def build(
    folder: Path,
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
    keep=None,
    steps=200,
    test=True,
    finished=True,
):
    """Write a run folder; `keep` limits how many trials finished, `alphas` may hold functions of rank."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    points = list(product(targets, variants, alphas, ranks, rates, range(seeds)))
    trials, curves, spectral = [], [], []
    for target, variant, alpha, rank, lr, seed in points:
        value = alpha(rank) if callable(alpha) else alpha
        trials.append(trial(rng, target, variant, value, rank, lr, seed, steps, diverged, test))
    if probe:
        trials += [trial(rng, "", "", None, 0, 1e-3, seed, steps, diverged, test) for seed in range(seeds)]
    planned = len(trials)
    trials = trials[:keep] if keep is not None else trials
    for record in trials:
        curves += curve(rng, record, steps)
        if spectra and record["rank"] and record["status"] == "done":
            spectral += [spectrum(rng, record, depth, site) for depth, site in enumerate(SITES)]
    write_lines(folder / "trials.jsonl", trials)
    write_lines(folder / "curves.jsonl", curves)
    if spectra:
        write_lines(folder / "spectra.jsonl", spectral)
    groups = math.ceil(planned / 30)
    study = {
        "name": "demo",
        "command": "lorax-kit study --config experiments/demo.json --out runs/demo",
        "design": {"rank": list(ranks), "lr": list(rates), "seed": list(range(seeds))},
        "spec": {"rules": {"**/attention/*/kernel": {"variant": "lora", "rank": 8, "alpha": 16}}},
        "environment": {
            "python": "3.11.9",
            "jax": "0.10.2",
            "platform": "cpu",
            "devices": ["CpuDevice(id=0)"],
        },
        "task": {"name": "sentiment", "train": 2000, "val": 500, "test": 1000, "classes": ["neg", "pos"]},
        "started": "2025-01-07T10:00:00+00:00",
        "finished": "2025-01-07T10:05:12+00:00" if finished and keep is None else None,
        "seconds": 312.4 if finished and keep is None else None,
        "compiles": groups,
        "groups": [
            {
                "trials": len(range(g, planned, groups)),
                "estimated_bytes": 310_000_000,
                "seconds": 290.1,
                "compile_seconds": 11.3,
            }
            for g in range(groups)
        ],
    }
    (folder / "study.json").write_text(json.dumps(study))
    return folder


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def trial(rng, target, variant, alpha, rank, lr, seed, steps, diverged, test):
    gain = 0.0 if rank == 0 else 0.055 * (1 - math.exp(-(rank**0.7) / 1.6))
    gain += {"attention": 0, "all": 0.01}.get(target, 0) + {"lora": 0, "dora": 0.004}.get(variant, 0)
    gain -= 0.012 * (math.log10(lr) + 3) ** 2
    luck = 0.006 * math.sin(7.3 * seed)  # shared by all conditions of a seed: why pairing pays
    accuracy = 0.80 + gain + luck + rng.normal(0, 0.003)
    per_rank = 2 * 384 * len(SITES) * (2 if target == "all" else 1)
    record = {
        "trial": f"r{rank}_a{alpha}_lr{lr:g}_{target}_{variant}_s{seed}",
        "rank": rank,
        "alpha": alpha,
        "lr": lr,
        "seed": seed,
        "targets": target,
        "variant": variant,
        "params": 770 + per_rank * rank,
        "adapter_bytes": 4 * (770 + per_rank * rank),
        "steps": steps,
        "train_loss": 0.42 - 2 * gain,
        "val_loss": 0.45 - 1.5 * gain - luck,
        "val_accuracy": round(accuracy * 500) / 500,
        "test_accuracy": round((accuracy - 0.004 + rng.normal(0, 0.003)) * 1000) / 1000 if test else None,
        "train_seconds": 3.1 + 0.02 * rank,
        "compiles": 0 if seed else 1,
        "status": "done",
        "failed_step": None,
        "adapter": f"adapters/r{rank}_s{seed}",
        "git": "kept in the JSON, ignored in the CSV",
    }
    if diverged(record):
        nothing = dict.fromkeys(("val_loss", "val_accuracy", "test_accuracy", "adapter"))
        record |= nothing | {"status": "diverged", "failed_step": steps // 3, "train_loss": math.nan}
    return record


def curve(rng, record, steps):
    final = 0.3 if record["rank"] == 0 else 0.22 - 0.03 * math.log2(record["rank"] + 1)
    lines = []
    for step in range(1, steps + 1):
        if record["status"] != "done" and step >= record["failed_step"]:
            return [*lines, {"trial": record["trial"], "step": step, "loss": math.nan}]
        clean = final + 0.45 * math.exp(-step / 40)
        line = {"trial": record["trial"], "step": step, "loss": clean + rng.normal(0, 0.05)}
        if step % 25 == 0:
            line |= {
                "val_loss": clean + 0.06 + 0.0002 * step,
                "val_accuracy": 0.8 - 0.3 * math.exp(-step / 40),
            }
        lines.append(line)
    return lines


def spectrum(rng, record, depth, site):
    rank = record["rank"]
    values = np.sort(2 / rank**0.5 * np.exp(-np.arange(rank) / (1.5 + 0.2 * depth)) * rng.uniform(0.8, 1.2, rank))[::-1]
    share = values / values.sum()
    held = np.cumsum(values**2) / (values**2).sum()
    return {
        "trial": record["trial"],
        "site": site,
        "rank": rank,
        "singular_values": values.tolist(),
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
        "rank90": int(1 + (held < 0.9).sum()),
    }
