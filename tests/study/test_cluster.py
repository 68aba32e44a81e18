"""A study on the workers of a real Ray cluster of this machine: the rows of one process, whatever is killed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest

import lorax_kit as lk
from lorax_kit.study.running import cluster
from lorax_kit.study.running.cluster import Workers
from tests import tiny

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("standard_promotion")]
ray = pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def local_cluster():
    """One cluster for all tests, with room for four workers."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ray.init(
        num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.2", logging_level="error",
        runtime_env={"env_vars": env}, log_to_driver=False,
    )  # fmt: skip
    yield
    ray.shutdown()


def run(out, problem=None, study=None, **options):
    study = study or tiny.study(eval_every=6)
    return lk.run(study, problem or tiny.problem(), out=out, progress=False, **options)


def measured(results):
    skip = ("train_seconds", "compiles", "adapter_bytes")
    return [{k: v for k, v in row.items() if k not in skip} for row in results.rows]


def dying(folder, times, step=4):
    """Batches of which one kills the process that reads it, `times` times in all; never the driver."""
    driver = os.getpid()

    def stream(seed, start):
        for number, batch in enumerate(tiny.stream(seed, start), start):
            if os.getpid() != driver and number == step:
                for i in range(times):
                    try:
                        (folder / f"killed_{i}").touch(exist_ok=False)
                    except FileExistsError:
                        continue
                    os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    return tiny.problem(train=stream)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return run(tmp_path_factory.mktemp("cluster") / "whole", workers=3)


def test_three_workers_have_the_rows_of_one_process(whole, tmp_path):
    alone = run(tmp_path / "alone")
    info = json.loads((whole.path / "study.json").read_text())
    assert [group["trials"] for group in sorted(info["groups"], key=lambda g: -g["trials"])] == [3, 3, 2]
    for ours, theirs in zip(whole.rows, alone.rows, strict=True):
        assert ours["trial"] == theirs["trial"]
        for name in ("train_loss", "val_loss", "test_loss", "val_accuracy"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (ours["trial"], name)
        base = tiny.params(jax.random.fold_in(jax.random.key(ours["seed"]), 0))
        assert lk.load_adapter(whole.path / ours["adapter"], base=base).meta["trial"] == ours["trial"]
    for name in ("curves.jsonl", "spectra.jsonl"):
        ours, theirs = (sorted((f.path / name).read_text().splitlines()) for f in (whole, alone))
        assert len(ours) == len(theirs)


@pytest.mark.parametrize("times", [1, 2])
def test_lost_workers_lose_nothing(whole, tmp_path, times, capfd):
    killed = run(tmp_path / "run", dying(tmp_path, times), workers=3)
    assert len(list(tmp_path.glob("killed_*"))) == times
    assert measured(killed) == measured(whole)
    assert capfd.readouterr().err.count("was lost; it begins anew") == times


def test_a_group_that_always_loses_its_worker_ends_the_study_and_the_rest_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "LOSSES", 1)
    with pytest.raises(lk.StudyError, match=r"were lost 2 times"):
        run(tmp_path / "run", dying(tmp_path, 100), workers=2)
    again = run(tmp_path / "run", workers=2)
    assert all(row["status"] == "done" for row in again.rows)


def test_an_interrupted_study_on_workers_goes_on_here_and_with_more(whole, tmp_path):
    """The groups are those of the first call, whoever goes on."""

    def stream(seed, start):
        for number, batch in enumerate(tiny.stream(seed, start), start):
            if number == 4 and Path(tmp_path / "stop").exists():
                raise ValueError("no more data")
            yield batch

    problem = tiny.problem(train=stream)
    (tmp_path / "stop").touch()
    with pytest.raises(ValueError, match="no more data"):
        run(tmp_path / "run", problem, workers=3)
    (tmp_path / "stop").unlink()
    assert measured(run(tmp_path / "run", problem)) == measured(whole)


def test_a_group_that_was_under_way_here_goes_on_on_a_worker(whole, tmp_path):
    driver, counted = os.getpid(), tmp_path / "counted"
    counted.mkdir()

    def stream(seed, start):
        for number, batch in enumerate(tiny.stream(seed, start), start):
            if os.getpid() == driver and number == 12 and not (tmp_path / "run" / "training.npz").exists():
                raise KeyboardInterrupt
            if os.getpid() != driver:
                (counted / str(number)).touch()
            yield batch

    problem = tiny.problem(train=stream)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", problem)
    assert (tmp_path / "run" / "training.npz").exists()
    rows = run(tmp_path / "run", problem, workers=1).rows
    assert min(int(p.name) for p in counted.iterdir()) == 12
    assert not (tmp_path / "run" / "training.npz").exists()
    for ours, theirs in zip(rows, whole.rows, strict=True):
        assert ours["test_loss"] == pytest.approx(theirs["test_loss"], abs=1e-5)


def test_a_race_on_workers_decides_as_one_here(tmp_path):
    study = tiny.study(steps=16, stop=lk.Halving(first=4), lr=[1e-4, 1e-3, 1e-2], rank=[1, 2], probe_lr=())
    one, two = (run(tmp_path / name, study=study, **more) for name, more in (("a", {}), ("b", {"workers": 2})))
    assert [row["status"] for row in one.rows] == [row["status"] for row in two.rows]
    assert "stopped" in {row["status"] for row in one.rows}
    for ours, theirs in zip(two.rows, one.rows, strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-5)


def test_what_workers_cannot_be_is_said(tmp_path):
    with pytest.raises(lk.StudyError, match="workers need 40 CPUs; the cluster has 4"):
        run(tmp_path / "run", workers=40)
    with pytest.raises(lk.StudyError, match="give workers= or mesh=, not both"):
        run(tmp_path / "run", workers=2, mesh=lk.study_mesh(1, 1))
    with pytest.raises(lk.StudyError, match="an integer of at least 1"):
        Workers(0)
    with pytest.raises(lk.StudyError, match="above 1 it must be a whole number"):
        Workers(2, gpus=1.5)
    lock = __import__("threading").Lock()
    with pytest.raises(lk.StudyError, match="cannot be sent to workers"):
        run(
            tmp_path / "run",
            tiny.problem(loss=lambda logits, batch: (lock, tiny.losses(logits, batch).mean())[1]),
            workers=2,
        )
    assert not (tmp_path / "run").exists()


SCRIPT = """
import sys, jax
import lorax_kit as lk
from tests import tiny
with jax.numpy_dtype_promotion("standard"):
    lk.run(tiny.study(), tiny.problem(), out=sys.argv[1], progress=False, workers=lk.Workers(2, cpus=0.5))
import ray
print("ended", not ray.is_initialized())
"""


def test_without_a_cluster_one_is_begun_here_and_ended(tmp_path):
    argv = [sys.executable, "-c", SCRIPT, str(tmp_path / "run")]
    with tempfile.TemporaryDirectory(dir="/tmp") as short:  # the path of a socket has at most 107 bytes
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": short}
        done = subprocess.run(argv, env=env, text=True, capture_output=True, timeout=240, cwd=tmp_path)
        left = list(Path(short).glob("lorax-kit-*"))
    assert done.returncode == 0, done.stderr
    assert "ended True" in done.stdout
    assert "os.fork" not in done.stderr
    assert len((tmp_path / "run" / "trials.jsonl").read_text().splitlines()) == 8
    assert not left


def test_an_address_where_nothing_is_is_named(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(lk.StudyError, match=r"RAY_ADDRESS='127.0.0.1:1' cannot be reached: ConnectionRefusedError"):
        cluster.begin(ray, Workers(1))
