"""results.csv holds the numbers of trials.jsonl bit for bit; the summary is computed by its definition."""

import csv
import json
import math

import pytest

from lorax_kit.report import read_run, summary_table, write_csv
from lorax_kit.report.claims import more_seeds
from lorax_kit.report.conditions import summarise
from lorax_kit.report.tables.summary import summary_rows
from lorax_kit.report.tables.text import bytes_text, count_text, p_text
from lorax_kit.report.tables.trials import trial_rows
from tests.report import fake_run

WANTED = "rank alpha lr seed targets params adapter_bytes steps val_accuracy test_accuracy train_seconds compiles"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    awkward = {"train_seconds": 0.1 + 0.2, "val_loss": 1 / 3, "lr": 2.0000000000000005e-4}
    return fake_run.build(
        folder / "run",
        ranks=(1, 4),
        seeds=3,
        steps=2,
        spectra=False,
        diverged=lambda t: t["rank"] == 4 and t["seed"] == 1,
        change=lambda t: awkward if t["rank"] == 1 else {},
    )


def test_the_csv_has_the_promised_columns_and_round_trips_exactly(run, tmp_path):
    with open(write_csv(read_run(run), tmp_path / "results.csv"), newline="") as file:
        table = list(csv.DictReader(file))
    assert set(WANTED.split()) <= set(table[0])
    written = {t["trial"]: t for t in map(json.loads, (run / "trials.jsonl").read_text().splitlines())}
    assert {row["trial"] for row in table} == set(written)
    assert len(table) == 9
    for row in table:
        for column, text in row.items():
            value = written[row["trial"]][column]
            if value is None:
                assert text == ""
            elif isinstance(value, str):
                assert text == value
            else:
                assert type(value)(text) == value  # float("0.30000000000000004") is the same double


def test_names_with_commas_and_quotes_survive_the_csv(tmp_path):
    hostile = 'a,"b"\nc'
    run = fake_run.build(
        tmp_path / "run", ranks=(1,), seeds=1, probe=False, spectra=False, change=lambda t: {"targets": hostile}
    )
    with open(write_csv(read_run(run), tmp_path / "r.csv"), newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["targets"] == hostile


def test_diverged_trials_are_counted_beside_the_finished_seeds(run):
    rows = {row["rank"]: row for row in summary_rows(summarise(read_run(run)))}
    assert {rank: row["seeds"] for rank, row in rows.items()} == {"probe": "3", "1": "3", "4": "2 (+1 failed)"}
    assert rows["1"]["difference"] == "chosen"
    assert rows["1"]["p"] == ""
    assert (rows["4"]["params"], rows["4"]["size"]) == ("49,922", "198 KiB")


def test_the_terminal_table_holds_the_rows_of_the_page(run):
    found = read_run(run)
    first, head, *lines, chosen, hint, command, diverged, few = summary_table(found).splitlines()
    assert chosen == "chosen: the highest mean of val_accuracy."
    assert first == "demo: 9 of 9 trials"
    heads = ["rank", "lr", "seeds", "test accuracy (95 %)", "params", "adapter", "vs chosen (95 %)", "p (Holm)"]
    assert [h.strip() for h in head.replace("  ", "|").split("|") if h] == heads
    for line, row in zip(lines, summary_rows(summarise(found)), strict=True):
        wanted = [row[k] for k in ("rank", "rate", "seeds", "metric", "params", "size", "difference", "p")]
        assert line.split() == " ".join(wanted).split()
    assert hint.startswith("p cannot fall below 0.05 with fewer than ")
    assert command == f"more seeds: {more_seeds(summarise(found))[1]}"
    assert command.startswith("more seeds: lorax-kit study --config experiments/demo.json --out runs/demo --seeds ")
    assert diverged == "1 trial diverged; left out of the means."
    assert few.startswith("Only one learning rate was tried per rank: ")


def test_trial_rows_sort_by_the_number_and_show_it_rounded(run):
    found = summarise(read_run(run))
    row = next(r for r in trial_rows(found) if r["rank"][1] == 1 and r["seed"][1] == 0)
    trial = next(t for t in found.run.trials if t["rank"] == 1 and t["seed"] == 0)
    assert row["val_loss"] == ("0.3333", 1 / 3)
    assert row["test_accuracy"] == (f"{100 * trial['test_accuracy']:.2f}", trial["test_accuracy"])
    assert row["adapter_bytes"] == ("53.9 KiB", 55232)
    lost = next(r for r in trial_rows(found) if r["status"][0] == "diverged")
    assert (lost["test_accuracy"], lost["failed_step"]) == (("", ""), ("0", 0))


def test_numbers_are_written_as_people_read_them():
    assert [bytes_text(x) for x in (0, 1023, 1024, 294912, 1.25 * 2**20, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "288 KiB",
        "1.2 MiB",
        "3.00 GiB",
    ]
    assert [count_text(x) for x in (770, 83714, 1_234_567, 7e9)] == ["770", "83.7k", "1.23M", "7G"]
    assert [p_text(x) for x in (0.03125, 0.0009, math.nan)] == ["0.031", "< 0.001", "–"]
