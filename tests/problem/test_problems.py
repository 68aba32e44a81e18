"""Problems beyond classification: regression, language models, dropout, BatchNorm, metrics of all outputs."""

import importlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.checkpoint.adapter import read_meta
from lorax_kit.problem import Evaluator
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")


def run(out, problem, **changes):
    return lk.run(tiny.study(**{"probe_lr": (), "rank": [1, 2]} | changes), problem, out=out, progress=False)


def regression(**changes):
    def errors(outputs, batch):
        return jnp.square(outputs[:, 0] - batch.x[:, 0] * batch.x[:, 1])

    def score(outputs, batch):
        total = jnp.sum(errors(outputs, batch))
        return {"loss": total, "squared_error": total, "weight": jnp.float32(len(batch.x))}

    def correlation(predictions, batches):
        y = np.concatenate([batch.x[:, 0] * batch.x[:, 1] for batch in batches])
        return float(np.corrcoef(np.concatenate(predictions), y)[0, 1])

    metrics = [
        "mse",
        lk.Metric("rmse", better="lower", of=lambda mean: np.sqrt(mean["squared_error"])),
        lk.Metric("pearson", better="higher", of_outputs=correlation, bounds=(-1, 1)),
    ]
    settings = {
        "loss": lambda outputs, batch: jnp.mean(errors(outputs, batch)),
        "score": score,
        "metrics": metrics,
        "predict": lambda outputs, batch: outputs[:, 0],
    }
    return tiny.problem(**settings | changes)


def test_a_regression_is_chosen_by_its_error_and_measures_a_metric_of_all_outputs(tmp_path):
    problem = regression()
    found = run(tmp_path / "run", problem, lr=[1e-3, 3e-2], eval_every=10)
    best = found.best()
    assert best["val_mse"] == min(row["val_mse"] for row in found.rows)
    assert found.best("test_pearson")["test_pearson"] == max(row["test_pearson"] for row in found.rows)
    base = problem.params(jax.random.key(0))
    adapter = lk.load_adapter(found.path / best["adapter"], base=base)
    merged = lk.merge(base, adapter.factors, adapter.plan)
    outputs = np.concatenate([tiny.apply(merged, batch)[:, 0] for batch in problem.test])
    y = np.concatenate([batch.x[:, 0] * batch.x[:, 1] for batch in problem.test])
    assert best["test_mse"] == pytest.approx(np.mean((outputs - y) ** 2), rel=1e-5)
    assert best["test_rmse"] == pytest.approx(best["test_mse"] ** 0.5, rel=1e-9)
    assert best["test_pearson"] == pytest.approx(np.corrcoef(outputs, y)[0, 1], rel=1e-4)
    info = json.loads((found.path / "study.json").read_text())
    assert info["metric"] == "mse"
    assert {m["name"]: m["better"] for m in info["metrics"]} == {
        "loss": "lower",
        "mse": "lower",
        "rmse": "lower",
        "pearson": "higher",
    }
    curves = [json.loads(line) for line in (found.path / "curves.jsonl").read_text().splitlines()]
    last = [c for c in curves if c["trial"] == best["trial"]][-1]
    assert last["val_pearson"] == pytest.approx(best["val_pearson"], abs=1e-5)


def test_a_language_model_needs_no_score_where_its_loss_says_what_it_weighs(tmp_path):
    """Batches of 32, 64 and 10 rows with every third row masked: the mean is over rows that count."""

    def weighted(logits, batch):
        counted = (jnp.arange(len(batch.label)) % 3 > 0).astype(jnp.float32)
        return lk.Weighted(jnp.sum(tiny.losses(logits, batch) * counted), jnp.sum(counted))

    problem = tiny.problem(loss=weighted, score=None, metrics="perplexity", metric="perplexity")
    found = run(tmp_path / "run", problem, steps=3)
    base = problem.params(jax.random.key(0))
    row = found.best()
    adapter = lk.load_adapter(found.path / row["adapter"], base=base)
    merged = lk.merge(base, adapter.factors, adapter.plan)
    sums = [weighted(tiny.apply(merged, batch), batch) for batch in problem.test]
    mean = sum(float(s.total) for s in sums) / sum(float(s.weight) for s in sums)
    assert row["test_perplexity"] == pytest.approx(np.exp(mean), rel=1e-5)
    assert row["test_loss"] == pytest.approx(mean, rel=1e-5)
    assert set(row) & {"val_accuracy", "test_accuracy"} == set()


