"""Settings that a row may lack, in words; the columns of results.csv that they add."""

import csv
import json

from lorax_kit.report import read_run, write_csv
from lorax_kit.report.settings import rest_of, setting_columns, settings_of, varying
from lorax_kit.report.tables.trials import BEFORE, columns
from tests.report import fake_run


def row(**settings):
    return {"trial": "t", "rank": 4, "variant": "lora", **settings}


def test_missing_columns_are_the_defaults():
    assert settings_of({}) == settings_of(row(dropout=None, optimizer="adamw", accumulate=1.0))
    assert varying([row(), row(dropout=0), row(dropout=0.0)]) == ()
    assert varying([row(), row(start="pissa")]) == ("start",)
    assert varying([row(), row() | {"rank": 0, "dropout": 0.5}]) == (), "the probe's own setting tells no ranks apart"


def test_words():
    names = ("dropout", "optimizer", "dtype", "batch_size", "hyper_label_smoothing", "settings.factor", "settings.tied")
    trial = row(dropout=0.1, optimizer="adafactor", batch_size=8, hyper_label_smoothing=0.05)
    trial["settings"] = {"factor": 8, "tied": False}
    assert rest_of(trial, names) == "dropout 0.1, adafactor, batch size 8, label smoothing 0.05, factor 8, no tied"
    assert rest_of(row(dtype="bfloat16", quantise="nf4"), ("dtype", "quantise")) == "bfloat16, nf4"
    assert rest_of(row(hyper_x=0), ("hyper_x",)) == "x 0", "a scalar has no default"


def test_settings_of_methods_differ_only_within_a_method():
    lokr = row(variant="lokr", settings={"factor": 8})
    assert varying([row(), lokr]) == ()
    assert varying([row(), lokr, row(variant="lokr", settings={"factor": 4})]) == ("settings.factor",)


def test_the_csv_gains_the_columns_that_vary(tmp_path):
    def change(t):
        return {"dropout": 0.1 * t["seed"], "start": "pissa", "settings": {"factor": t["rank"]}, "stopped_at": None}

    run = fake_run.build(tmp_path / "run", ranks=(1, 4), seeds=2, steps=1, spectra=False, probe=False, change=change)
    found = read_run(run)
    assert setting_columns(found.trials) == ("dropout", "settings")
    assert columns(found)[: len(BEFORE)] == BEFORE
    assert columns(found)[-3:] == ("failed_step", "dropout", "settings")
    with open(write_csv(found, tmp_path / "r.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(r["rank"], r["dropout"]) for r in rows} == {("1", "0.0"), ("1", "0.1"), ("4", "0.0"), ("4", "0.1")}
    assert all(json.loads(r["settings"]) == {"factor": int(r["rank"])} for r in rows)
