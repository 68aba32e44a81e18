"""Misuse that once went through in silence: each is an error, or gives the right numbers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.data import Reviews, load_reviews, split_reviews
from tests import tiny
from tests.draws import draw

pytestmark = pytest.mark.usefixtures("standard_promotion")

W = {"w": draw(0, 6, 5)}
X = draw(1, 4, 6)
SPEC = lk.Spec({"w": lk.LoRA(rank=2, alpha=4)})


def fn(p, x):
    return x @ p["w"]


PLAN = lk.resolve(SPEC, W, fn, X)
BASE, FACTORS = lk.split(W, PLAN, jax.random.key(2))


def test_gradients_through_merge_are_those_through_adapt_at_init_too():
    ours = jax.grad(lambda f: jnp.sum(jnp.sin(fn(lk.merge(BASE, f, PLAN), X))))(FACTORS)
    theirs = jax.grad(lambda f: jnp.sum(jnp.sin(lk.adapt(fn, PLAN)(BASE, f, X))))(FACTORS)
    np.testing.assert_allclose(ours["w"].b, theirs["w"].b, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(ours["w"].b).max()) > 0.1


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: lk.adapt(fn, PLAN)(BASE, X), lk.AdapterError, "call adapted(base, factors, *inputs)"),
        (lambda: lk.adapt(lambda p, x, *, dropout_key=None: x, PLAN), lk.PlanError, "keyword dropout_key"),
        (lambda: lk.merge({"w": W["w"].astype(jnp.bfloat16)}, FACTORS, PLAN), lk.PlanError, "has dtype bfloat16"),
        (lambda: lk.resolve(lk.Spec({"w": lk.Full(dtype="bfloat16")}), W), lk.PlanError, "would round it"),
        (lambda: lk.partition(optax.sgd(1.0), PLAN, clip=-1.0), lk.PlanError, "clip is -1.0"),
        (lambda: lk.partition(optax.sgd(1.0), PLAN, clip=float("nan")), lk.PlanError, "clip is nan"),
        (lambda: tiny.study(lr=1e39), lk.StudyError, "float32's range"),
        (lambda: tiny.study(targets={"t" * 300: ["up/kernel"]}), lk.StudyError, "too long for a file"),
        (lambda: split_reviews(Reviews(("a", "b"), np.array([0, 1])), val=-1, test=1), ValueError, "negative"),
        (lambda: split_reviews(Reviews(("a", "b"), np.array([0, 2])), val=1, test=1), ValueError, "label 2"),
    ],
)
def test_misuse_says(call, error, says):
    with pytest.raises(error) as e:
        call()
    assert says in str(e.value)


@pytest.mark.parametrize(("loss", "kind"), [(lambda y: jnp.argmax(y), "int32"), (lambda y: y.sum(0), r"\(5,\)")])
def test_a_loss_that_is_no_float_scalar_is_refused(loss, kind):
    init, step = lk.make_step(lambda base, f, x: loss(lk.adapt(fn, PLAN)(base, f, x)), optax.sgd(0.1))
    with pytest.raises(lk.LoraxError, match=kind):
        step(init(FACTORS), BASE, X)


def test_an_infinite_rate_changes_no_factor_and_is_not_called_finite():
    init, step = lk.make_step(lambda base, f, x: jnp.sum(lk.adapt(fn, PLAN)(base, f, x) ** 2), optax.sgd(float("inf")))
    state, info = step(init(FACTORS), BASE, X)
    assert not bool(info.finite)
    np.testing.assert_array_equal(state.factors["w"].a, FACTORS["w"].a)


def test_full_leaves_in_a_wider_dtype_are_used_as_merge_uses_them():
    params = {"w": W["w"].astype(jnp.bfloat16)}
    plan = lk.resolve(lk.Spec({"w": lk.Full(dtype="float32")}), params, fn, X.astype(jnp.bfloat16))
    base, factors = lk.split(params, plan, jax.random.key(0))
    out = lk.adapt(fn, plan)(base, factors, X.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, fn(lk.merge(base, factors, plan), X.astype(jnp.bfloat16)))


def test_numpy_scalars_are_settings():
    assert lk.LoRA(rank=np.int64(4), alpha=np.float32(8)) == lk.LoRA(rank=4, alpha=8)
    assert tiny.study(rank=np.array([1, 2]), lr=np.float64(1e-2)) == tiny.study(rank=[1, 2], lr=1e-2)


OTHERS = [
    ({"plan": replace(PLAN, spec=lk.Spec({"w": lk.LoRA(rank=2, alpha=400)}))}, W, "differ at 'w'"),
    ({"plan": replace(PLAN, spec=lk.Spec({"w": lk.Full()}))}, W, "differ at 'w'"),
    ({"plan": PLAN}, {"w": W["w"][:5]}, "differ at 'w'"),
    ({"plan": PLAN}, {"v": W["w"]}, "matches no parameter"),
    ({"plan": None}, W, "needs the plan of the factors, not NoneType"),
    ({"plan": FACTORS}, W, "needs the plan of the factors, not dict"),
]


@pytest.mark.parametrize(("given", "base", "says"), OTHERS)
def test_only_the_plan_of_its_spec_and_base_is_saved(tmp_path, given, base, says):
    with pytest.raises(lk.LoraxError, match=says):
        lk.save_adapter(tmp_path / "a", given["plan"], FACTORS, base=base)
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_adapters_only(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "t.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "thesis")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "link", "file"):
        with pytest.raises(lk.AdapterError, match="is not replaced"):
            lk.save_adapter(tmp_path / name, PLAN, FACTORS, base=BASE, overwrite=True)
        with pytest.raises(lk.AdapterError, match="is not replaced"):
            lk.save_peft(tmp_path / name, PLAN, FACTORS, base=BASE, names={"w": "w.weight"}, overwrite=True)
    assert (tmp_path / "thesis" / "t.txt").read_text() == "years of work"
    with pytest.raises(lk.AdapterError, match="meta is not JSON"):
        lk.save_adapter(tmp_path / "new" / "a", PLAN, FACTORS, base=BASE, meta={"x": {1}})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("other", ["README.md", "factors/mine.txt", "more/mine.txt"])
@pytest.mark.parametrize("form", ["ours", "peft"])
def test_overwrite_deletes_no_files_of_others(tmp_path, form, other):
    def save(**options):
        if form == "ours":
            lk.save_adapter(tmp_path / "a", PLAN, FACTORS, base=BASE, **options)
        else:
            lk.save_peft(tmp_path / "a", PLAN, FACTORS, base=BASE, names={"w": "w.weight"}, **options)

    save()
    file = tmp_path / "a" / other
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(lk.AdapterError, match=f"holds '{other}', too, .* is not replaced"):
        save(overwrite=True)
    assert file.read_text() == "mine"
    file.unlink()
    save(overwrite=True)


def test_an_adapter_whose_digests_were_torn_is_replaced(tmp_path):
    lk.save_adapter(tmp_path / "a", PLAN, FACTORS, base=BASE)
    (tmp_path / "a" / "digests.json").write_text("")
    lk.save_adapter(tmp_path / "a", PLAN, FACTORS, base=BASE, overwrite=True)
    (tmp_path / "a" / "digests.json").write_text("")
    (tmp_path / "a" / "mine.txt").write_text("mine")
    with pytest.raises(lk.AdapterError, match=r"holds 'mine\.txt', too"):
        lk.save_adapter(tmp_path / "a", PLAN, FACTORS, base=BASE, overwrite=True)


def test_a_path_written_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    from lorax_kit.checkpoint import adapter

    write = adapter.write_files

    def slow(path, arrays, document):
        write(path, arrays, document)
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "other").write_text("another process")

    monkeypatch.setattr(adapter, "write_files", slow)
    with pytest.raises(lk.AdapterError, match="by another process"):
        lk.save_adapter(tmp_path / "a", PLAN, FACTORS, base=BASE)
    assert (tmp_path / "a" / "other").read_text() == "another process"


def test_a_wrong_magnitude_is_refused():
    plan = lk.resolve(lk.Spec({"w": lk.DoRA(rank=2)}), W, fn, X)
    base, factors = lk.split(W, plan, jax.random.key(0))
    for magnitude, says in ((jnp.ones(1), "magnitude at 'w' has shape"), (None, "has no 'magnitude'")):
        bad = {"w": factors["w"]._replace(magnitude=magnitude)}
        with pytest.raises(lk.AdapterError, match=says):
            lk.merge(base, bad, plan)
        with pytest.raises(lk.AdapterError, match=says):
            lk.adapt(fn, plan)(base, bad, X)


def test_a_folder_of_other_weights_or_data_is_another_study(tmp_path):
    lk.run(tiny.study(rank=1, probe_lr=()), tiny.problem(), out=tmp_path / "run", progress=False)
    changes = [
        {"params": lambda key: jax.tree.map(lambda x: 3 * x, tiny.params(key))},
        {"test": [tiny.points(9, 64)]},
        {"train": lambda seed, start: tiny.stream(seed + 1, start)},
    ]
    for change in changes:
        with pytest.raises(lk.StudyError, match="holds another study"):
            lk.run(tiny.study(rank=1, probe_lr=()), tiny.problem(**change), out=tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"loss": lambda logits, batch: tiny.losses(logits, batch)},
        {"facts": {"n": np.int64(3)}},
        {"head": ()},
    ],
    ids=["vector loss", "facts", "no head for the probe"],
)
def test_overwriting_by_a_broken_study_keeps_the_old_one(tmp_path, change):
    old = lk.run(tiny.study(rank=1), tiny.problem(), out=tmp_path / "run", progress=False)
    with pytest.raises(lk.StudyError):
        lk.run(tiny.study(rank=1), tiny.problem(**change), out=tmp_path / "run", progress=False, overwrite=True)
    again = lk.run(tiny.study(rank=1), tiny.problem(), out=tmp_path / "run", progress=False)
    assert again.rows == old.rows


def test_somebody_elses_study_json_is_kept(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "mine.png").write_text("x")
    (tmp_path / "study.json").write_text('{"my": "own"}')
    with pytest.raises(lk.StudyError, match="holds no study"):
        lk.run(tiny.study(), tiny.problem(), out=tmp_path, overwrite=True, progress=False)
    assert (tmp_path / "plots" / "mine.png").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'text,label,source\ngood,1,imdb\n"bad one,1,imdb\nlost,0,imdb\n', "line 3: unexpected end of data"),
        (b"text,label,source\na,1\n", "line 2 has 2 cells, and the header 3 columns"),
        (b"text,label,source\n\xff,1,imdb\n", "line 2 is not utf-8 text"),
    ],
)
def test_damaged_reviews_are_named(tmp_path, content, says):
    file = tmp_path / "reviews.csv"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=says) as e:
        load_reviews("imdb", file)
    assert str(file) in str(e.value)
    file.write_bytes(b"\xef\xbb\xbftext,label,source\ngood,1,imdb\n")
    assert load_reviews("imdb", file).texts == ("good",)
    file.write_bytes(b"text,label,source\n" + b"x" * 200_000 + b",1,imdb\n")
    assert load_reviews("imdb", file).texts == ("x" * 200_000,)