def dropping(**changes):
    """Dropout on the hidden layer, in training alone."""

    def train_apply(p, batch, key):
        h = jnp.tanh(batch.x @ p["first"]["kernel"])
        h = jnp.where(jax.random.bernoulli(key, 0.5, h.shape), 2 * h, 0)
        h = jnp.tanh(h @ p["up"]["kernel"]) @ p["down"]["kernel"]
        return h @ p["head"]["kernel"] + p["head"]["bias"][None]

    return tiny.problem(train_apply=train_apply, **changes)


def normalising(momentum=0.5):
    """BatchNorm before the head: statistics of the batch in training, running ones in evaluation."""

    def params(key):
        return {"params": tiny.params(key), "batch_stats": {"mean": jnp.zeros(8), "var": jnp.ones(8)}}

    def hidden(p, batch):
        h = jnp.tanh(batch.x @ p["first"]["kernel"])
        return jnp.tanh(h @ p["up"]["kernel"]) @ p["down"]["kernel"]

    def head(p, h, mean, var):
        h = (h - mean[None]) * jax.lax.rsqrt(var + 1e-3)[None]
        return h @ p["head"]["kernel"] + p["head"]["bias"][None]

    def apply(v, batch):
        return head(v["params"], hidden(v["params"], batch), v["batch_stats"]["mean"], v["batch_stats"]["var"])

    def train_apply(v, batch, key):
        h = hidden(v["params"], batch)
        mean, var = jnp.mean(h, 0), jnp.var(h, 0)
        old = v["batch_stats"]
        new = jax.tree.map(lambda x, y: momentum * x + (1 - momentum) * y, old, {"mean": mean, "var": var})
        return head(v["params"], h, mean, var), {"batch_stats": new}

    return tiny.problem(
        params=params,
        apply=apply,
        train_apply=train_apply,
        state=["batch_stats/**"],
        head=("params/head/**",),
    )


TARGETS = {"upper": ["**/{up,down}/kernel"]}


def solo(study, problem, trial):
    """The trial alone by a loop of optax over merged params: no code of studies, steps or partitions."""
    spec = study.spec(trial, problem.whole_rules)
    key = jax.random.key(trial.seed)
    params = problem.params(jax.random.fold_in(key, 0))
    plan = lk.resolve(spec, params, problem.apply, next(problem.train(0, 0)))
    base, factors = lk.split(params, plan, jax.random.fold_in(key, 1))
    trained = {p: x for p, x in factors.items() if not p.startswith("batch_stats")}
    state = {p: x for p, x in factors.items() if p.startswith("batch_stats")}
    tx = optax.chain(
        optax.clip_by_global_norm(study.clip), optax.adamw(optax.linear_schedule(trial.lr, 0, study.steps))
    )
    opt, keys = tx.init(trained), jax.random.fold_in(key, 2)

    @jax.jit
    def step(trained, state, opt, batch, key):
        def loss(trained):
            out = problem.train_apply(lk.merge(base, trained | state, plan), batch, jax.random.split(key)[0])
            out, new = out if problem.state else (out, {})
            return problem.loss(out, batch), new

        grads, new = jax.grad(loss, has_aux=True)(trained)
        updates, opt = tx.update(grads, opt, trained)
        if new:
            state = {f"batch_stats/{name}": lk.FullLeaf(x) for name, x in new["batch_stats"].items()}
        return optax.apply_updates(trained, updates), state, opt

    stream = problem.train(0, 0)
    for number in range(study.steps):
        trained, state, opt = step(trained, state, opt, next(stream), jax.random.fold_in(keys, number))
    return trained | state


