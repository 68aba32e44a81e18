"""`bench decode` on a tiny decoder: what its rows hold, and that both sides write the same tokens."""

import json

import pytest

from lorax_kit.benchmarks import bench_decode
from lorax_kit.cli import main
from tests.models.llama_files import write_folder

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    write_folder(folder, max_position_embeddings=64)
    return folder


def printed(capsys, *argv):
    main(["bench", "decode", *map(str, argv), "--rounds", "2", "--new", "4", "--json"])
    return json.loads(capsys.readouterr().out)


def test_rows_have_the_contract_columns_and_no_ratio_without_a_peer(folder, capsys):
    rows = printed(capsys, "--model", folder, "--no-peer")
    assert [row["batch"] for row in rows] == [1, 8]
    for row in rows:
        assert {"ours_tokens_s", "torch_tokens_s", "ratio", "compile_s", "prompt"} <= set(row)
        assert (row["torch_tokens_s"], row["ratio"], row["same_tokens"]) == (None, None, None)
        assert row["ours_tokens_s"] > 0


def test_the_mixed_row_is_consistent_with_itself(folder, capsys):
    (row,) = printed(capsys, "--model", folder, "--mixed")
    assert (row["batch"], row["adapters"], row["new"]) == (32, 32, 4)
    low, high = row["spread"]
    assert low <= row["time_ratio"] <= high
    assert min(row["one_tokens_s"], row["mixed_tokens_s"]) > 0


@pytest.mark.interop
def test_torch_writes_the_same_tokens(folder):
    pytest.importorskip("transformers")
    rows = bench_decode(model=str(folder), prompt=6, new=32, rounds=2, progress=False)
    assert [row["same_tokens"] for row in rows] == [True, True]
    for row in rows:
        assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
