"""Fifty kills: a study that is killed at a random moment and run again ends with the table of one left alone.

Command:   python experiments/kills.py [--kills 50]
Hardware:  2 CPU cores, with other work on the machine
Time:      27 min
Result:    50 of 50 runs were killed; 50 of 50 tables are the same

The training under way is saved every tenth of a second, not every half minute, so that kills fall between saves.

Each of the designs below (a plain one, one with a stream per seed and SGD, one that stops trials early) is run once to
its end, then again and again: killed by SIGKILL at a moment drawn evenly from its running time, and called anew. Every
column of the table that does not measure time or disk must be the same, to the last bit.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
TARGETS = {"upper": ["{up,down}/kernel"]}
COMMON = {"alpha": 8, "targets": TARGETS, "steps": 400, "eval_every": 50}
DESIGNS = {
    "plain": {"rank": [1, 2, 4], "lr": [1e-2], "seed": [0, 1], "probe_lr": 3e-2},
    "streams": {"rank": [1, 2], "lr": [1e-2], "seed": [0, 1], "stream": "seed", "optimizer": "sgd"},
    "race": {"rank": [1, 2], "lr": [1e-4, 1e-3, 1e-2], "seed": [0], "stop": {"kind": "halving", "first": 50}},
}
CALL = """
from lorax_kit.study.programs import engine
engine.SAVE_SECONDS = 0.1
from lorax_kit.cli import main
main()
"""
PASSING = ("train_seconds", "compiles", "adapter_bytes")


def command(design: str, folder: Path) -> list[str]:
    """The call of a design, whose folder it makes or goes on with."""
    config = folder.parent / f"{design}.json"
    config.write_text(json.dumps({"problem": {"address": "tests.tiny:built"}, "study": COMMON | DESIGNS[design]}))
    return [sys.executable, "-c", CALL, "study", "--config", str(config), "--out", str(folder), "--json"]


def table(text: str) -> list[dict]:
    """The rows, but what passes."""
    return [{k: v for k, v in row.items() if k not in PASSING} for row in json.loads(text)["rows"]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    kills = parser.parse_args().kills
    draw = random.Random(0)
    same = hit = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole, seconds = {}, {}
        for design in DESIGNS:
            began = time.monotonic()
            argv = command(design, Path(scratch) / design)
            done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
            whole[design], seconds[design] = table(done.stdout), time.monotonic() - began
        for number in tqdm(range(kills), desc="kills", disable=None):
            design = list(DESIGNS)[number % len(DESIGNS)]
            argv = command(design, Path(scratch) / f"{design}_{number}")
            first = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                first.wait(timeout=draw.uniform(0.2, 1) * seconds[design])
            except subprocess.TimeoutExpired:
                first.send_signal(signal.SIGKILL)
                hit += first.wait() == -signal.SIGKILL
            again = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
            ok = again.returncode == 0 and table(again.stdout) == whole[design]
            same += ok
            if not ok:
                tqdm.write(f"{design}, kill {number}: {again.stderr[-500:] or 'another table'}")
    print(f"{hit} of {kills} runs were killed; {same} of {kills} tables are the same")


if __name__ == "__main__":
    main()
