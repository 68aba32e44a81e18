"""A batch of 32 rows, each with its own adapter of rank 2 to 16, against one adapter for all of them; PEFT beside it.

Command:   python experiments/mixed_batch.py [--rounds 30] [--layers 6]
Result:    mixed against one adapter of rank 16 for all rows, in CPU time on one core of a busy machine, medians of 9 to
           15 alternating rounds; PEFT's mixed batch against its own single adapter likewise, 2 layers:

           | targets    | tokens a row | 6 layers | 2 layers | 2 layers, ms | PEFT  | PEFT, ms |
           | ---------- | ------------ | -------- | -------- | ------------ | ----- | -------- |
           | qv         | 16           | 1.04x    | 1.03x    | 19.6         | 1.16x | 50.8     |
           | qv         | 64           | 1.03x    | 1.05x    | 81.7         | 1.05x | 177.4    |
           | all-linear | 16           | 1.22x    | 1.20x    | 23.0         | 1.46x | 68.6     |
           | all-linear | 64           | 1.21x    | 1.24x    | 118.6        | 1.07x | 223.4    |

           Rows are within 3e-6 of their merged parameters. Copying the factors of all sites at the start,
           instead of each site's for its own products, makes it 1.84x (all-linear, 16 tokens, 2 layers): the copies
           double the temporary memory, and touching it costs more than the products.
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
