"""PEFT folders that cannot be read, and adapters that PEFT cannot hold: input -> what the message says."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.models import classifier_names
from tests.fixtures.recorded import CONFIG, NAMES, base
from tests.peft.peft_folder import Folder

Q = "encoder.layer.0.attention.self.query"
V = "encoder.layer.1.attention.self.value"


@pytest.fixture(scope="module")
def params():
    return base()


def config(**changes):
    return lambda folder: folder.config.update(changes)


def tensor(name, change):
    def apply(folder):
        found = change(folder.tensors.pop(name, None))
        if found is not None:
            folder.tensors[name] = found

    return apply


def gone(x):
    return None


def ones(*shape, dtype=np.float32):
    return lambda x: np.ones(shape, dtype)


FOLDERS = [
    ("lora", config(peft_type="OFT"), "has peft_type 'OFT'; those that can be read: "),
    ("lora", config(peft_type="BONE"), "which PEFT itself reads no more: it is MISS now"),
    ("lora", config(peft_type=["LORA"]), "has peft_type ['LORA'], which is malformed"),
    ("lora", lambda f: f.config.pop("peft_type"), "has peft_type None"),
    (
        "lora",
        config(bias="all"),
        "has no tensor 'embeddings.LayerNorm.bias', which adapter_config.json trains by bias 'all'",
    ),
    ("lora", config(bias="lora_only"), "self.query.bias', which adapter_config.json trains by bias 'lora_only'"),
    ("lora", config(bias="vera_only"), "has bias 'vera_only': which LORA does not have"),
    ("lora", config(lora_bias=True), "has no lora_B.bias"),
    ("lora", config(kasa_config={"beta": 1}), "KaSA cuts the base's small singular values off"),
    ("lora", config(use_bdlora={"nblocks": 2}), "its factors are made of blocks"),
    ("lora", config(arrow_config={"top_k": 2}), "it routes each token to an adapter"),
    ("lora", config(layer_replication=[[0, 1]]), "has layer_replication [[0, 1]]"),
    ("lora", config(trainable_token_indices=[1]), "has no tensor for trainable_token_indices [1]"),
    ("lora", config(trainable_token_indices={"word_embeddings": ["1"]}), "which is malformed"),
    ("lora", config(alora_invocation_tokens=[1, 2]), "has alora_invocation_tokens"),
    ("lora", config(a_setting_of_tomorrow=3), "has a_setting_of_tomorrow 3"),
    ("lora", config(init_lora_weights="loftq"), "has init_lora_weights 'loftq', which also changed the base"),
    ("lora", config(init_lora_weights="pissa_niter_4"), "has init_lora_weights 'pissa_niter_4', which also changed"),
    ("lora", config(init_lora_weights="corda"), "has init_lora_weights 'corda', which also changed the base"),
    ("lora", config(init_lora_weights=[1]), "has init_lora_weights [1], which also changed the base"),
    ("lora", config(target_modules=["query", "valeu"]), "self.value', which adapter_config.json does not target"),
    ("lora", config(target_modules=["valeu"]), "targets 'valeu', which is no module of this base"),
    ("lora", config(target_modules=[]), "which adapter_config.json does not target"),
    ("lora", config(target_modules=".*qurey"), "targets '.*qurey', which is no module"),
    ("lora", config(target_modules="("), "the pattern '(', not a regular expression"),
    ("lora", config(target_modules=["query", 3]), "has target_modules ['query', 3], which is malformed"),
    ("lora", config(modules_to_save="pooler"), "has modules_to_save 'pooler', which is malformed"),
    ("lora", config(modules_to_save=["("]), "not a regular expression"),
    ("rslora", config(layers_pattern="("), "not a regular expression"),
    ("rslora", config(layers_to_transform=["1"]), "has layers_to_transform ['1'], which is malformed"),
    ("lora", config(target_modules=3), "has target_modules 3, which is malformed"),
    (
        "lora",
        config(target_modules=["query", "value", "key"]),
        "has no factors for 'encoder.layer.0.attention.self.key'",
    ),
    ("lora", config(target_modules=["query"]), "self.value', which adapter_config.json does not target"),
    ("lora", config(exclude_modules=["value"]), "self.value', which adapter_config.json does not target"),
    (
        "rslora",
        config(layers_to_transform=[0]),
        "encoder.layer.1.attention.self.key', which adapter_config.json does not",
    ),
    ("rslora", config(layers_pattern="blocks"), "attention.self.key', which adapter_config.json does not target"),
    ("lora", config(r=4), "its config (rank 4) and"),
    (
        "lora",
        config(r=0),
        "the rank of 'encoder.layer.0.attention.self.query' is 0; it must be an integer of at least 1",
    ),
    ("lora", config(r=3.0), "self.query' is 3.0; it must be an integer of at least 1"),
    ("lora", config(lora_alpha="5"), "has lora_alpha '5', which is malformed"),
    ("lora", config(lora_alpha=-5), "alpha is -5; it must be a positive number"),
    ("lora", config(use_rslora="yes"), "has use_rslora 'yes', which is malformed"),
    ("lora", config(rank_pattern={"value": "3"}), "has rank_pattern 'value': '3', which is malformed"),
    (
        "lora",
        config(rank_pattern={"value": 2}),
        "self.value' has lora_A.weight of shape (3, 16); its config (rank 2) and",
    ),
    ("lora", config(rank_pattern={"(": 2}), "not a regular expression"),
    ("lora", config(rank_pattern=[3]), "has rank_pattern [3], which is malformed"),
    ("lora", config(use_dora=True), "has no lora_magnitude_vector"),
    (
        "dora",
        config(use_dora=False),
        "has a lora_magnitude_vector that its config and its other tensors do not call for",
    ),
    ("lora", config(modules_to_save=["pooler"]), "has 'pooler' in modules_to_save, but no tensor of it was saved"),
    ("whole", config(modules_to_save=["embeddings.LayerNorm"]), "differs from the base and is not in modules_to_save"),
    ("whole", tensor("embeddings.LayerNorm.bias", gone), "has no tensor 'embeddings.LayerNorm.bias'"),
    ("whole", tensor("embeddings.LayerNorm.bias", ones(5)), "of shape (5,), which does not fit"),
    ("lora", tensor(f"{V}.lora_A.weight", gone), f"'{V}' has no lora_A.weight"),
    ("lora", tensor(f"{V}.lora_B.weight", gone), f"'{V}' has no lora_B.weight"),
    ("lora", tensor(f"{V}.lora_embedding_A", ones(3, 16)), f"'{V}' has a lora_embedding_A that its config"),
    ("lora", lambda f: f.tensors.clear(), "holds no factors"),
    (
        "lora",
        tensor(f"{Q}.lora_A.default.weight", ones(3, 16)),
        "names its adapter, 'default', which the files of save_pretrained leave out",
    ),
    (
        "lora",
        tensor("pooler.dense.lora_A.weight", ones(3, 16)),
        "adapts 'pooler.dense', which is no module of this base",
    ),
    (
        "lora",
        tensor("pooler.dense.weight", ones(16, 16)),
        "has the tensor 'pooler.dense.weight', which is no parameter",
    ),
    ("lora", tensor(f"{Q}.weight", ones(16, 16)), "differs from the base and is not in modules_to_save"),
    (
        "lora",
        tensor(f"{Q}.lora_A.weight", ones(3, 8)),
        "has lora_A.weight of shape (3, 8); its config (rank 3) and 'layer_0/",
    ),
    (
        "lora",
        tensor(f"{Q}.lora_B.weight", ones(24, 3)),
        "'layer_0/attention/query/kernel' of shape (16, 16) call for (16, 3)",
    ),
    ("lora", tensor(f"{Q}.lora_B.weight", ones(16, 2)), "lora_B.weight of shape (16, 2); its config (rank 3)"),
    (
        "lora",
        tensor(f"{Q}.lora_A.weight", ones(3, 4, 2, 2)),
        "lora_A.weight of shape (3, 4, 2, 2); its config (rank 3)",
    ),
    ("lora", tensor(f"{Q}.lora_A.weight", lambda x: np.full_like(x, np.nan)), "holds values that are not finite"),
    ("lora", tensor(f"{Q}.lora_A.weight", ones(3, 16, dtype=np.int32)), "is int32; float32, bfloat16 and float16"),
    ("lora", tensor(f"{Q}.lora_A.weight", ones(3, 16, dtype=np.float64)), "is float64; float32, bfloat16 and float16"),
    ("dora", tensor(f"{Q}.lora_magnitude_vector", ones(24)), "has lora_magnitude_vector of shape (24,)"),
]


@pytest.mark.parametrize(("case", "change", "says"), FOLDERS)
def test_bad_folders_say(tmp_path, params, case, change, says):
    folder = Folder(tmp_path, case)
    change(folder)
    with pytest.raises(lk.AdapterError) as e:
        lk.load_peft(folder.write(), base=params, names=NAMES)
    assert says in str(e.value)
    assert len(str(e.value).splitlines()) <= 4


def text(name, content):
    return lambda path: (path / name).write_text(content)


def cut(path):
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def header(change):
    """The header of the safetensors file, changed."""

    def apply(path):
        file = path / "adapter_model.safetensors"
        data = file.read_bytes()
        n = struct.unpack("<Q", data[:8])[0]
        text = change(data[8 : 8 + n].decode())
        file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + n :])

    return apply


def raw(name, content):
    return lambda path: (path / name).write_bytes(content)


def more(path):
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes() + bytes(8))


def huge_header(path):
    (path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def twice(text):
    entry = text[1 : text.index("},") + 1]
    return "{" + entry + "," + text[1:]


FILES = [
    (raw("adapter_config.json", b'{"peft_type": "\xff"}'), "is not JSON: 'utf-8' codec"),
    (text("adapter_config.json", "[" * 100_000), "is nested too deeply"),
    (text("adapter_config.json", '{"r": ' + "9" * 5000 + "}"), "is not JSON: the number 999999999999... is too large"),
    (text("adapter_config.json", '{"r": 1e400}'), "is not JSON: the number 1e400 is not finite, or too large"),
    (text("adapter_config.json", '{"lora_alpha": NaN}'), "is not JSON: the number NaN is not finite"),
    (text("adapter_config.json", '{"r": 3, "r": 4}'), "is not JSON: the key 'r' comes twice"),
    (more, "is damaged: its header tells of"),
    (huge_header, "is damaged: its header does not fit into it"),
    (header(twice), "is damaged: the key "),
    (header(lambda t: t.replace('"F32"', '"F8_E4M3"', 1)), "is float8_e4m3; float32, bfloat16 and float16 can be read"),
    *(
        (header(lambda t, x=x: t.replace("[3,16]", x, 1)), "and shape ")
        for x in ("null", '"ab"', "true", "[null]", "[3.0,16]")
    ),
    *((header(lambda t, x=x: t.replace('"F32"', x, 1)), f"has dtype {x} and shape") for x in ("[]", "{}")),
    (header(lambda t: t.replace('"data_offsets":[0,', '"data_offsets":[[0],', 1)), ", at [[0], "),
    (header(lambda t: t.replace("[3,16]", "[3,17]", 1)), "has not the bytes of its shape [3, 17]"),
    (header(lambda t: t.replace("base_model.model.enc", "base_model.model.../../enc", 1)), "is no module of this base"),
    (lambda path: (path / "adapter_config.json").unlink(), "is not a PEFT adapter: it has no adapter_config.json"),
    (lambda path: (path / "adapter_model.safetensors").unlink(), "pickled weights are not read"),
    (text("adapter_config.json", "{"), "is not JSON"),
    (text("adapter_config.json", "[]"), "must hold an object, not list"),
    (text("adapter_model.safetensors", "nothing"), "is damaged"),
    (cut, "is damaged"),
]


@pytest.mark.parametrize(("damage", "says"), FILES)
def test_damaged_files_say(tmp_path, params, damage, says):
    path = Folder(tmp_path, "lora").write()
    damage(path)
    with pytest.raises(lk.AdapterError) as e:
        lk.load_peft(path, base=params, names=NAMES)
    assert says in str(e.value)
    assert len(str(e.value).splitlines()) <= 4


BAD_NAMES = [
    ([("a", "b")], "`names` is a list; it must map paths"),
    ({"q/kernel": 3}, "gives 'q/kernel' 3; it must be a name in torch, or a tuple"),
    ({"q/kernel": ()}, "gives 'q/kernel' (); it must be a name"),
    ({"q/kernel": "../../q.weight"}, "the name '../../q.weight', which no parameter of torch can have"),
    ({"q/kernel": "q..weight"}, "which no parameter of torch can have"),
    ({"q/kernel": "q.weight[4:2]"}, "a range of outputs is [first:last + 1]"),
    ({"q/kernel": "q.weight[0:2]", "k/kernel": "q.weight[3:4]"}, "or not all of its outputs: 'q/kernel', 'k/kernel'"),
    ({"q/bias": "a.{}.{}.bias"}, "gives 'q/bias' 'a.{}.{}.bias': 2 stacked axes, of shape (4,)"),
    ({"absent": "q.weight"}, "none of the 1 paths in `names` is a parameter of this base"),
]


@pytest.mark.parametrize(("names", "says"), BAD_NAMES)
def test_bad_names_say(tmp_path, names, says):
    path = Folder(tmp_path, "lora").write()
    with pytest.raises(lk.AdapterError) as e:
        lk.load_peft(path, base=PARAMS, names=names)
    assert says in str(e.value)
    assert len(str(e.value).splitlines()) <= 4


def test_names_of_another_model_say(tmp_path, params):
    path = Folder(tmp_path, "lora").write()
    with pytest.raises(lk.AdapterError, match="none of the 39 paths in `names` is a parameter of this base"):
        lk.load_peft(path, base=params, names=classifier_names(CONFIG))
    with pytest.raises(lk.AdapterError) as e:
        lk.load_peft(path, base={"encoder": params}, names=classifier_names(CONFIG))
    assert "is no module of this base" in str(e.value)
    assert f"closest: 'bert.{Q}'" in str(e.value)


def test_heads_that_peft_lists_by_itself_may_be_absent(tmp_path, params):
    folder = Folder(tmp_path, "whole")
    folder.config["modules_to_save"] += ["classifier", "score"]
    with pytest.raises(lk.AdapterError, match="has 'classifier' in modules_to_save"):
        lk.load_peft(folder.write(), base=params, names=NAMES)
    folder.config["task_type"] = "SEQ_CLS"
    assert len(lk.load_peft(folder.write(), base=params, names=NAMES).plan.full) == 4


def test_a_rank_that_only_peft_allows_says(tmp_path, params):
    folder = Folder(tmp_path, "lora")
    folder.config["r"] = 40
    folder.tensors = {n: np.ones((40, 16) if "lora_A" in n else (16, 40), np.float32) for n in folder.tensors}
    with pytest.raises(lk.AdapterError, match=r"does not fit: rank 40 at .* is above min\(in, out\) = 16"):
        lk.load_peft(folder.write(), base=params, names=NAMES)


R1 = lk.LoRA(rank=1)
PARAMS = {
    "q": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
    "k": {"kernel": jnp.ones((4, 4))},
    "stack": {"kernel": jnp.ones((3, 4, 4))},
    "window": {"kernel": jnp.ones((3, 3, 4, 4))},
    "raw": jnp.ones((4, 4)),
}
TORCH = {
    "q/kernel": "q.weight",
    "q/bias": "q.bias",
    "k/kernel": "k.weight",
    "stack/kernel": "stack.weight",
    "window/kernel": "window.weight",
    "raw": "raw",
}


def fn(p, x):
    y = x @ p["q"]["kernel"] + x @ p["k"]["kernel"] + p["q"]["bias"][None] + x @ p["raw"]
    y, _ = jax.lax.scan(lambda c, w: (c @ w, None), y, p["stack"]["kernel"])
    image = jnp.broadcast_to(y[:, None, None], (2, 3, 3, 4))
    convolved = jax.lax.conv_general_dilated(
        image, p["window"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + convolved[:, 0, 0]


SAVES = [
    ({"stack/kernel": R1}, {}, "'stack/kernel' of shape (3, 4, 4) is stacked over layers or experts"),
    ({"window/kernel": lk.Rows(rows=(0,))}, {}, "is used as 'other'; PEFT's TRAINABLE_TOKENS adapts only Embedding"),
    ({"window/kernel": lk.MiSS(rank=1)}, {}, "is neither multiplied nor looked up"),
    ({"raw": R1}, {}, "'raw' is 'raw' in torch; PEFT adapts the `weight` of a module"),
    ({"{q,k}/kernel": R1}, {"k/kernel": "q.weight"}, "`names` gives 'q.weight' to several parameters"),
    ({"q/kernel": R1, "k/kernel": lk.DoRA(rank=1)}, {}, "PEFT has one method for all modules; here it is 'dora' at"),
    ({"q/kernel": R1, "k/kernel": lk.LoRA(rank=1, rslora=True)}, {}, "PEFT has one use_rslora for all modules"),
    ({"q/kernel": R1, "k/kernel": lk.LoRA(rank=1, dropout=0.1)}, {}, "PEFT has one lora_dropout for all modules"),
    (
        {"q/kernel": lk.IA3(feedforward=True), "q/bias": lk.Full()},
        {},
        "'q' is adapted and also has a parameter trained",
    ),
    ({"k/kernel": R1, "q/*": lk.Full()}, {"k/kernel": "seq.weight"}, "takes 'q' for the end of 'seq', and trains both"),
    ({"q/*": lk.Full()}, {}, "has no adapted site"),
    ({"q/kernel": R1, "stack/kernel": lk.Full()}, {}, "its name does not tell its layout in torch"),
    ({"q/kernel": R1}, {"q/kernel": None}, "`names` gives 'q/kernel' no name in torch"),
]


@pytest.mark.parametrize(("rules", "renamed", "says"), SAVES)
def test_what_peft_cannot_hold_says(tmp_path, rules, renamed, says):
    spec = lk.Spec(rules)
    plan = lk.resolve(spec, PARAMS, fn, jnp.ones((2, 4)))
    _, factors = lk.split(PARAMS, plan, jax.random.key(0))
    names = {p: name for p, name in (TORCH | renamed).items() if name}
    with pytest.raises(lk.AdapterError) as e:
        lk.save_peft(tmp_path / "x", plan, factors, base=PARAMS, names=names)
    assert says in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_factors_that_do_not_fit_or_are_not_finite_say(tmp_path):
    spec = lk.Spec({"q/kernel": R1})
    _, factors = lk.split(PARAMS, lk.resolve(spec, PARAMS), jax.random.key(0))
    bad = [
        ({}, "the factors lack 'q/kernel'"),
        ({"q/kernel": factors["q/kernel"]._replace(b=jnp.ones((2, 4)))}, "expects (1, 4)"),
        ({"q/kernel": factors["q/kernel"]._replace(b=jnp.full((1, 4), jnp.nan))}, "not finite; nothing was saved"),
    ]
    for found, says in bad:
        with pytest.raises(lk.AdapterError) as e:
            lk.save_peft(tmp_path / "x", spec, found, base=PARAMS, names=TORCH)
        assert says in str(e.value)
    assert list(tmp_path.iterdir()) == []
