"""`lorax-kit bench study` in its small form: the fields of the contract, and sums that add up."""

import json

import pytest

from lorax_kit.benchmarks import STUDY_COLUMNS
from lorax_kit.cli import main


def test_the_small_form_runs_and_its_sums_add_up(capsys):
    argv = ["bench", "study", "--width", "32", "--layers", "3", "--batch-size", "2", "--length", "4"]
    main([*argv, "--steps", "3", "--rounds", "1", "--no-peer", "--json"])
    row = json.loads(capsys.readouterr().out)
    assert set(STUDY_COLUMNS) <= set(row)
    assert (row["trials"], row["steps"], row["peft_s"]) == (24, 3, None)
    ms = row["step_ms"]
    assert row["ours_s"] == pytest.approx(row["compile_s"] + 3 * ms["stacked"] / 1e3)
    assert row["ratio_solo"] == pytest.approx(row["ours_s"] / row["solo_s"])
    assert row["ratio_upper_layers"] == pytest.approx(ms["upper"] / 24 / ms["upper_solo"])
    assert row["solo_s"] > 24 * 3 * ms["32"] / 1e3
    assert row["stacked_flops"] > row["upper_flops"] > 0
    assert 24 % row["stacked_at_once"] == 0
