"""Compression of a user's own problem: any metric, with and without places, layers and students."""

import json

import jax
import numpy as np
import pytest

import lorax_kit as lk
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
