"""Adapters on disk: the same bits back, or a clear refusal; small; whole or not at all."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.checkpoint import adapter as module
from lorax_kit.checkpoint import adapter_bytes
from lorax_kit.checkpoint.seal import seal
from tests.cases import CASES

PARAMS = {
    "up": {"kernel": jnp.arange(24.0).reshape(6, 4)},
    "down": {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.zeros(3)},
}
SPEC = lk.Spec({"**/kernel": lk.LoRA(rank=2, alpha=3), "**/bias": lk.Full()})
PLAN = lk.resolve(SPEC, PARAMS)


def make(params=PARAMS, spec=SPEC, seed=0):
    plan = lk.resolve(spec, params)
    base, factors = lk.split(params, plan, jax.random.key(seed))
    return base, jax.tree.map(lambda x: x + 1, factors)


def files(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def same_bits(x, y):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_round_trip_is_bitwise_and_keeps_spec_plan_and_meta(tmp_path):
    base, factors = make()
    lk.save_adapter(tmp_path / "a", PLAN, factors, base=base, meta={"note": "å", "n": [1, None]})
    found = lk.load_adapter(tmp_path / "a", base=base)
    same_bits(found.factors, factors)
    assert found.spec == SPEC
    assert found.plan == lk.resolve(SPEC, PARAMS)
    assert found.meta == {"note": "å", "n": [1, None]}


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("name", CASES)
def test_every_model_comes_back_with_its_contractions(tmp_path, name, variant):
    case = CASES[name]()
    spec = lk.Spec(dict.fromkeys(case.targets, lk.LoRA(rank=2, variant=variant)))
    plan = lk.resolve(spec, case.params, case.fn, *case.inputs)
    base, factors = lk.split(case.params, plan, jax.random.key(0))
    lk.save_adapter(tmp_path / "a", plan, factors, base=base)
    found = lk.load_adapter(tmp_path / "a", base=base)
    assert found.plan == plan
    same_bits(found.factors, factors)


def test_an_adapter_is_hardly_larger_than_its_factors(tmp_path):
    params = {f"layer_{i}": {"kernel": jnp.ones((256, 256))} for i in range(24)}
    base, factors = make(params, lk.Spec({"**": lk.LoRA(rank=8)}))
    key = jax.random.key(0)  # noise: nothing to compress
    factors = jax.tree.map(lambda x: jax.random.normal(key, x.shape), factors)
    lk.save_adapter(tmp_path / "a", lk.Spec({"**": lk.LoRA(rank=8)}), factors, base=base)
    size = sum(x.nbytes for x in jax.tree.leaves(factors))
    assert adapter_bytes(tmp_path / "a") <= 1.05 * size + 64 * 1024


def test_another_base_is_refused(tmp_path):
    base, factors = make()
    lk.save_adapter(tmp_path / "a", PLAN, factors, base=base)
    other = base | {"up": {"kernel": base["up"]["kernel"].at[3, 1].add(1e-3)}}
    with pytest.raises(lk.AdapterError, match="belongs to another base"):
        lk.load_adapter(tmp_path / "a", base=other)
    # What the adapter trains in full is its own: another value there is not another base.
    lk.load_adapter(tmp_path / "a", base=base | {"down": base["down"] | {"bias": jnp.ones(3)}})


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"up": {"kernel": jnp.ones((6, 5))}, "down": PARAMS["down"]}, "another base"),
        ({"up": {"kernel": jnp.ones((6, 4, 2))}, "down": PARAMS["down"]}, "another base"),
        ({"up": PARAMS["up"], "down": {"kernel": PARAMS["down"]["kernel"]}}, "matches no parameter"),
    ],
)
def test_a_base_of_other_shapes_is_refused(tmp_path, other, says):
    base, factors = make()
    lk.save_adapter(tmp_path / "a", PLAN, factors, base=base)
    with pytest.raises(lk.LoraxError, match=says):
        lk.load_adapter(tmp_path / "a", base=other)


def test_every_truncated_or_flipped_file_is_noticed(tmp_path, caplog):
    """Each file of an adapter in turn: cut in half, a byte flipped, or gone. Never other numbers than were saved."""
    base, factors = make()
    lk.save_adapter(tmp_path / "a", PLAN, factors, base=base)
    for name, content in files(tmp_path / "a").items():
        file, half = tmp_path / "a" / name, len(content) // 2
        flipped = bytes([*content[:half], content[half] ^ 0x20, *content[half + 1 :]]) if content else b"x"
        for damage in (content[:half] if content else b"y", flipped, None):
            file.unlink() if damage is None else file.write_bytes(damage)
            with pytest.raises(lk.AdapterError, match=r"is damaged|is not an adapter") as e:
                lk.load_adapter(tmp_path / "a", base=base)
            assert str(tmp_path / "a") in str(e.value)
            assert len(str(e.value).splitlines()) <= 4
            file.write_bytes(content)
    assert caplog.records == []  # orbax never saw the damage, so it did not fill the log with it
    same_bits(lk.load_adapter(tmp_path / "a", base=base).factors, factors)


def test_rank_and_shape_mismatches_raise(tmp_path):
    base, factors = make()
    for spec, says in (
        (lk.Spec({"**/kernel": lk.LoRA(rank=3), "**/bias": lk.Full()}), "a at 'down/kernel' has shape"),
        (lk.Spec({"**/kernel": lk.LoRA(rank=2)}), "the factors hold the unplanned 'down/bias'"),
        (lk.Spec({"**/kernel": lk.DoRA(rank=2), "**/bias": lk.Full()}), "planned as dora, whose leaves are DoRALeaves"),
    ):
        with pytest.raises(lk.AdapterError, match=says):
            lk.save_adapter(tmp_path / "a", lk.resolve(spec, PARAMS), factors, base=base)
    with pytest.raises(lk.AdapterError, match="not finite"):
        bad = factors | {"up/kernel": factors["up/kernel"]._replace(a=jnp.full((2, 6), jnp.nan))}
        lk.save_adapter(tmp_path / "a", PLAN, bad, base=base)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_path_is_kept(tmp_path):
    base, factors = make()
    lk.save_adapter(tmp_path / "a", PLAN, factors, base=base)
    before = files(tmp_path / "a")
    with pytest.raises(lk.AdapterError, match="exists"):
        lk.save_adapter(tmp_path / "a", PLAN, make(seed=1)[1], base=base)
    assert files(tmp_path / "a") == before
    lk.save_adapter(tmp_path / "a", PLAN, make(seed=1)[1], base=base, overwrite=True)
    same_bits(lk.load_adapter(tmp_path / "a", base=base).factors, make(seed=1)[1])


def test_a_save_that_breaks_leaves_the_old_adapter(tmp_path, monkeypatch):
    base, factors = make()
    lk.save_adapter(tmp_path / "a", PLAN, factors, base=base)
    write = module.write_files

    def breaks(path, arrays, document):
        write(path, arrays, document)
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_files", breaks)
    with pytest.raises(OSError, match="disk full"):
        lk.save_adapter(tmp_path / "a", PLAN, make(seed=1)[1], base=base, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    same_bits(lk.load_adapter(tmp_path / "a", base=base).factors, factors)


def test_what_is_not_an_adapter_says_so(tmp_path):
    with pytest.raises(lk.AdapterError, match="is not an adapter"):
        lk.load_adapter(tmp_path, base=PARAMS)
    with pytest.raises(lk.AdapterError, match="is not an adapter"):
        lk.load_adapter(tmp_path / "nothing", base=PARAMS)
    (tmp_path / "run" / "adapters" / "r2").mkdir(parents=True)
    with pytest.raises(lk.AdapterError, match=r"no 'spec' inside.\n  of a study, choose one: .*run/adapters/r2$"):
        lk.load_adapter(tmp_path / "run", base=PARAMS)


def test_fingerprint_depends_on_values_names_shapes_and_dtypes():
    w = jnp.arange(6.0)
    trees = [{"w": w}, {"v": w}, {"w": w.reshape(2, 3)}, {"w": w.astype(jnp.bfloat16)}, {"w": -w}, {"w": w, "u": w[:0]}]
    assert len({lk.fingerprint(tree) for tree in trees}) == len(trees)
    assert lk.fingerprint({"w": np.arange(6, dtype=np.float32)}) == lk.fingerprint({"w": w})


def edited(path, change):
    """The JSON of an adapter is changed, and all of it sealed again."""
    file = path / "spec" / "metadata"
    text = change(file.read_text())
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    seal(path)


def put(*keys):
    """Another value at a place of the JSON; `...` takes the key out."""
    *where, last, value = keys

    def change(text):
        inner = document = json.loads(text)
        for key in where:
            inner = inner[key]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
        return document

    return change


UP = "up/kernel"
DAMAGES = [
    (put("axes", {}), "'axes' of its JSON lacks 'down/kernel', which its spec adapts"),
    (put("axes", UP, "inputs", ...), "'axes' at 'up/kernel' of its JSON is {"),
    (put("axes", UP, "inputs", [0, 0]), "has inputs [0, 0], outputs [1], stack [], not each of the 2 axes once"),
    (put("axes", UP, "inputs", [7]), "has inputs [7], outputs [1], stack []"),
    (put("axes", UP, "inputs", "0"), "inputs of 'axes' at 'up/kernel' of its JSON is '0', not a list of axes"),
    (put("axes", UP, "inputs", [-2]), "is [-2], not a list of axes"),
    (put("axes", UP, "use", "nonsense"), "use of 'axes' at 'up/kernel' of its JSON is 'nonsense', not one of product"),
    (put("axes", "zz", {"inputs": [0], "outputs": [1], "stack": [], "use": "other"}), "has 'zz', which its spec does"),
    (put("arrays", f"{UP}:a", "x"), "'arrays' at 'up/kernel:a' of its JSON is 'x', not a shape and a dtype"),
    (put("arrays", f"{UP}:a", "dtype", "zz"), "the dtype in 'arrays' at 'up/kernel:a' of its JSON is 'zz'"),
    (put("arrays", f"{UP}:a", "dtype", ",float32"), "is ',float32', not the name of a dtype"),
    (put("arrays", f"{UP}:a", "dtype", "int32"), "a of 'up/kernel' is int32; leaves are real floats"),
    (put("arrays", f"{UP}:a", "shape", [2.0, 6]), "is [2.0, 6], not a list of sizes"),
    (put("arrays", f"{UP}:z", {"shape": [1], "dtype": "float32"}), "it has 'up/kernel:z', which its spec has no use"),
    (put("same", [1]), "'same' of its JSON is [1], not an object"),
    (put("same", {f"{UP}:z": "gone"}), "'same' at 'up/kernel:z' of its JSON is 'gone', not the name of another array"),
    (put("base", 5), "'base' of its JSON is 5, not a fingerprint"),
    (put("leaves", {UP: 5}), "'leaves' at 'up/kernel' of its JSON is 5"),
    (put("meta", None), "'meta' of its JSON is None, not an object"),
    (put("meta", ...), "its JSON has no 'meta'"),
    (put("format", "2"), "'format' of its JSON is '2', not an integer"),
    (lambda text: [1], "the whole of its JSON is [1], not an object"),
    (lambda text: text.replace("{", '{"base": "", ', 1), "the key 'base' stands twice in one object"),
]


@pytest.mark.parametrize(("change", "says"), DAMAGES)
def test_an_edited_json_says_at_which_key_it_is_damaged(tmp_path, change, says):
    base, factors = make()
    lk.save_adapter(tmp_path / "a", PLAN, factors, base=base)
    edited(tmp_path / "a", change)
    with pytest.raises(lk.AdapterError) as e:
        lk.load_adapter(tmp_path / "a", base=base)
    assert says in str(e.value)
    assert str(e.value).count("\n") < 4


def test_arrays_that_the_spec_has_no_use_for_are_not_dropped(tmp_path):
    base, factors = make(spec=lk.Spec({UP: lk.DoRA(rank=2)}))
    lk.save_adapter(tmp_path / "a", lk.resolve(lk.Spec({UP: lk.DoRA(rank=2)}), PARAMS), factors, base=base)
    edited(tmp_path / "a", lambda text: text.replace('"dora"', '"lora"'))
    with pytest.raises(lk.AdapterError, match="'up/kernel:magnitude', which its spec has no use for"):
        lk.load_adapter(tmp_path / "a", base=base)


def test_versions_and_format_are_recorded(tmp_path):
    base, factors = make()
    lk.save_adapter(tmp_path / "a", PLAN, factors, base=base)
    document = module.read_document(tmp_path / "a")
    assert document["format"] == module.FORMAT
    assert document["versions"]["lorax_kit"] == lk.__version__
    assert document["base"] == lk.fingerprint(base, ["down/bias"])
    newer = next(p for p in (tmp_path / "a" / "spec").iterdir() if b'"format"' in p.read_bytes())
    text = json.loads(newer.read_text())
    newer.write_text(json.dumps(text | {"format": 99}))
    seal(tmp_path / "a")
    with pytest.raises(lk.AdapterError, match="has format 99"):
        lk.load_adapter(tmp_path / "a", base=base)


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ({1: 2}, "meta has the key 1: JSON does not give it back equal"),
        ({"a": [{"b": (1, 2)}]}, "meta['a'][0]['b'] is the tuple (1, 2): JSON does not give it back equal"),
        ({"a": {None: 1}}, "meta['a'] has the key None"),
        ({"a": {1}}, "meta is not JSON data: Object of type set"),
        ({"a": 10**400}, "meta is not JSON data: it holds a number of 401 digits"),
        (5, "meta is not JSON data"),
    ],
)
def test_meta_that_json_gives_back_otherwise_is_refused(tmp_path, meta, says):
    base, factors = make()
    with pytest.raises(lk.AdapterError) as e:
        lk.save_adapter(tmp_path / "a", PLAN, factors, base=base, meta=meta)
    assert says in str(e.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (None, "the path is None, which names no file"),
        (b"a", "the path is b'a', which names no file"),
        ("a\0b", "which names no file"),
        ("\ud800", "which names no file"),
        ("x" * 300, "cannot be made: File name too long"),
        ("/proc/x/y", "cannot be made: "),
        ("/dev/null/x", "cannot be made: '/dev/null' is no folder"),
    ],
)
def test_a_path_that_cannot_be_made_says_so(tmp_path, monkeypatch, path, says):
    monkeypatch.chdir(tmp_path)
    base, factors = make()
    with pytest.raises(lk.AdapterError) as e:
        lk.save_adapter(path, PLAN, factors, base=base)
    assert says in str(e.value)
    with pytest.raises(lk.AdapterError, match=r"names no file|is not an adapter"):
        lk.load_adapter(path, base=base)
    lk.save_adapter("é" * 127, PLAN, factors, base=base)  # as long as names may be


@pytest.mark.parametrize("value", [jnp.ones(3, jnp.int32), jnp.ones(3, bool), jnp.ones(3, jnp.complex64), [1.0], None])
def test_leaves_that_are_no_floats_are_not_saved(tmp_path, value):
    base, factors = make()
    up = factors["up/kernel"]
    for bad in ({"down/bias": lk.FullLeaf(value)}, {"up/kernel": up._replace(a=value)}):
        with pytest.raises(lk.AdapterError, match=r"leaves are|full leaf of shape|has shape|has no 'a'"):
            lk.save_adapter(tmp_path / "a", PLAN, factors | bad, base=base)
