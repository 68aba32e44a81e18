"""Holds a finished demo to what the README says of it: files, columns, accuracy, one compilation, exact evaluation."""

import csv
import json
import subprocess
import sys
from pathlib import Path

run = Path(sys.argv[1])
with open(run / "results.csv", newline="") as file:
    rows = list(csv.DictReader(file))
wanted = "rank alpha lr seed targets params adapter_bytes steps val_accuracy test_accuracy train_seconds compiles"
assert set(wanted.split()) <= set(rows[0]), rows[0]
assert {(int(r["rank"]), int(r["seed"])) for r in rows} == {(k, s) for k in (0, 1, 2, 4, 8, 16) for s in (0, 1, 2)}
assert all(int(r["compiles"]) == 1 for r in rows), "the study compiled its step more than once"


def mean(rank: int, column: str) -> float:
    """Mean of a column over the seeds of a rank."""
    values = [float(r[column]) for r in rows if int(r["rank"]) == rank]
    return sum(values) / len(values)


best = max((1, 2, 4, 8, 16), key=lambda rank: mean(rank, "val_accuracy"))
assert mean(best, "test_accuracy") >= max(0.77, mean(0, "test_accuracy")), (best, mean(best, "test_accuracy"))
for row in rows:
    trained = int(row["params"]) * 4
    assert int(row["adapter_bytes"]) <= 1.05 * trained + 64 * 1024, row["trial"]
info = json.loads((run / "study.json").read_text())
assert (run / "report.html").stat().st_size > 50_000
row = next(r for r in rows if int(r["rank"]) == best)
found = json.loads(
    subprocess.run(
        [Path(sys.executable).with_name("lorax-kit"), "evaluate", run / "adapters" / row["trial"], "--json"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
)
assert found["test_accuracy"] == float(row["test_accuracy"]), (found, row)
reached, probe = mean(best, "test_accuracy"), mean(0, "test_accuracy")
print(f"demo: rank {best} reaches {reached:.4f}, the probe {probe:.4f}, in {info['seconds']:.0f} s")
