"""`lorax-kit study` and `evaluate` on a user's own problem, by its address."""

import json

import jax
import pytest

from lorax_kit.cli import main
from tests import tiny

DESIGN = {"rank": [1, 2], "alpha": 8, "lr": 1e-2, "seed": [0, 1], "targets": tiny.TARGETS, "steps": 4, "probe_lr": 3e-2}


@pytest.fixture(scope="module", autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def call(capsys, *argv):
    main([str(x) for x in argv])
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"problem": {"address": "tests.tiny:built", "rows": 48}, "study": DESIGN}))
    return file


def test_a_users_own_problem_is_planned_studied_grown_and_evaluated(config, tmp_path, capsys):
    out = tmp_path / "run"
    planned = call(capsys, "study", "--config", config, "--out", out, "--dry-run", "--json")
    assert not out.exists()
    (program,) = planned["programs"]
    assert (program["trials"], program["groups"], program["ranks"]) == (6, [6], [0, 1, 2])
    head = 8 * 2 + 2
    assert program["params"] == [head, head + 2 * (8 + 9 + 9 + 8)]
    # By hand: forward, and backward but for the weights of the frozen layers; rank 2 in every trial's products.
    assert program["flops_per_step"] > 6 * 2 * 16 * (8 * 9 + 9 * 8 + 8 * 2) * 1.5
    assert planned["expected_seconds"] > 0
    shared = call(capsys, "study", "--config", config, "--out", out, "--dry-run", "--json", "--workers", 4)
    assert shared["budget_bytes"] < 0.5 * planned["budget_bytes"]  # workers on CPUs share this machine's memory
    made = call(capsys, "study", "--config", config, "--out", out, "--json")
    assert [row["trial"] for row in made["rows"]] == planned["trials"]
    again = call(capsys, "study", "--config", config, "--out", out, "--dry-run", "--json", "--seeds", 3)
    assert again["trials"] == ["r1_a8_lr0.01_upper_s2", "r2_a8_lr0.01_upper_s2", "probe_lr0.03_s2"]
    grown = call(capsys, "study", "--config", config, "--out", out, "--json", "--seeds", 3)
    assert len(grown["rows"]) == 9
    row = grown["rows"][0]
    measured = call(capsys, "evaluate", out / row["adapter"], "--json")
    assert (measured["test_accuracy"], measured["test_loss"]) == (row["test_accuracy"], row["test_loss"])
    assert call(capsys, "evaluate", out / row["adapter"], "--problem", "tests.tiny:built", "--json") == measured


BAD = [
    ({"problem": "tests.tiny:nothing"}, "the problem at 'tests.tiny:nothing' cannot be imported"),
    ({"problem": "tests.tiny"}, "problem address 'tests.tiny' must be 'module:object'"),
    ({"problem": "tests.tiny:unmarked"}, "is neither an lk.Problem nor a function marked to build one"),
    ({"problem": "os:system"}, "is neither an lk.Problem nor a function marked to build one"),
    ({"problem": {"address": "tests.tiny:built", "row": 3}}, "does not take these settings"),
    ({"problem": {"name": "translation"}}, "problem 'translation' is unknown; choose from sentiment, plays"),
    ({"problem": 3}, "a problem must be an object or 'module:object', not int"),
]


@pytest.mark.parametrize(("changes", "says"), BAD, ids=[says[:30] for _, says in BAD])
def test_addresses_that_lead_nowhere_say_so(changes, says, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"problem": {}, "study": DESIGN} | changes))
    with pytest.raises(SystemExit) as e:
        main(["study", "--config", str(file), "--out", str(tmp_path / "run")])
    assert e.value.code == 2
    message = capsys.readouterr().err
    assert says in message
    assert len([line for line in message.splitlines() if line.startswith("lorax-kit: ")]) == 1
    assert not (tmp_path / "run").exists()


def test_one_adapter_of_a_users_own_problem_is_trained_and_evaluated(tmp_path, capsys):
    argv = ["--problem", "tests.tiny:built", "--target", "up/kernel", "--epochs", 2, "--steps-per-epoch", 3]
    made = call(capsys, "train", *argv, "--rank", 2, "--lr", 0.01, "--out", tmp_path / "o", "--json")
    measured = call(capsys, "evaluate", tmp_path / "o", "--json")
    assert measured["test_loss"] == pytest.approx(made["test_loss"], abs=1e-6)
    assert measured["test_accuracy"] == made["test_accuracy"]
    with pytest.raises(SystemExit):
        main(["train", *map(str, argv), "--model", "minilm", "--out", str(tmp_path / "p")])
    assert "--model goes with --task or film reviews" in capsys.readouterr().err
