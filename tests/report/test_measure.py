"""Reports of any metric: its name, direction and format come from `study.json`, never from the name."""

import csv
import json
import math

import numpy as np
import pytest

from lorax_kit.analysis.statistics.conditions import Comparison, Interval
from lorax_kit.report import read_run, summary_table, write_report
from lorax_kit.report.conditions import summarise
from lorax_kit.report.measure import Measure
from tests.report import fake_run

ACCURACY, PERPLEXITY = Measure(), Measure("perplexity", "lower", ".4g")


def test_numbers_as_text():
    value = Interval(0.8731, 0.869, 0.8782, "Student t, n = 3")
    assert ACCURACY.interval(value) == "87.3 % (95 % interval 86.9 to 87.8, Student t, n = 3)"
    assert ACCURACY.interval(value, short=True) == "87.3 [86.9, 87.8]"
    assert ACCURACY.interval(Interval(0.5, math.nan, math.nan, "one value"), short=True) == "50.0"
    assert ACCURACY.interval(Interval(math.nan, math.nan, math.nan, "none")) == "–"
    assert ACCURACY.interval(Interval(0.99, 0.97, 1.01, "t"), short=True) == "99.0 [97.0, 100.0]"
    assert PERPLEXITY.interval(Interval(31.832, 30.0, 33.5, "t"), short=True) == "31.83 [30, 33.5]"
    assert [ACCURACY.signed(x) for x in (0.01234, -0.005, 0.00001, -0.00001)] == ["+1.23", "−0.50", "0.00", "0.00"]
    assert [PERPLEXITY.signed(x) for x in (1.2345, -0.5, 0.0)] == ["+1.23", "−0.5", "0.00"]
    found = Comparison(("r1",), ("r2",), 6, 0, 1.5, 1.0, 2.0, "t", 0.03, 0.03)
    assert PERPLEXITY.difference(found) == "−1.5 (95 % interval −2 to −1)"
    assert ACCURACY.difference(found._replace(difference=0.015, low=0.01, high=0.02)).startswith("−1.50 points (95 %")


def test_a_metric_that_is_better_when_lower_is_chosen_by_its_lowest(tmp_path):
    """Rank 2 has the lowest perplexity on validation, by hand; rank 1 comes second."""
    values = {1: 20.0, 2: 15.0, 4: 30.0}

    def change(trial):
        noise = 0.1 * trial["seed"]
        own = values.get(trial["rank"], 40.0) + noise
        for name in ("val_accuracy", "test_accuracy"):
            trial.pop(name, None)
        return {"val_perplexity": own, "test_perplexity": own + 1}

    study = {
        "metric": "perplexity",
        "metrics": [
            {"name": "loss", "better": "lower", "format": ".4f"},
            {"name": "perplexity", "better": "lower", "format": ".4g"},
        ],
    }
    run = fake_run.build(tmp_path / "run", ranks=(1, 2, 4), change=change, study=study)
    found = summarise(read_run(run))
    assert found.best.rank == 2
    assert found.label == "test perplexity"
    assert found.best.mean("test_perplexity") == pytest.approx(16 + 0.1 * np.mean(range(6)))
    page = write_report(run).read_text()
    assert "Rank 2 (learning rate 0.001) has the best mean validation perplexity. Its test perplexity is 16.25" in page
    assert "accuracy" not in page
    assert "standard error" not in page
    assert "test perplexity (95 %)" in summary_table(read_run(run))
    with open(run / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    stored = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    assert {"val_loss", "val_perplexity", "test_loss", "test_perplexity"} <= set(rows[0])
    by_name = {row["trial"]: row for row in rows}
    assert all(by_name[row["trial"]]["test_perplexity"] == str(row["test_perplexity"]) for row in stored)
