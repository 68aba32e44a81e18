"""What earlier versions wrote is read by this one: `tests/fixtures/formats`, recorded by `make_formats.py`."""

import json
import shutil

import jax
import numpy as np
import pytest

import lorax_kit as lk
from tests import tiny
from tests.fixtures.make_formats import FOLDER, plan, trained

ADAPTERS = sorted(path.name for path in FOLDER.glob("adapter-*"))
RUNS = sorted(path.name for path in FOLDER.glob("run-*"))


def test_every_format_is_there():
    """A new format is recorded beside the older ones."""
    assert [f"adapter-{number + 1}" for number in range(lk.checkpoint.adapter.FORMAT)] == ADAPTERS
    assert RUNS == ["run-1"]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_an_earlier_format_is_read_to_the_same_bits(name, tmp_path):
    base, factors = trained(plan())
    adapter = lk.load_adapter(FOLDER / name, base=base)
    jax.tree.map(np.testing.assert_array_equal, adapter.factors, factors)
    assert [(site.path, site.rank) for site in adapter.plan.sites] == [("down/kernel", 1), ("up/kernel", 2)]
    whole = lk.merge(base, adapter.factors, adapter.plan)
    jax.tree.map(np.testing.assert_array_equal, whole, lk.merge(base, factors, plan()))
    lk.save_adapter(tmp_path / "again", adapter.plan, adapter.factors, base=base)
    jax.tree.map(np.testing.assert_array_equal, lk.load_adapter(tmp_path / "again", base=base).factors, factors)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_folder_of_an_earlier_format_is_gone_on_with(name, tmp_path):
    folder = shutil.copytree(FOLDER / name, tmp_path / name)
    before = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    results = lk.run(
        tiny.study(rank=[1, 2], seed=[0], probe_lr=(), steps=3), tiny.problem(), out=folder, progress=False
    )
    assert [row["rank"] for row in results.rows] == [1, 2]
    after = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert (after[:1], len(after)) == (before, 2)  # the first was not trained again
    adapter = lk.load_adapter(folder / results.rows[0]["adapter"], base=tiny.params(jax.random.key(0)))
    assert adapter.plan.sites[0].rank == 1
