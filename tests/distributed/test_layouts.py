"""jit == pmap == mesh on 1, 2, 4 and 8 devices == 2 and 4 processes, after 50 steps; one trace each."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.distributed.processes import ROOT, run, together

pytestmark = pytest.mark.distributed
WITHIN = 1e-5
"""Gradients are summed over devices in another order: of fp32, and of 50 steps."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run({"mesh": {}, "out": str(tmp_path_factory.mktemp("alone"))})


def test_every_layout_of_eight_devices_trains_the_same():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, str(ROOT / "tests/distributed/layouts.py")]
    done = subprocess.run(argv, env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 20
    assert {row["kind"] for row in rows} == {"jit", "pmap", "mesh"}
    assert max(row["difference"] for row in rows) <= WITHIN, rows


@pytest.mark.parametrize(
    ("count", "devices", "settings"),
    [
        (2, 2, {"mesh": {"data": 4}}),
        (2, 2, {"mesh": {"data": 2, "fsdp": 2}, "factors": "sharded"}),
        (2, 4, {"mesh": {"fsdp": 4, "tensor": 2}}),
        (4, 1, {"mesh": {"fsdp": 4}}),
        (4, 2, {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}),
    ],
    ids=lambda x: str(x),
)
def test_processes_train_the_same_and_save_one_adapter(alone, tmp_path, count, devices, settings):
    found = together(count, devices, {**settings, "out": str(tmp_path)})
    np.testing.assert_allclose(found, alone, atol=WITHIN)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["adapter"]