@pytest.mark.parametrize("problem", [dropping, normalising], ids=["dropout", "batchnorm"])
def test_random_and_stateful_trials_equal_their_solo_runs(tmp_path, problem):
    problem, study = problem(), tiny.study(probe_lr=(), rank=[1, 2], steps=8, targets=TARGETS)
    found = lk.run(study, problem, out=tmp_path / "run", progress=False)
    base = problem.params(jax.random.key(0))
    for trial, row in zip(study.trials(), found.rows, strict=True):
        adapter = lk.load_adapter(found.path / row["adapter"], base=base)
        alone = solo(study, problem, trial)
        assert set(adapter.factors) == set(alone)
        for path, leaves in alone.items():
            for x, y in zip(jax.tree.leaves(adapter.factors[path]), jax.tree.leaves(leaves), strict=True):
                np.testing.assert_allclose(x, y, atol=1e-5, err_msg=f"{trial.name} {path}")
        measured = Evaluator(problem, base, adapter.plan.trained, problem.test)(
            lk.merge(base, adapter.factors, adapter.plan)
        )
        assert measured["accuracy"] == row["test_accuracy"]
    if problem.state:
        stats = {p for p in adapter.factors if p.startswith("batch_stats")}
        assert stats == {"batch_stats/mean", "batch_stats/var"}
        assert row["params"] == sum(
            x.size for p, leaves in adapter.factors.items() if p not in stats for x in jax.tree.leaves(leaves)
        )


def test_interrupted_random_and_stateful_trainings_go_on_to_the_same_bits(tmp_path):
    for name, make in (("dropout", dropping), ("batchnorm", normalising)):
        whole = run(tmp_path / f"{name}_whole", make(), steps=10, targets=TARGETS)
        broken, taken = make(), []

        def stream(seed, start, taken=taken):
            for batch in tiny.stream(seed, start):
                taken.append(1)
                if len(taken) == 3 + 7:
                    raise KeyboardInterrupt
                yield batch

        problem = type(broken)(**{f: getattr(broken, f) for f in broken.__dataclass_fields__} | {"train": stream})
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / name, problem, steps=10, targets=TARGETS)
        resumed = run(tmp_path / name, broken, steps=10, targets=TARGETS)
        assert [r["test_loss"] for r in resumed.rows] == [r["test_loss"] for r in whole.rows]


BAD = [
    ({"train": lambda seed, start: iter([tiny.points(0, 16)])}, "end after the first"),
    ({"train": lambda seed, start: tiny.stream(seed, 0)}, "does not begin at `start`"),
    ({"train": lambda seed, start: 3}, "gives a int; it must give an iterator"),
    ({"score": lambda logits, batch: {"loss": jnp.sum(tiny.losses(logits, batch))}}, "has sums without a weight"),
    ({"score": None}, "its loss is a mean of which nobody knows the weight"),
    ({"metrics": ["mse"]}, "metric 'mse' reads the score 'squared_error', which is not there"),
    ({"metrics": ["bleu"]}, "metric 'bleu' is not known, nor whether it is better"),
    ({"metric": "f1"}, "metric of problem 'points' is 'f1', which is not measured; there are loss, accuracy"),
    ({"loss": tiny.losses}, "the loss of problem 'points' has shape (16,) and dtype float32"),
    ({"state": ["up/**"]}, "has state, and no train_apply that gives it anew"),
    ({"state": ["up/**"], "train_apply": lambda p, b, k: tiny.apply(p, b)}, "it must give (outputs, new state)"),
    ({"head": "head/kernel"}, "it must be a list of patterns"),
    ({"apply": lambda p, batch: batch.missing}, "fails on the first batch of val: AttributeError"),
    ({"train_apply": lambda p, batch, key: batch.gone}, "fails on the first training batch: AttributeError"),
]


@pytest.mark.parametrize(("changes", "says"), BAD, ids=[says[:30] for _, says in BAD])
def test_a_part_that_breaks_its_contract_is_named_when_the_problem_is_made(changes, says):
    with pytest.raises(lk.StudyError) as e:
        tiny.problem(**changes)
    assert says in str(e.value)
    assert len(str(e.value).splitlines()) <= 4


