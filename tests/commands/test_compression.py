"""Every method on a tiny decoder: what a row says, what is healed, how a comparison goes on, and its page."""

import itertools
import json
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax_kit.commands import Healing, Recipe, compress_subject, subject_of, text_subject
from lorax_kit.commands.compress.comparison import Comparison, compare
from lorax_kit.commands.compress.compression import load_small, save_small
from lorax_kit.commands.compress.methods import finished, smaller, statistics_for, stored_bytes
from lorax_kit.commands.compress.recipe import Method
from lorax_kit.compress import CompressError, LowRank
from lorax_kit.compress.replace import low_rank
from lorax_kit.core.paths import flatten, unflatten
from lorax_kit.core.quantised import Quantised
from lorax_kit.data import Plays
from lorax_kit.files.staging import sole_writer
from lorax_kit.problems.parts.layers import fewer_layers
from lorax_kit.report.pages.compression import COLUMNS, comparison_table, front, lines_of, write_comparison
from lorax_kit.report.run_folder import RunFolderError
from tests.models import llama_files

pytestmark = pytest.mark.usefixtures("standard_promotion")
QUIET = {"rounds": 0, "progress": False}


def recipe(method, keep=0.5, **options):
    return Recipe(method=method, keep=keep, batches=2, **options)


def compared(subject, out, *methods, rounds=0, **options):
    comparison = Comparison(methods=methods, batches=2, **options)
    return compare(subject, out, comparison, rounds=rounds, progress=False)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama_files.write_folder(folder)
    plays = Plays(("to be, or not to be, that is the question: " * 20,), ("whether 'tis nobler in the mind " * 20,))
    return text_subject(folder, batch_size=2, length=12, held_out=4, plays=plays)


@pytest.fixture(scope="module")
def stats(subject):
    return statistics_for(subject, [Method.parse("whitened"), Method.parse("wanda")], 2, progress=False)


def test_quality_equals_numpy(subject):
    found = subject.quality(subject.apply, subject.params)
    losses, right, count = 0.0, 0, 0
    for batch in subject.test:
        logits = np.asarray(subject.apply(subject.params, batch), np.float64)[:, :-1]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        label = np.asarray(batch.ids)[:, 1:]
        losses -= np.take_along_axis(logp, label[..., None], -1).sum()
        right += (logits.argmax(-1) == label).sum()
        count += label.size
    assert found.loss == pytest.approx(losses / count, rel=1e-5)
    assert found.value("accuracy") == pytest.approx(right / count)
    assert found.value("perplexity") == pytest.approx(np.exp(losses / count), rel=1e-5)
    assert found.agreement == 1.0


def test_a_row_has_what_the_contract_names(subject, stats):
    before = jax.tree.map(np.array, subject.params)
    row, small = compress_subject(subject, recipe("whitened"), Healing(steps=6, rank=None), stats=stats, **QUIET)
    jax.tree.map(np.testing.assert_array_equal, before, subject.params)
    assert set(COLUMNS) == set(row)
    assert row["bytes_ratio"] <= 0.5 < row["model_ratio"] < 1
    assert row["flops_ratio"] < 1
    assert row["metric"] == "perplexity"
    assert row["params"] == sum(x.size for x in jax.tree.leaves(small.params))
    assert 0 <= row["agreement_after"] <= 1
    assert row["metric_healed"] < row["metric_after"]


def test_in_turn_keeps_the_ranks(subject, stats):
    at_once = smaller(subject, recipe("whitened", 0.4), stats)
    in_turn = smaller(subject, recipe("whitened", 0.4, sequential=True), stats, progress=False)
    assert jax.tree.map(jnp.shape, in_turn.params) == jax.tree.map(jnp.shape, at_once.params)
    assert subject.quality(*in_turn).loss < 2 * subject.quality(*at_once).loss


@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_a_quantised_residual_brings_the_model_nearer_than_its_bits_alone(subject, stats, bits):
    named = flatten(subject.params)[0]

    def error(name):
        way = Method.parse(name)
        small = finished(subject, way, smaller(subject, recipe(name), stats))
        found = flatten(small.params, whole=(LowRank, Quantised))[0]
        restored = {s.path: found[s.path] for s in subject.sites.sites}
        total = sum(
            float(jnp.sum((named[p] - (x.restore() if hasattr(x, "restore") else x)) ** 2)) for p, x in restored.items()
        )
        return total, stored_bytes(subject, way, small.params)

    alone, both = error(bits), error(f"whitened+residual-{bits}")
    assert both[0] < alone[0]
    assert both[1] > alone[1]


