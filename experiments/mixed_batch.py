"""A batch of 32 rows, each with its own adapter of rank 2 to 16, against one adapter for all of them; PEFT beside it.

Command:   python experiments/mixed_batch.py [--rounds 30] [--layers 6]
Hardware:  2 CPU cores, 2 minutes
Result:    mixed against one adapter of rank 16 for all rows, 6 layers, wall time, medians of 30 alternating rounds;
           PEFT's mixed batch against its own single adapter:

           | targets    | tokens a row | mixed | one, mixed ms | PEFT  | PEFT: one, mixed ms |
           | ---------- | ------------ | ----- | ------------- | ----- | ------------------- |
           | qv         | 16           | 1.18x | 26.8, 33.4    | 1.34x | 59.2, 77.5          |
           | qv         | 64           | 1.10x | 102, 114      | 1.10x | 227, 249            |
           | all-linear | 16           | 1.27x | 29.6, 38.9    | 1.95x | 62.6, 121           |
           | all-linear | 64           | 1.38x | 117, 160      | 1.19x | 267, 323            |

           In processor time on one core it is 1.03x to 1.05x (qv) and 1.20x to 1.24x (all-linear): the rows' own
           products do not use the second core as the shared one does.

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
