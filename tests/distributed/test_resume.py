"""What several processes keep is gone on with by as many, by fewer, by one; a lost process does not hold the others."""

import time

import numpy as np
import pytest

from tests.distributed.processes import ended, run, start, together

pytestmark = pytest.mark.distributed


def test_a_training_is_resumed_on_other_layouts(tmp_path):
    alone = run({"mesh": {}, "out": str(tmp_path / "alone")})
    file = tmp_path / "training.npz"
    shared = {"saved": str(file), "every": 0.0, "out": str(tmp_path / "run"), "lost_after": 10}
    began = time.monotonic()
    codes, _, errors = ended(start(2, 2, {**shared, "mesh": {"data": 2, "fsdp": 2}, "dies": 17}), limit=120)
    assert codes[1] == 9
    assert codes[0] not in (0, None), "the other process waits for the lost one"
    assert time.monotonic() - began < 100
    assert any(word in errors[0] for word in ("another task died", "Connection closed", "heartbeat", "unhealthy")), (
        errors[0]
    )
    assert file.exists()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["alone", "training.npz"]
    # Of step 10, on four processes; they die, too, and one goes on from step 40.
    codes, *_ = ended(start(4, 1, {**shared, "mesh": {"fsdp": 4}, "dies": 43}), limit=120)
    assert codes[3] == 9
    assert 0 not in codes
    found = run({**shared, "mesh": {}})
    np.testing.assert_allclose(found, alone, atol=1e-5)


def test_a_killed_training_of_two_processes_ends_as_if_nothing_had_happened(tmp_path):
    shared = {"every": 0.0, "mesh": {"data": 4}, "lost_after": 10}
    # The second process comes late to an adapter that replaces nothing: what the first has written is its own, too.
    whole = together(2, 2, {**shared, "out": str(tmp_path / "whole"), "saved": str(tmp_path / "whole.npz"), "late": 3})
    killed = {**shared, "out": str(tmp_path / "killed"), "saved": str(tmp_path / "killed.npz")}
    codes, *_ = ended(start(2, 2, {**killed, "dies": 33}), limit=120)
    assert codes[1] == 9
    assert (tmp_path / "killed.npz").exists()
    np.testing.assert_array_equal(together(2, 2, killed), whole)
