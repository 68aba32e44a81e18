"""Compression of a user's own problem: any metric, with and without places, layers and students."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.checkpoint.adapter import read_meta
from lorax_kit.cli import main
from lorax_kit.commands import Healing, Recipe, compress_subject, subject_of
from lorax_kit.compress import CompressError

QUIET = {"rounds": 0, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    out = tmp_path_factory.mktemp("own") / "o"
    argv = ["--problem", "tests.tiny:built", "--target", "{up,down}/kernel", "--rank", "2", "--lr", "0.01"]
    with jax.numpy_dtype_promotion("standard"):
        main(["train", *argv, "--epochs", "1", "--steps-per-epoch", "20", "--out", str(out), "--json"])
    return out


def test_what_an_adapter_adapted_is_compressed_and_judged_by_its_problem(adapter, capsys):
    subject = subject_of(adapter)
    assert {site.path for site in subject.sites.sites} == {"up/kernel", "down/kernel"}
    row, small = compress_subject(subject, Recipe(method="whitened", keep=0.6, batches=4), **QUIET)
    assert row["metric"] == "accuracy"
    assert row["agreement_after"] is None  # the problem says of no places
    outputs = [np.asarray(small.apply(small.params, batch)) for batch in subject.test]
    right = sum((y.argmax(-1) == batch.label).sum() for y, batch in zip(outputs, subject.test, strict=True))
    assert row["metric_after"] == pytest.approx(right / 74)
    capsys.readouterr()
    argv = ["--method", "svd", "--keep", "0.6", "--rounds", "0", "--batches", "4", "--target", "up/kernel", "--json"]
    main(["compress", str(adapter), *argv])
    assert json.loads(capsys.readouterr().out)["params"] < 8 * 9 + 9 * 8 + 6 * 8 + 8 * 2 + 2
    with pytest.raises(CompressError, match="problem 'points' makes no students"):
        compress_subject(subject, Recipe(method="student"), **QUIET)


def test_healing_learns_from_places_where_a_problem_says_of_them(adapter):
    from dataclasses import replace

    subject = subject_of(adapter)
    problem = replace(subject.problem, places=lambda batch: np.ones(len(batch.label), np.float32))
    healing = Healing(steps=30, rank=None, lr=1e-2)
    row, _ = compress_subject(replace(subject, problem=problem), Recipe(method="svd", keep=0.4), healing, **QUIET)
    assert 0 <= row["agreement_after"] <= 1
    assert row["agreement_healed"] >= row["agreement_after"]


def test_a_regression_is_compressed_by_its_error(adapter):
    from tests.problem.test_problems import regression

    subject = subject_of(adapter)
    from lorax_kit.commands import Subject

    own = Subject(problem=regression(), params=subject.params, targets=("up/kernel",))
    row, small = compress_subject(own, Recipe(method="svd"), **QUIET)
    y = np.concatenate([b.x[:, 0] * b.x[:, 1] for b in own.test])
    outputs = np.concatenate([small.apply(small.params, b)[:, 0] for b in own.test])
    assert row["metric"] == "mse"
    assert row["metric_after"] == pytest.approx(np.mean((outputs - y) ** 2), rel=1e-5)
    assert isinstance(lk.Metric("mse", better="lower").sign, int)


OWN_METHOD = """
from lorax_kit import Method, Update, register, problem_builder, RankSetting
from lorax_kit.methods import Factors
import lorax_kit as lk, dataclasses, jax
from tests import tiny

@dataclasses.dataclass(frozen=True, kw_only=True)
class Half(RankSetting):
    kind = "half"

def init(site, w, key, hints):
    a = jax.random.normal(lk.site_key(key, site.path), site.a_shape) / len(w)
    return Factors(a, jax.numpy.zeros(site.b_shape))

register(Method(setting=Half, leaves=Factors, init=init, update=lambda site, w, x, s: Update(a=x.a, b=x.b / 2)))

@problem_builder
def built(rows=32):
    return tiny.built(rows)
"""


def test_commands_know_the_methods_that_the_module_of_a_problem_registers(tmp_path):
    (tmp_path / "own_half.py").write_text(OWN_METHOD)
    argv = ["--problem", "own_half:built", "--variant", "half", "--target", "up/kernel", "--rank", "2", "--lr", "0.01"]
    train = ["train", *argv, "--epochs", "1", "--steps-per-epoch", "2", "--with", "rows=40", "--out", "t", "--json"]
    study = {"variant": ["lora", "half"], "alpha": None, "rank": [2], "lr": 0.01, "seed": [0], "steps": 2}
    config = {"problem": {"address": "own_half:built"}, "study": {**study, "targets": {"up": ["up/kernel"]}}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    code = f"""
from lorax_kit.checkpoint.adapter import read_meta
from lorax_kit.cli import main
main({train!r})
main(["evaluate", "t", "--json"])
main(["study", "--config", "c.json", "--out", "s", "--json"])
"""
    # Each as in a process of its own, in which nothing has registered the method.
    compress = ["compress", "t", "--method", "svd", "--keep", "0.5", "--rounds", "0", "--batches", "2", "--out", "c"]
    export = ["export", "t", "--format", "stablehlo", "--rounds", "1", "--out", "e"]
    after = f"""
import sys
from lorax_kit.cli import main
from lorax_kit.core.method import METHODS
for argv in (["inspect", "t"], {export!r}, {compress!r}, ["evaluate", "c"], ["evaluate", "t"]):
    METHODS.pop("half", None)
    sys.modules.pop("own_half", None)
    main(argv)
"""
    env = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{tmp_path}"}
    for step in (code, after):
        call = [sys.executable, "-c", step]
        ran = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert ran.returncode == 0, ran.stderr
    assert "74 examples" in ran.stdout
    assert "up/kernel: kind half" in ran.stdout
    assert read_meta(tmp_path / "t/adapter")["settings"] == {"rows": 40}
