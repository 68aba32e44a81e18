"""The benchmark of an accelerator at tiny shapes: its rows, its budget, and what a cut run leaves."""

import json
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from click.testing import CliRunner

import lorax_kit as lk
from lorax_kit.arrays.after import at_once, waits
from lorax_kit.benchmarks.case import make_case
from lorax_kit.benchmarks.device import Row, device_rows, run_rows, shown
from lorax_kit.benchmarks.device.machine import held_bytes
from lorax_kit.benchmarks.timing import alternate
from lorax_kit.cli import cli, main
from lorax_kit.measure import traced_flops


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The rows that `bench device --small` prints, and the file that it leaves."""
    file = tmp_path_factory.mktemp("device") / "new" / "rows.jsonl"
    argv = ["bench", "device", "--small", "--no-peer", "--json", "--out", str(file)]
    with jax.numpy_dtype_promotion("standard"):
        found = CliRunner().invoke(cli, argv, catch_exceptions=False)
    assert found.exit_code == 0
    lines = found.stdout.splitlines()
    assert file.read_text().splitlines() == lines
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN and infinities are constants


def of(rows, kind):
    return [row for row in rows if row["row"] == kind]


def numbers(x):
    if isinstance(x, dict | list):
        for value in x.values() if isinstance(x, dict) else x:
            yield from numbers(value)
    elif isinstance(x, int | float):
        yield x


def test_rows_of_every_kind(small):
    kinds = [row["row"] for row in small]
    assert kinds == [
        *("environment", "step", "stacked", "memory", "form", "form", "calibrate", "step", "order", "forward", "end"),
    ]
    assert small[-1] == small[-1] | {"measured": len(small) - 1, "skipped_rows": 0}
    assert not [row for row in small if "skipped" in row]


def test_numbers_are_finite(small):
    for row in small:
        assert all(math.isfinite(x) for x in numbers(row)), row
        assert row["row"] in shown(row)
    times = [row["total_seconds"] for row in small]
    assert times == sorted(times)


def test_a_step_row_adds_up(small):
    assert [row["dtype"] for row in of(small, "step")] == ["bfloat16", "float32"]
    assert [row["precision"] for row in of(small, "step")] == ["bf16", "fp32"]
    for row in of(small, "step"):
        assert set(row["ratio"]) == set(row["ms"]) - {"ours"} >= {"full", "naive"}
        for name, (middle, low, high) in row["ratio"].items():
            assert low <= middle <= high, name
        for name, flops in row["flops"].items():
            rate = flops / row["ms"][name] / 1e9
            assert row["share_of_rate"][name] == pytest.approx(rate / row["rate_tflops"])
        assert row["extra_bytes"]["ours"] >= row["temp_bytes"]["ours"] > 0
        assert max(row["losses"].values()) - min(row["losses"].values()) < 1e-2
        assert sum(row["sites"].values()) == 6  # query, key, value, output, up, down of the one layer
        assert row["no_peer"] == "left out"
    assert set(of(small, "step")[1]["ms"]) == {"full", "naive", "ours", "factored"}


def test_stacked_rows_add_up(small):
    (row,), (memory,) = of(small, "stacked"), of(small, "memory")
    assert (row["trials"], row["ranks"]) == (memory["trials"], [1, 2, 4]) == (3, [1, 2, 4])
    assert row["ms_per_trial"] == pytest.approx(row["stacked_ms"] / 3)
    assert row["flops"] > row["solo_flops"]  # rows of zero up to the highest rank
    assert memory["estimate_over_xla"] == pytest.approx(memory["estimated_bytes"] / memory["xla_bytes"])
    assert 0.5 < memory["estimate_over_xla"] < 2


def test_forms_are_judged_by_what_was_measured(small):
    for row in of(small, "form"):
        assert row["shipped"] in ("factored", "merged")
        best = min(row["factored_ms"], row["merged_ms"])
        assert row["shipped_regret"] == row[f"{row['shipped']}_ms"] / best >= 1
    (costs,) = of(small, "calibrate")
    assert costs["worst_shipped_regret"] == max(row["shipped_regret"] for row in of(small, "form"))
    assert len(costs["choices"]) == 2


def test_orders_save_memory_and_change_no_product(small):
    (row,) = of(small, "order")
    assert set(row["ms"]) == {"ours", "no_recompute", "no_wait", "neither"}
    assert len(set(row["flops"].values())) == 1
    assert row["temp_bytes"]["ours"] < min(row["temp_bytes"][name] for name in ("no_recompute", "no_wait", "neither"))


def test_no_budget_skips_every_row_with_a_reason():
    rows = []
    planned = list(device_rows(small=True, peer=False))
    run_rows(planned, seconds=0, write=rows.append)
    assert [row["row"] for row in rows] == [*(row.kind for row in planned), "end"]
    assert all(row["skipped"] == "it would take about 1 s of the 0 s left" for row in rows[:-1])
    assert rows[-1] == rows[-1] | {"measured": 0, "skipped_rows": len(planned)}
    assert (rows[1]["width"], rows[1]["dtype"]) == (32, "bfloat16")  # a skipped row says which one


def test_the_full_rows_fit_their_budget():
    assert sum(row.seconds for row in device_rows()) <= 480
    assert {row.kind for row in device_rows()} == {"environment", "step", "stacked", "form", "order", "forward"}


def test_slower_rows_than_estimated_make_later_ones_not_begin():
    at, rows = [0.0], []

    def lasting(seconds):
        def measure():
            at[0] += seconds
            yield {"took": seconds}

        return measure

    planned = [Row("a", {}, 10, lasting(30)), Row("b", {"n": 1}, 20, lasting(20)), Row("c", {}, 5, lasting(5))]
    run_rows(planned, seconds=80, write=rows.append, clock=lambda: at[0])
    assert [row["row"] for row in rows] == ["a", "b", "c", "end"]
    assert rows[1] == {
        **{"row": "b", "n": 1, "skipped": "it would take about 60 s of the 50 s left"},
        **{"seconds": 0.0, "total_seconds": 30.0},
    }
    assert rows[2]["took"] == 5  # at a third of the pace it still fits
    assert rows[3] == {"row": "end", "measured": 2, "skipped_rows": 1, "total_seconds": 35.0}


def test_a_failing_row_says_why_and_others_follow():
    def fails():
        yield {"n": 1}
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmany lines")

    rows = []
    run_rows(
        [Row("a", {"n": 2}, 0, fails), Row("b", {}, 0, lambda: [{"n": 3}])],
        seconds=1,
        write=rows.append,
        clock=lambda: 0.0,
    )
    assert [row.get("n") for row in rows] == [1, 2, 3, None]
    assert rows[1]["skipped"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert rows[3] == rows[3] | {"measured": 2, "skipped_rows": 1}


def test_a_cut_run_has_written_its_rows():
    def cut():
        yield {"n": 1}
        raise KeyboardInterrupt

    rows = []
    with pytest.raises(KeyboardInterrupt):
        run_rows(
            [Row("a", {}, 0, lambda: [{"n": 0}]), Row("b", {}, 0, cut)], seconds=1, write=rows.append, clock=lambda: 0.0
        )
    assert [row["n"] for row in rows] == [0, 1]


def test_full_shapes_want_an_accelerator(capsys):
    with pytest.raises(SystemExit) as e:
        main(["bench", "device"])
    assert e.value.code == 2
    assert "JAX sees no accelerator here" in capsys.readouterr().err


class Counting:
    """A device whose memory is a number of bytes in use, the ballast of `held_bytes`, and the highest mark of both."""

    def __init__(self, in_use, mark, limit=1 << 20):
        self.in_use, self.mark, self.limit = in_use, mark, limit

    def memory_stats(self):
        used = self.in_use + sum(x.nbytes for x in jax.live_arrays() if x.dtype == jnp.uint8)
        self.mark = max(self.mark, used)
        return {"bytes_in_use": used, "peak_bytes_in_use": self.mark, "bytes_limit": self.limit}

    def calling(self, needs):
        def run():
            self.mark = max(self.mark, self.memory_stats()["bytes_in_use"] + needs)
            return jnp.zeros(())

        return run


@pytest.mark.parametrize(
    ("mark", "needs", "expected", "found"),
    [
        (5000, 500, 500, 500),  # far below the highest mark: memory is taken first
        (100, 500, 500, 500),  # it sets the mark by itself
        (5000, 460, 500, 460),  # less than expected, but not by a tenth
        (5000, 400, 500, None),
        (5000, 1 << 20, 1 << 20, None),  # does not fit
    ],
)
def test_held_bytes_are_what_a_call_adds(mark, needs, expected, found):
    device = Counting(100, mark)
    assert held_bytes(device.calling(needs), expected, device) == found


def test_a_device_that_does_not_count_tells_nothing():
    assert held_bytes(lambda: jnp.zeros(()), 10) is None  # the CPU of these tests


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("kernel", ["factored", "merged"])
def test_a_step_without_waits_is_the_same_step(kernel):
    case = make_case(width=64, layers=3, batch_size=8, length=64, rank=4, targets="all-linear")
    base, factors = lk.split(case.params, case.plan, jax.random.key(1))
    adapted = lk.adapt(case.apply, case.plan, kernel=kernel)
    tx = lk.partition(optax.adamw(1e-3), case.plan)
    init, step = lk.make_step(lambda b, f, x: case.loss(adapted(b, f, x), x), tx, jit=False)
    traced = {fn: jax.jit(fn).trace(init(factors), base, case.batch) for fn in (step, at_once(step))}
    assert [waits(t.jaxpr) > 0 for t in traced.values()] == [True, False]
    assert len({traced_flops(t.jaxpr) for t in traced.values()}) == 1
    (one, early), (other, late) = (
        (compiled(init(factors), base, case.batch)[1].loss, compiled.memory_analysis().temp_size_in_bytes)
        for compiled in (t.lower().compile() for t in traced.values())
    )
    assert float(one) == pytest.approx(float(other), rel=1e-6)
    assert early < 0.8 * late  # 8.3 MB against 12.1 MB, 9.3 MB against 13.3 MB


def test_short_calls_fill_their_turn(monkeypatch):
    calls = {"short": 0, "long": 0}
    at = [0.0]

    def run(name, seconds):
        calls[name] += 1
        at[0] += seconds

    monkeypatch.setattr("lorax_kit.benchmarks.timing.perf_counter", lambda: at[0])
    runs = {"short": lambda: run("short", 0.002), "long": lambda: run("long", 0.05)}
    times = alternate(runs, range(3), least_ms=20)
    assert calls == {"short": 2 + 3 * 10, "long": 2 + 3}
    assert times["short"] == pytest.approx([2, 2, 2])
    assert times["long"] == pytest.approx([50, 50, 50])
