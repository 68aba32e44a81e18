"""What the experiments on applications share: a study of one rank beside the trained head alone, and rows of BIG-bench.

BIG-bench (Srivastava et al., arXiv 2206.04615) is an archive of 358 MB of which nothing needs to be installed:

    pip download --no-deps --no-binary :all: bigbench==1.0.0 -d runs/data
"""

import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tables import against, at_best_rate, spread, write

import lorax_kit as lk

ARCHIVE = Path("runs/data/bigbench-1.0.0.tar.gz")
TASKS = "bigbench-1.0.0/bigbench/benchmark_tasks"


def examples(*tasks: str) -> dict[str, list[dict]]:
    """The examples of some tasks of BIG-bench, by task."""
    with tarfile.open(ARCHIVE) as archive:
        return {task: json.load(archive.extractfile(f"{TASKS}/{task}/task.json"))["examples"] for task in tasks}


def write_rows(file: Path, rows: Iterable[dict]) -> str:
    """Rows as JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def best_class(scores: dict[str, int]) -> str:
    """The class that an example of BIG-bench is."""
    return max(scores, key=scores.__getitem__)


def before_and_after(study: lk.Study, problem: lk.Problem, out: Path, better: Callable = max) -> list[dict]:
    """Test metrics of the trained head alone and of the adapter, each at the rate that validation chose."""
    command = f"python experiments/{out.name}.py"
    rows = lk.run(study, problem, out=out / "study", command=command).rows
    chief, names = problem.metric, [metric.name for metric in problem.all_metrics]
    arms = {
        "head alone": at_best_rate([row for row in rows if row["rank"] == 0], f"val_{chief}", better),
        "adapter and head": at_best_rate([row for row in rows if row["rank"] != 0], f"val_{chief}", better),
    }
    table = []
    for arm, some in arms.items():
        row = {"arm": arm, "lr": some[0]["lr"], "seeds": len(some)}
        for name in names:
            row |= spread([one[f"test_{name}"] for one in some], name)
        table.append(row)
    gain = {"arm": "gain", "seeds": len(arms["head alone"])}
    for name in names:
        pair = [[row[f"test_{name}"] for row in some] for some in reversed(arms.values())]
        gain |= {key.replace("difference", name): x for key, x in against(*pair).items()}
    write(out / "table.csv", [*table, gain])
    return [*table, gain]
