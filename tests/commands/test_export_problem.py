"""`lorax-kit export` of adapters of a user's own problem, found by its address."""

import itertools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.cli import main
from lorax_kit.commands import Subject
from lorax_kit.commands.export.called import export_adapter
from lorax_kit.commands.export.options import Export
from lorax_kit.errors import ExportError
from lorax_kit.serve import load_stablehlo, load_tensors
from lorax_kit.serve.inputs import inputs_of
from tests import tiny


@lk.problem_builder
def regression():
    """Two outputs, one input whose rows the model counts: its program has fixed sizes."""

    def apply(params, batch):
        hidden = tiny.apply(params, batch)
        return {"mean": hidden[:, 0], "spread": jnp.reshape(hidden[:, 1], (16, -1))[:, 0]}

    def squares(outputs, batch):
        errors = (outputs["mean"] - batch.label.astype(jnp.float32)) ** 2 + outputs["spread"] ** 2
        return lk.Weighted(jnp.sum(errors), jnp.float32(errors.size))

    return lk.Problem(
        name="spread",
        params=tiny.params,
        apply=apply,
        loss=squares,
        head=tiny.HEAD,
        train=tiny.stream,
        val=[tiny.points(1, 16)],
        test=[tiny.points(2, 16)],
    )


def adapter_of(problem, folder):
    rows = lk.run(tiny.study(rank=2, seed=0, steps=2, probe_lr=()), problem, out=folder, progress=False).rows
    return folder / rows[0]["adapter"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return adapter_of(lk.problem_at("tests.tiny:built"), tmp_path_factory.mktemp("own") / "run")


def test_a_users_own_model_is_exported_and_measured(adapter, tmp_path, capsys):
    for form in ("safetensors", "stablehlo"):
        main(["export", str(adapter), "--format", form, "--rounds", "1", "--out", str(tmp_path / form), "--json"])
        row = json.loads(capsys.readouterr().out)
        assert set(row["files"]) == {"export.json", row["file"]}
        assert row["sizes"] == {"x": ["batch", tiny.WIDTH]}
        assert (row["metric"], row["examples"], row["agreement"]) == ("accuracy", 74, None)
        assert row["accuracy"] == row["accuracy_jax"] == row["accuracy_merged"]
        assert row["max_difference"] <= 1e-6
        assert row["latency_ms"] > 0
    x = tiny.points(5, 3).x
    merged = load_tensors(tmp_path / "safetensors" / "model.safetensors")
    (found,) = load_stablehlo(tmp_path / "stablehlo" / "model.stablehlo")(x)
    np.testing.assert_allclose(found, tiny.apply(merged, tiny.points(5, 3)), atol=1e-6)


def test_several_outputs_and_fixed_sizes_are_told(tmp_path, capsys):
    adapter = adapter_of(lk.problem_at("tests.commands.test_export_problem:regression"), tmp_path / "run")
    main(["export", str(adapter), "--format", "stablehlo", "--rounds", "0", "--out", str(tmp_path / "out")])
    assert f"inputs: x (16, {tiny.WIDTH})" in capsys.readouterr().out
    document = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (document["problem"], document["inputs"]) == ("spread", ["x"])
    assert document["measured"]["loss"] == document["measured"]["loss_jax"]


@pytest.mark.interop
def test_a_users_own_model_runs_in_the_runtime(adapter, tmp_path):
    row = export_adapter(adapter, tmp_path / "onnx", Export(form="onnx", rounds=0), progress=False)
    assert row["max_difference"] <= 1e-5
    assert row["accuracy"] == row["accuracy_jax"]


def measured(tmp_path, **changes):
    problem = tiny.problem(**changes)
    adapter = adapter_of(problem, tmp_path / "run")
    subject = Subject(problem=problem, params=problem.params(jax.random.key(0)), targets=("up/kernel",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorax_kit.commands.export.called.subject_of", lambda *_, **__: subject)
        return export_adapter(adapter, tmp_path / "out", Export(form="stablehlo", rounds=0), progress=False)


def test_a_batch_of_another_structure_is_refused(tmp_path):
    class Masked(NamedTuple):
        mask: object
        x: object
        label: object

    def of(seed, mask):
        return Masked(mask, *tiny.points(seed, 8))

    with pytest.raises(ExportError, match="a batch has another structure than the first"):
        measured(tmp_path, test=[of(2, None), of(3, np.ones((8, tiny.WIDTH), np.float32))])
    assert not (tmp_path / "out").exists()


def test_numbers_wide_arrays_and_masked_outputs_are_exported(tmp_path):
    class Warm(NamedTuple):
        warmth: float
        x: object
        label: object

    def apply(params, batch):
        logits = tiny.apply(params, tiny.Points(batch.x.astype(jnp.float32), batch.label)) * batch.warmth
        return jnp.concatenate([logits, jnp.full_like(logits[:, :1], -jnp.inf)], axis=-1)

    def of(seed, warmth):
        points = tiny.points(seed, 8)
        return Warm(warmth, points.x.astype(np.float64), points.label)

    def stream(seed, start):
        return (of(seed + step, 1.0) for step in itertools.count(start))

    row = measured(tmp_path, apply=apply, train=stream, val=[of(1, 1.0)], test=[of(2, 1.0), of(3, 50.0)])
    assert row["sizes"] == {"warmth": [], "x": ["batch", tiny.WIDTH]}
    assert row["max_difference"] <= 1e-4
    assert row["accuracy"] == row["accuracy_jax"]


def test_inputs_are_what_the_model_reads():
    batch = {"ids": jnp.ones((2, 5), jnp.int32), "mask": jnp.ones((2, 5)), "label": jnp.ones(2), "name": None}
    embedding = jnp.ones((4, 3))
    found = inputs_of(lambda p, b: (p[b["ids"]] * b["mask"][..., None]).sum(1), embedding, batch)
    assert found.sizes() == {"ids": ["batch", "length"], "mask": ["batch", "length"]}
    inner = inputs_of(jax.jit(lambda p, b: p[b["ids"]]), embedding, batch)  # through a program of its own
    assert list(inner.shapes) == ["ids"]
    positions = inputs_of(lambda p, b: p[b["ids"]] + jnp.ones((1, 5, 1)), embedding, batch)
    assert positions.sizes() == {"ids": ["batch", 5]}
    assert inputs_of(lambda p, x: x * p, 2.0, jnp.ones(3)).sizes() == {"x": ["batch"]}
    with pytest.raises(ExportError, match="reads no array"):
        inputs_of(lambda p, b: p, embedding, batch)
    with pytest.raises(ExportError, match="two arrays of a batch are named 'a_b'"):
        inputs_of(lambda p, b: b["a"]["b"] + b["a_b"], embedding, {"a": {"b": jnp.ones(2)}, "a_b": jnp.ones(2)})
    with pytest.raises(ExportError, match="cannot be exported: ZeroDivisionError"):
        inputs_of(lambda p, b: 1 / 0, embedding, batch)
