"""A batch of 32 rows, each with its own adapter of rank 2 to 16, against one adapter for all of them; PEFT beside it.

Command:   python experiments/mixed_batch.py [--rounds 30] [--layers 6]
Writes:    runs/mixed_batch/results.json
"""

import argparse
import itertools
import json
from pathlib import Path

from lorax_kit.benchmarks import MIXED_COLUMNS, bench_mixed, table

OUT = Path("runs/mixed_batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    found = []
    for targets, length in itertools.product(("qv", "all-linear"), (16, 64)):
        found.append(
            bench_mixed(width=384, layers=args.layers, rows=32, length=length, targets=targets, rounds=args.rounds)
        )
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "results.json").write_text(json.dumps(found, indent=2))
    print(table(found, MIXED_COLUMNS))


if __name__ == "__main__":
    main()
