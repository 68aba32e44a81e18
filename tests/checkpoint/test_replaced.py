"""What another process replaces while it is read: the old or the new, never some of both."""

import importlib
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.errors import AdapterError
from lorax_kit.files import reading
from lorax_kit.files.reading import read_whole

ADAPTER = importlib.import_module("lorax_kit.checkpoint.adapter")
PARAMS = {"w": np.ones((4, 3), np.float32)}
PLAN = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), PARAMS, lambda p, x: x @ p["w"], jnp.ones((5, 4)))
FACTORS = lk.split(PARAMS, PLAN, jax.random.key(0))[1]
NAMES = {"w": "w.weight"}


def save(path, number):
    factors = jax.tree.map(lambda x: np.full(x.shape, number, np.float32), FACTORS)
    lk.save_adapter(path, PLAN, factors, base=PARAMS, meta={"number": number}, overwrite=True)


def test_an_adapter_replaced_between_its_document_and_its_arrays(tmp_path, monkeypatch):
    save(tmp_path / "a", 1)
    read, calls = ADAPTER.read_arrays, []

    def late(path, shapes):
        calls.append(1)
        if len(calls) == 1:
            save(tmp_path / "a", 2)
        return read(path, shapes)

    monkeypatch.setattr(ADAPTER, "read_arrays", late)
    found = lk.load_adapter(tmp_path / "a", base=PARAMS)
    assert found.meta == {"number": 2}
    assert {float(x) for leaf in jax.tree.leaves(found.factors) for x in np.unique(leaf)} == {2.0}
    assert len(calls) == 2


def test_a_peft_folder_replaced_between_its_config_and_its_weights(tmp_path, monkeypatch):
    load = importlib.import_module("lorax_kit.peft.load")
    read, calls = load.read_weights, []

    def written(rank):
        plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=rank)}), PARAMS)
        lk.save_peft(
            tmp_path / "a", plan, lk.split(PARAMS, plan, jax.random.key(0))[1], base=PARAMS, names=NAMES, overwrite=True
        )

    def late(path):
        calls.append(1)
        if len(calls) == 1:
            written(1)
        return read(path)

    written(2)
    monkeypatch.setattr(load, "read_weights", late)
    assert lk.load_peft(tmp_path / "a", base=PARAMS, names=NAMES).plan.site("w").rank == 1


def test_a_folder_on_its_way_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("new")
    away = tmp_path / ".a.abcdefgh.staged" / "replaced"
    away.mkdir(parents=True)
    (away / "a").mkdir()
    (tmp_path / "a").rename(away.parent / "written")
    monkeypatch.setattr(reading, "clear_stale", lambda parent: None)  # its writer lives
    writer = threading.Thread(target=lambda: (time.sleep(0.1), (away.parent / "written").rename(tmp_path / "a")))
    writer.start()
    assert read_whole(lambda path: (path / "x").read_text())(tmp_path / "a") == "new"
    writer.join()


def test_errors_of_what_stays_are_raised_once_and_of_what_changes_not(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("0")
    calls = []

    @read_whole
    def wrong(path):
        calls.append(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        wrong(tmp_path / "a")
    assert len(calls) == 1

    @read_whole
    def changing(path):
        other = path.with_name("b")
        other.write_text("1")
        other.replace(path)
        raise ValueError("a part of each")

    monkeypatch.setattr(reading, "TRIES", 3)
    with pytest.raises(AdapterError, match="is replaced again and again while it is read"):
        changing(tmp_path / "a")


def test_a_loaded_adapter_goes_where_its_base_lies(tmp_path):
    save(tmp_path / "a", 1)
    mesh = lk.training_mesh(fsdp=2)
    base = lk.place(PARAMS, lk.layout(PARAMS, mesh, smallest=1))
    found = lk.load_adapter(tmp_path / "a", base=base)
    x = jnp.ones((5, 4))
    merged = lk.merge(base, found.factors, found.plan)
    ours = jax.jit(lk.adapt(lambda p, x: x @ p["w"], PLAN))(base, found.factors, x)
    np.testing.assert_allclose(ours, x @ np.asarray(merged["w"]), rtol=1e-6)


def test_the_path_may_be_given_by_its_name(tmp_path):
    save(tmp_path / "a", 3)
    assert lk.load_adapter(base=PARAMS, path=tmp_path / "a").plan == PLAN
    assert read_whole(lambda file, more: (file, more))(more=1, file=tmp_path) == (tmp_path, 1)
    with pytest.raises(TypeError, match="missing a required argument: 'path'"):
        lk.load_adapter(base=PARAMS)
