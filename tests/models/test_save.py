"""What `save_model` writes and refuses; that transformers reads it is in test_families_interop.py."""

import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.models import fresh_head, load_model, save_model
from tests.models.test_families import copied


def test_params_that_were_merged_are_saved_in_place_of_the_models_own(tmp_path):
    loaded = load_model(copied("gpt2", tmp_path / "x"))
    moved = jax.tree.map(lambda x: x + 1, loaded.params)
    save_model(tmp_path / "new" / "deep", loaded, moved)
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "new" / "deep").params, moved)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["deep"]  # nothing of the staging is left


SAVES = [
    (lambda loaded: (replace(loaded, heads=loaded.heads | {"answer": {}}), None), "heads answer, classify; a folder"),
    (
        lambda loaded: (replace(loaded, heads={"classify": fresh_head(12, 3, jax.random.key(0))}), None),
        "has output/bias, output/kernel; that of a bert in transformers has dense/bias, dense/kernel, output/bias, ",
    ),
    (lambda loaded: (replace(loaded, labels=("a",)), None), "has 3 outputs, the labels are ('a',): one for each"),
    (
        lambda loaded: (loaded, {**loaded.params, "more": np.zeros(2)}),
        "the params have a 'more', unlike the model's own",
    ),
    (
        lambda loaded: (loaded, {k: x for k, x in loaded.params.items() if k != "layer_1"}),
        "the params have no 'layer_1/attention/key/bias'",
    ),
    (
        lambda loaded: (loaded, jax.tree.map(lambda x: x[:1], loaded.params)),
        "'embeddings/norm/bias' has shape (1,), the model's own has (12,)",
    ),
    (
        lambda loaded: (loaded, lk.quantize(loaded.params, ["**/up/kernel"], "int8")),
        "is a Quantised, not an array: restore it before it is saved",
    ),
]


@pytest.mark.parametrize(("change", "says"), SAVES)
def test_what_cannot_be_saved_leaves_nothing(tmp_path, change, says):
    loaded, params = change(load_model(copied("bert", tmp_path / "x")))
    with pytest.raises(ValueError, match=re.escape(says)):
        save_model(tmp_path / "new", loaded, params)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_exists_is_not_replaced_and_a_failed_write_leaves_none(tmp_path, monkeypatch):
    loaded = load_model(copied("bert", tmp_path / "x"))
    with pytest.raises(ValueError, match="exists"):
        save_model(tmp_path / "x", loaded)

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space left"):
        save_model(tmp_path / "new", loaded)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
