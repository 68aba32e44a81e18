"""`lorax-kit inspect` on folders of every kind of model."""

import json

import pytest
from click.testing import CliRunner

from lorax_kit.cli import cli
from tests.models.test_families import copied


@pytest.mark.parametrize("family", ["gpt2", "qwen3_classify", "roberta", "t5"])
def test_the_sites_of_every_kind_of_model_are_shown(tmp_path, family):
    folder = copied(family, tmp_path / "model")
    arguments = ["inspect", str(folder), "--spec", "all-linear", "--tokens", "4", "--batch-size", "1", "--json"]
    found = CliRunner().invoke(cli, arguments)
    assert found.exit_code == 0, (found.output, found.exception)
    told = json.loads(found.stdout)
    assert told["sites"]
    assert {site["path"] for site in told["sites"]} <= {row["path"] for row in told["parameters"]}
    assert not any(site["path"].startswith(("classifier", "head")) for site in told["sites"])
