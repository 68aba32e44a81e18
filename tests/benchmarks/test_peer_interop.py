"""The peer in the benchmark starts from the same loss: same model, weights and batch."""

import pytest

from lorax_kit.benchmarks import bench_mixed, bench_step
from lorax_kit.benchmarks.case import make_case
from lorax_kit.benchmarks.device.steps import Shape, Timing, step_row
from lorax_kit.benchmarks.torch_peer import torch_steps

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.usefixtures("standard_promotion"),
]
SIZES = {"width": 32, "layers": 2, "batch_size": 4, "length": 12, "rank": 2}


@pytest.mark.parametrize("targets", ["all-linear", "qv"])
def test_a_row_with_the_peer(targets):
    row = bench_step(**SIZES, targets=targets, rounds=2, progress=False)  # it checks that the first losses agree
    assert row["peft_ms"] > 0
    assert row["torch_full_ms"] > 0
    assert row["spread_peft"][0] <= row["ratio_peft"] <= row["spread_peft"][1]


def test_a_mixed_batch_with_the_peer():
    """Row i with adapter i is the same in both."""
    row = bench_mixed(width=32, layers=1, rows=3, length=6, targets="qv", rounds=2, ranks=(1, 4), progress=False)
    assert row["peft_worst"] < 1e-5
    assert row["worst"] < 1e-5
    assert row["peft_ratio"] > 0


def test_the_peer_trains_what_we_train():
    """After a few steps the losses are still those of our own step: AdamW, scale and trained parameters agree."""
    import jax
    import optax

    import lorax_kit as lk

    case = make_case(**SIZES, targets="all-linear")
    base, factors = lk.split(case.params, case.plan, jax.random.key(1))
    adapted = lk.adapt(case.apply, case.plan)
    init, step = lk.make_step(
        lambda base, f, b: case.loss(adapted(base, f, b), b), lk.partition(optax.adamw(1e-2), case.plan)
    )
    state = init(factors)
    peer = torch_steps(case, factors, 1e-2)["peft"]
    ours, theirs = [], []
    for _ in range(5):
        state, info = step(state, base, case.batch)
        ours.append(float(info.loss))
        theirs.append(float(peer()))
    assert ours == pytest.approx(theirs, abs=1e-4)  # fp32 sums in another order, through five steps of AdamW
    assert theirs[-1] < theirs[0] - 0.1


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_a_row_for_an_accelerator_with_the_peer(dtype, close):
    shape = Shape(width=32, layers=1, batch_size=2, length=8, head=16, dtype=dtype)
    (row,) = step_row(shape, timing=Timing(rounds=2, least_ms=0.0), square=64, line=4096)
    assert row["no_peer"] is None
    assert {"full", "naive", "ours", "torch_full", "peft"} <= set(row["ms"])
    assert max(row["losses"].values()) - min(row["losses"].values()) < close
    assert row["share_of_rate"]["peft"] > 0
