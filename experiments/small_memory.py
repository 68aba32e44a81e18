"""SmolLM2 on plays within 3 GiB: 8 x 256 tokens, LoRA r=8 on every linear layer, over a base in NF4.

Command:   python experiments/small_memory.py            # --plain: the same in fp32, to see what is saved
Hardware:  2 CPU cores, 20 minutes beside much other work
Result:    peak of the whole training process 2.12 GiB (2,279,256,064 bytes), of the evaluation before it 1.23 GiB; test
           perplexity 123.4 -> 53.7 after 20 steps (39.5 after 40). A step takes 10.8 s where little else runs, 10.5 s
           with the results of products kept, whose process peaks at 3.6 GiB: a step's temporaries are 0.41 GiB instead
           of 1.74. Losses of the first three steps are the same to every digit printed.
How:       the kernels become NF4 as they are read, the loss forms the logits of 256 places at a time, and the
           backward pass keeps what enters each half of a layer. What is left is mostly the compiler and temporaries.
Enforced:  the commands run as processes of their own, which a watcher kills as soon as the peak of their resident
           memory (VmHWM, every 20 ms) is above the limit; the figures are the kernel's at the end (ru_maxrss).
Writes:    runs/small_memory/{plays.txt,small.json} and the adapter under small
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from lorax_kit.data import load_plays

OUT = Path("runs/small_memory")
LIMIT = 3 * 2**30
STEPS, CHARACTERS = 20, 300_000
PROBLEM = ["--model", "smollm2", "--task", "lm", "--batch-size", "8", "--length", "256"]
SMALL = ["--quantise", "nf4"]


def watched(arguments: list[str], limit: int | None) -> tuple[dict, int]:
    """What a command of lorax-kit prints as JSON, and the most bytes it held; killed as soon as it holds more."""
    command = [sys.executable, "-m", "lorax_kit", *arguments, "--json"]
    with open(OUT / "stdout.json", "w+", encoding="utf-8") as printed:
        child = subprocess.Popen(command, stdout=printed)
        usage, code = None, 0
        while usage is None:
            done, code, found = os.wait4(child.pid, os.WNOHANG)
            usage = found if done else None
            if usage is None and limit is not None and peak_of(child.pid) > limit:
                child.kill()
            time.sleep(0.02)
        most = usage.ru_maxrss * 1024
        if code:
            raise SystemExit(f"lorax-kit {arguments[0]} ended with {code}, after a peak of {most / 2**30:.2f} GiB")
        printed.seek(0)
        return json.load(printed), most


def peak_of(pid: int) -> int:
    """The peak resident memory of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def main(plain: bool) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    data, out = OUT / "plays.txt", OUT / ("plain" if plain else "small")
    data.write_text("\n\n".join(load_plays().train)[:CHARACTERS], encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    problem = [*PROBLEM, "--data", str(data), *([] if plain else SMALL)]
    limit = None if plain else LIMIT
    before, most_before = watched(["evaluate", *problem], limit)
    steps = 2 if plain else STEPS
    saving = [] if plain else ["--save-memory", "--max-memory", "3GiB"]
    training = ["--rank", "8", "--alpha", "16", "--lr", "5e-4", "--epochs", "1", "--steps-per-epoch", str(steps)]
    after, most = watched(["train", *problem, *training, *saving, "--out", str(out)], limit)
    found = {
        "peak_bytes": most,
        "peak_gib": most / 2**30,
        "peak_gib_of_evaluation": most_before / 2**30,
        "seconds_per_step": after["history"][0]["seconds"] / steps,
        "test_perplexity_before": before["test_perplexity"],
        "test_perplexity_after": after["test_perplexity"],
    }
    (OUT / f"{out.name}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="fp32 and all activations kept, without a limit")
    main(parser.parse_args().plain)
