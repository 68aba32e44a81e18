"""The benchmark of mixed batches, on sizes that take no time."""

from lorax_kit.benchmarks import MIXED_COLUMNS, bench_mixed, table


def test_a_row_without_the_peer(standard_promotion):
    sizes = {"width": 32, "layers": 1, "rows": 3, "length": 4}
    row = bench_mixed(**sizes, targets="qv", rounds=2, ranks=(1, 3), peer=False, progress=False)
    assert row["worst"] < 1e-5
    assert row["spread"][0] <= row["mixed_ratio"] <= row["spread"][1]
    assert row["peft_mixed_ms"] is None
    assert len(table([row], MIXED_COLUMNS).splitlines()) == 2