def test_a_head_that_matches_nothing_is_named():
    with pytest.raises(lk.PlanError, match="head 'haed/\\*\\*' of problem 'points' matches no parameter"):
        tiny.problem(head=["haed/**"])


def test_scores_out_of_range_are_known_before_training(tmp_path):
    def score(logits, batch):
        found = tiny.score(logits, batch)
        return found._replace(correct=found.correct * 100)

    with pytest.raises(lk.StudyError, match=r"metric 'accuracy' is .*, and must lie between 0 and 1"):
        run(tmp_path / "run", tiny.problem(score=score))
    assert not (tmp_path / "run").exists()


def test_state_that_a_training_pass_does_not_give_is_named():
    problem = normalising()

    def forgets(v, batch, key):
        outputs, new = problem.train_apply(v, batch, key)
        del new["batch_stats"]["var"]
        return outputs, new

    fields = {f: getattr(problem, f) for f in problem.__dataclass_fields__}
    with pytest.raises(lk.StudyError, match="train_apply of problem 'points' does not give 'batch_stats/var'"):
        lk.Problem(**fields | {"train_apply": forgets})


def test_a_problem_of_the_working_directory_may_import_its_neighbours_as_it_is_built(tmp_path, monkeypatch):
    (tmp_path / "own_neighbour.py").write_text("from tests.tiny import problem\n")
    (tmp_path / "own_builder.py").write_text(
        "import lorax_kit as lk\n\n\n@lk.problem_builder\ndef build():\n"
        "    from own_neighbour import problem\n\n    return problem()\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert lk.problem_at("own_builder:build").address == "own_builder:build"
    assert sys.path == before


BUILDS = """
import lorax_kit as lk
from tests import tiny

@lk.problem_builder
def build(rows=32, *, kind=None):
    return tiny.built(rows)

@lk.problem_builder
def many(**settings):
    return tiny.built(**settings)

@lk.problem_builder
def listed(*settings):
    return tiny.built(*settings)

class Group:
    @staticmethod
    @lk.problem_builder
    def build():
        return tiny.built()

def make():
    @lk.problem_builder
    def build(rows):
        return tiny.built(rows)
    return build
"""


def test_what_a_marked_function_builds_remembers_the_call(tmp_path, monkeypatch):
    (tmp_path / "own_calls.py").write_text(BUILDS)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_calls")
    inner = tiny.built(32).address, {"rows": 32}
    for call, address, settings in (
        (own.build, "own_calls:build", {}),
        (lambda: own.build(40), "own_calls:build", {"rows": 40}),
        (lambda: own.build(rows=40, kind="a"), "own_calls:build", {"rows": 40, "kind": "a"}),
        (lambda: own.many(rows=40), "own_calls:many", {"rows": 40}),
        (own.Group.build, "own_calls:Group.build", {}),
        (lambda: own.build(kind=object()), *inner),  # nothing that an adapter could keep
        (lambda: own.build(kind=(1,)), *inner),  # which comes back as a list
        (lambda: own.listed(32), *inner),
        (lambda: own.make()(32), *inner),
    ):
        built = call()
        assert (built.address, built.remembered["settings"]) == (address, settings)
        if address.startswith("own_calls"):
            again = lk.problem_at(address, settings)
            assert [x.shape for x in jax.tree.leaves(again.val)] == [x.shape for x in jax.tree.leaves(built.val)]


def test_a_study_of_a_built_problem_and_of_its_address_are_one(tmp_path, monkeypatch):
    (tmp_path / "own_study.py").write_text(BUILDS)
    monkeypatch.syspath_prepend(tmp_path)
    study = lk.Study(rank=[1], seed=[0], lr=1e-2, steps=2, targets={"up": ["up/kernel"]}, probe_lr=())
    problem = importlib.import_module("own_study").build()
    first = lk.run(study, problem, out=tmp_path / "run", progress=False)
    assert read_meta(next((tmp_path / "run" / "adapters").iterdir()))["address"] == "own_study:build"
    again = lk.run(study, lk.problem_at("own_study:build"), out=tmp_path / "run", progress=False)
    assert len(again.rows) == len(first.rows) == 1
    assert again.compiles == first.compiles
