"""The benchmarks run end to end at tiny sizes; what they say of time is never tested."""

import json

import pytest

from lorax_kit.benchmarks import bench_forward, bench_grid, bench_methods, calibrate
from lorax_kit.benchmarks.calibrate import calibration_table
from lorax_kit.benchmarks.case import make_case
from lorax_kit.errors import PlanError, SpecError
from lorax_kit.transform import Costs
from lorax_kit.transform.cost import Facts, Product, choose


@pytest.mark.usefixtures("standard_promotion")
def test_a_grid_leaves_its_table_and_plots(tmp_path):
    (row,) = bench_grid(tmp_path, rounds=2, grid=[(32, 1, 2, 12, 2, "all-linear")], peer=False, progress=False)
    assert json.loads((tmp_path / "steps.json").read_text()) == [row]
    assert (tmp_path / "steps.csv").read_text().startswith("width,layers,tokens,rank,targets,full_ms,naive_ms,ours_ms")
    for name in ("steps", "roofline"):
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert row["peft_ms"] is row["ratio_peft"] is None
    assert row["spread_best"][0] <= row["ratio_best"] <= row["spread_best"][1]
    assert row["of_peak"] == pytest.approx(row["ours_flops"] / row["ours_ms"] / 1e6 / row["peak_gflops"])
    assert row["flops_ratio"] < 1


def test_a_compressed_forward_pass_has_fewer_flops():
    case = make_case(width=64, layers=1, batch_size=2, length=16, rank=1, targets="all-linear")
    row = bench_forward(case, keep=0.5, rounds=2, progress=False)
    assert (row["width"], row["layers"], row["batch_size"], row["length"], row["tokens"]) == (64, 1, 2, 16, 32)
    assert 0.4 < row["keep"] <= 0.5
    assert row["flops_ratio"] < 0.8
    assert row["spread"][0] <= row["latency_ratio"] <= row["spread"][1]


def test_calibration_is_a_file_that_adapt_reads(tmp_path):
    found = calibrate(rounds=2, shapes=[(16, 8, 8), (64, 8, 16), (8, 16, 32)], ranks=[1, 4], progress=False)
    (tmp_path / "costs.json").write_text(json.dumps(found))
    costs = Costs.read(tmp_path / "costs.json")
    assert (list(costs.activation), list(costs.weight)) == (found["activation"], found["weight"])
    assert len(found["shapes"]) == 6
    assert found["worst_regret"] == max(row["regret"] for row in found["shapes"]) >= 1
    assert "regret" in calibration_table(found)


def test_the_choice_follows_the_costs():
    shape = Product(1, 1024, 384, 384, 8)
    assert choose(shape, Costs())[0] == "merged"  # 2 K N <= M (K + N)
    assert choose(shape, Costs(weight=(3.0, 0.0)))[0] == "factored"
    assert choose(shape, Costs(weight=(1.0, 0.5), activation=(1.0, 0.0)))[0] == "factored"
    assert choose(shape, Costs(), Facts(trials=8))[0] == "factored"
    assert choose(shape._replace(tokens=64), Costs())[0] == "factored"


@pytest.mark.parametrize(
    "text", ["no json", "[]", "{}", '{"activation": [1], "weight": [1, 2], "device": ""}', '{"activation": 3}']
)
def test_costs_that_are_none(tmp_path, text):
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(PlanError, match="holds no costs"):
        Costs.read(tmp_path / "costs.json")


@pytest.mark.parametrize("value", ["-1", "1e999", "NaN"])
def test_costs_that_cannot_be(tmp_path, value):
    (tmp_path / "costs.json").write_text(f'{{"activation": [1, {value}], "weight": [1, 2], "device": ""}}')
    with pytest.raises(PlanError, match="at least 0"):
        Costs.read(tmp_path / "costs.json")


@pytest.mark.usefixtures("standard_promotion")
def test_methods_are_timed_beside_lora():
    sizes = {"width": 32, "layers": 1, "batch_size": 2, "length": 8, "rank": 2, "targets": "qv", "rounds": 2}
    rows = bench_methods(**sizes, names=["ia3", "miss"], progress=False)
    assert [row["method"] for row in rows] == ["lora", "miss", "ia3"]
    head = 2 * 32 + 2
    assert [row["trained"] - head for row in rows] == [2 * 2 * (32 + 32), 2 * 2 * 32, 2 * 32]
    assert rows[0]["ratio"] == rows[0]["flops_ratio"] == rows[0]["temp_ratio"] == 1
    with pytest.raises(SpecError, match="method 'lorra' is not timed; choose from lora, lora_fa"):
        bench_methods(**sizes, names=["lorra"])