def test_what_keeps_all_is_left_as_it_is(subject, stats):
    small = smaller(subject, recipe("whitened+residual-int8", 1.0), stats)
    named = flatten(small.params, whole=(Quantised,))[0]
    assert all(isinstance(named[site.path], Quantised) for site in subject.sites.sites)


def test_one_layer_goes_in_turn_alone(subject):
    one = replace(subject, targets=("layer_1/**/kernel",))
    in_turn = Recipe(method="whitened", sequential=True, batches=1)
    small = smaller(one, in_turn, statistics_for(one, [in_turn.way], 1, progress=False), progress=False)
    assert all(path.startswith("layer_1/") for path in low_rank(small.params))


def test_a_student_keeps_the_outer_layers(subject):
    params = {f"layer_{i}": i for i in range(6)} | {"norm": "n"}
    assert fewer_layers(params, 3) == {"norm": "n", "layer_0": 0, "layer_1": 2, "layer_2": 5}
    with pytest.raises(CompressError, match="7 layers; the model has 6"):
        fewer_layers(params, 7)
    row, small = compress_subject(subject, recipe("student"), Healing(steps=4, lr=1e-2), **QUIET)
    assert row["bytes_ratio"] == 0.5
    assert set(small.params) == {"embeddings", "head", "layer_0", "norm"}
    assert row["metric_healed"] < row["metric_after"]


def test_bytes_count_what_is_stored(subject, stats):
    dense = sum(flatten(subject.params)[0][s.path].size for s in subject.sites.sites)
    for name, expected in {
        "magnitude": 4 * dense // 2 + dense // 8,
        "magnitude-2:4": 4 * dense // 2 + dense // 8,
    }.items():
        way = Method.parse(name)
        found = stored_bytes(subject, way, smaller(subject, recipe(name), stats).params)
        assert found == pytest.approx(expected, rel=2e-3)


def test_bad_input(subject, stats, tmp_path):
    for options, message in (
        ({"method": "pca"}, "method 'pca' is unknown"),
        ({"method": "whitened+int3"}, "is unknown"),
        ({"method": "nf4", "steps": 3}, "nothing low-rank to heal"),
        ({"method": "wanda", "steps": 4, "keep": 1}, "nothing becomes pruned, and nothing can be healed"),
        ({"method": "original_tuned"}, "is the original after some steps: say how many"),
        ({"method": "nf4", "sequential": True}, "does not go layer by layer"),
        ({"method": "svd", "sequential": True}, "does not go layer by layer"),
        ({"method": "student", "keep": 1.5}, "keep is 1.5"),
        ({"method": "svd", "allocation": "foo"}, "allocation 'foo' is unknown"),
        ({"method": "svd", "batches": 0}, "batches is 0"),
        ({"method": "svd", "steps": 4, "lr": -1}, "lr is -1"),
        ({"method": "svd", "steps": 4, "share": 1.5}, "share is 1.5"),
        ({"method": "svd", "steps": 1}, "healing takes 2 steps at least"),
        ({"method": "svd", "steps": 4, "keep": 1}, "nothing can be healed"),
        ({"method": "svd", "seed": 1.5}, "seed is 1.5"),
        ({"method": "svd", "rounds": -1}, "rounds is -1"),
    ):
        healing = {name: options.pop(name) for name in asdict(Healing()) if name in options}
        rounds = options.pop("rounds", 0)
        with pytest.raises(CompressError, match=message):
            compress_subject(subject, Recipe(**options), Healing(**healing), rounds=rounds, stats=stats, progress=False)
    with pytest.raises(CompressError, match="neither an adapter nor a decoder"):
        subject_of(tmp_path)


def test_a_comparison_goes_on_and_draws_its_page(subject, tmp_path):
    healing, out = Healing(steps=2, rank=None), tmp_path / "compare"
    options = {"heal": ("whitened",), "healing": healing, "seeds": 2, "rounds": 1}
    rows = compared(subject, out, "svd", "whitened", "nf4", **options)
    tuned = [("original_tuned", 0), ("original_tuned", 1)]
    whole = [("svd", 0), ("whitened", 0), ("whitened", 1), ("nf4", 0), *tuned]
    assert [(r["method"], r["seed"]) for r in rows] == whole
    assert {(r["keep"], r["bytes_ratio"], r["metric_after"] == r["metric_before"]) for r in rows[4:]} == {(1, 1, True)}
    assert all(r["metric_healed"] < r["metric_before"] for r in rows[4:])
    with (out / "rows.jsonl").open("a") as file:
        file.write('{"method": "cut')
    again = compared(subject, out, "svd", "whitened", "nf4", "magnitude", **options)
    assert again[:6] == rows
    assert again[6]["method"] == "magnitude"
    assert len((out / "rows.jsonl").read_text().splitlines()) == 7
    page = write_comparison(out)
    text = page.read_text()
    assert "whitened" in text
    assert "<svg" in text
    assert (out / "results.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert (out / "plots" / "pareto.png").stat().st_size > 10_000
    assert len(comparison_table(out).splitlines()) == 6
    assert "original_tuned" in comparison_table(out)
    for setting, message in (
        ({"steps": 3}, "holds a comparison with steps 2, not 3"),
        ({"lr": 2e-3}, "with lr 0.001, not 0.002"),
        ({"rank": 8}, "with rank None, not 8"),
    ):
        with pytest.raises(CompressError, match=message):
            compared(subject, out, "whitened", **options | {"healing": replace(healing, **setting)})
    with pytest.raises(RunFolderError, match="holds no comparison"):
        write_comparison(tmp_path)


def test_a_comparison_belongs_to_its_weights(subject, tmp_path):
    out = tmp_path / "compare"
    compared(subject, out, "int8", "int8")
    assert len((out / "rows.jsonl").read_text().splitlines()) == 1
    other = replace(subject, params=jax.tree.map(lambda x: 1.5 * x, subject.params))
    with pytest.raises(CompressError, match="holds a comparison with params"):
        compared(other, out, "int8")
    rows = out / "rows.jsonl"
    rows.write_text(rows.read_text()[:-1])  # a kill between a row and its end of line
    compared(subject, out, "int8", "nf4")
    assert [json.loads(line)["method"] for line in rows.read_text().splitlines()] == ["int8", "nf4"]


def test_a_comparison_has_one_writer(subject, tmp_path):
    out = tmp_path / "compare"
    compared(subject, out, "int8")
    with sole_writer(out), pytest.raises(CompressError, match="another process is writing to"):
        compared(subject, out, "nf4")
    assert len(compared(subject, out, "int8", "nf4")) == 2


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("method", ["magnitude", "wanda-2:4"])
def test_a_pruned_model_is_healed_and_its_zeros_stay(subject, stats, method, rank):
    pruned, options = smaller(subject, recipe(method), stats).params, {"stats": stats, **QUIET}
    row, healed = compress_subject(subject, recipe(method), Healing(steps=6, lr=5e-3, rank=rank), **options)
    assert row["metric_healed"] < row["metric_after"]
    before, after = (flatten(params)[0] for params in (pruned, healed.params))
    for site in subject.sites.sites:
        zero = np.asarray(before[site.path]) == 0
        assert zero.any()
        assert np.array_equal(np.asarray(after[site.path]) == 0, zero)
        assert np.asarray(after[site.path])[zero].tobytes() == bytes(4 * zero.sum())
        assert not np.array_equal(after[site.path], before[site.path])
    untouched = set(before) - {site.path for site in subject.sites.sites}
    assert all(np.array_equal(before[path], after[path]) for path in untouched)
    whole = compress_subject(subject, recipe(method), **options)[0]
    assert (row["params"], row["bytes"], row["flops_ratio"]) == (whole["params"], whole["bytes"], whole["flops_ratio"])


def test_the_original_is_tuned_by_adamw_on_the_batches_that_heal(subject):
    healing = Healing(steps=4, rank=None, share=0.0, seed=3)
    row, _ = compress_subject(subject, recipe("original_tuned"), healing, **QUIET)
    named, treedef = flatten(subject.params)
    own = {site.path: named[site.path] for site in subject.sites.sites}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(1e-3, 1e-3, 1, 4)))

    def loss(own, batch):
        return subject.loss(subject.apply(unflatten(named | own, treedef), batch), batch)

    state, gradient = tx.init(own), jax.jit(jax.grad(loss))
    for batch in itertools.islice(subject.train(3), 4):
        updates, state = tx.update(gradient(own, batch), state, own)
        own = optax.apply_updates(own, updates)
    by_hand = subject.quality(subject.apply, unflatten(named | own, treedef))
    assert row["metric_healed"] == pytest.approx(by_hand.value("perplexity"), rel=1e-4)
    assert row["metric_healed"] < row["metric_before"]


@pytest.mark.parametrize("method", ["whitened+int8", "magnitude", "student"])
def test_what_was_kept_is_read_again(subject, stats, method, tmp_path):
    row, small = compress_subject(subject, recipe(method), stats=stats, **QUIET)
    save_small(tmp_path / "small", subject, row, small)
    again, loaded = load_small(tmp_path / "small", subject)
    assert again == row | {name: again[name] for name in ("original", "leaves", "of", "targets")}
    found = subject.quality(*loaded), subject.quality(*small)
    assert found[0].loss == found[1].loss
    file = tmp_path / "small" / "row.json"
    other = {"keep": 1.0 if method == "student" else 0.1, "method": "student"}  # of another number of layers
    for change, message in (
        (other, "its tensors are not those of a 'student' model"),
        ({"keep": "x"}, "is no model of"),
        ({"original": ""}, "was made of another"),
        ({"original": "", "leaves": again["leaves"] | {"gone": ["float32", [2], "", ""]}}, "'gone' is missing here"),
    ):
        file.write_text(json.dumps(again | change))
        with pytest.raises(CompressError, match=message):
            load_small(tmp_path / "small", subject)


@pytest.mark.parametrize("text", ['{"method": "svd"}', None, "\xff"])
def test_rows_that_are_damaged_are_named(subject, text, tmp_path):
    out = tmp_path / "compare"
    compared(subject, out, "int8")
    row = json.loads((out / "rows.jsonl").read_text()) | {"keep": [1]}
    (out / "rows.jsonl").write_text((text or json.dumps(row)) + "\n", encoding="latin-1")
    with pytest.raises(CompressError, match="compare' cannot be gone on with"):
        compared(subject, out, "int8")


def test_a_recipe_and_its_healing_are_json():
    for one in (recipe("whitened", 0.3, sequential=True), Healing(steps=3, rank=None, seed=2)):
        assert type(one)(**json.loads(json.dumps(asdict(one)))) == one
    assert recipe("nf4", 0.3) == recipe("nf4", 1.0)  # which leaves nothing out


def test_a_comparison_that_fails_leaves_no_folder(subject, tmp_path):
    for options, message in (
        ({"keeps": (0,)}, "keep is 0"),
        ({"allocation": "foo"}, "allocation 'foo' is unknown"),
        ({"methods": ()}, "must each hold something"),
        ({"seeds": 0}, "seeds is 0"),
        ({"healing": Healing(steps=4)}, "steps is 4, and none of the methods is healed"),
        ({"keeps": (1e-4,)}, "svd, 0.0001 kept: keep=0.0001 is impossible"),
        ({"methods": ("nf4",), "heal": ("nf4",), "healing": Healing(steps=4)}, "nothing low-rank to heal"),
        ({"methods": ("original_tuned",)}, "say how many"),
    ):
        with pytest.raises(CompressError, match=message):
            compared(subject, tmp_path / "out", *options.pop("methods", ("svd",)), **options)
    assert not (tmp_path / "out").exists()


def test_the_front_holds_what_nothing_beats():
    def row(method, size, metric):
        return dict.fromkeys(COLUMNS) | {"method": method, "keep": 1, "bytes_ratio": size, "metric_after": metric,
                                         "metric": "accuracy"}  # fmt: skip

    lines = lines_of([row("a", 0.5, 0.7), row("b", 0.2, 0.6), row("c", 0.6, 0.65), row("d", 0.9, 0.8)])
    assert [line.method for line in front(lines, "bytes_ratio")] == ["b", "a", "d"]
    lines += lines_of([row("broken", 0.1, float("nan"))])
    assert [line.method for line in front(lines, "bytes_ratio")] == ["b", "a", "d"]


@pytest.mark.parametrize("value", [12.0, float("nan")])
def test_pages_of_three_costs_and_of_nothing_finite(value, tmp_path):
    row = dict.fromkeys(COLUMNS, 0.5) | {"subject": "s", "method": "svd", "metric": "perplexity", "metric_healed": None,
                                         "metric_after": value, "latency_ratio": None, "seed": 0}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "comparison.json").write_text("{}")
    text = write_comparison(tmp_path).read_text()
    assert "peak memory" in text
    assert ">latency<" not in text.split("<table")[0]
