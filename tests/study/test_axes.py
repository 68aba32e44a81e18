"""Axes of a study: what shares a program, that every trial equals its solo run, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.problem.base import based
from lorax_kit.problem.objective import loss_scale
from lorax_kit.study.programs.optimiser import maker
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")

STEPS = 8


def study(**changes):
    return tiny.study(**{"probe_lr": (), "rank": [1, 4], "seed": [0], "steps": STEPS, "lr": 1e-2} | changes)


def run(out, study, problem=None):
    return lk.run(study, problem or tiny.problem(), out=out, progress=False)


def groups_of(results):
    return json.loads((results.path / "study.json").read_text())["groups"]


def alone(study, problem, trial):
    """Factors and base of a trial by public functions: its own plan, its own ranks, no stack."""
    key = jax.random.key(trial.seed)
    spec = study.spec(trial, problem.whole_rules)
    size = {} if trial.batch_size is None else {"batch_size": trial.batch_size}
    batches = problem.train(0, 0, **size)
    batch = next(batches)
    params = problem.params(jax.random.fold_in(key, 0))
    plan = lk.resolve(spec, based(params, trial.dtype, None, ()), problem.apply, batch)
    base = based(params, trial.dtype, trial.quantise, [site.path for site in plan.sites])
    _, factors = lk.split(base, plan, jax.random.fold_in(key, 1))
    heads = {leaf.path: params["head"][leaf.path.split("/")[1]] for leaf in plan.full}
    factors |= {path: lk.FullLeaf(jnp.asarray(x, jnp.float32)) for path, x in heads.items()}
    given = dict(trial.hyper) | ({"weight_decay": trial.weight_decay} if trial.weight_decay else {})
    given = {k: v for k, v in given.items() if k != "smoothing"}
    tx = maker(study, trial.optimizer)(optax.linear_schedule(trial.lr, 0.0, study.steps), **given)
    if trial.lr_ratio != 1:
        tx = lk.lora_plus(tx, plan, ratio=trial.lr_ratio)
    adapted, own = lk.adapt(problem.apply, plan), {k: v for k, v in trial.hyper if k == "smoothing"}

    def loss(base, factors, batch, key=None):
        return problem.loss(adapted(base, factors, batch, dropout_key=key), batch, **own)

    init, step = lk.make_step(loss, lk.partition(tx, plan, clip=study.clip), accumulate=trial.accumulate)
    state = init(factors, jax.random.fold_in(key, 2) if trial.dropout else None)
    for _ in range(study.steps):
        state, _ = step(state, base, batch)
        batch = next(batches)
    return state, base, plan


def check_alone(study, problem, results, tolerance=1e-5):
    for trial, row in zip(study.trials(), results.rows, strict=True):
        assert row["status"] == "done", trial.name
        state, base, _ = alone(study, problem, trial)
        saved = lk.load_adapter(results.path / row["adapter"], base=base).factors
        assert set(saved) == set(state.factors)
        for path, leaves in state.factors.items():
            for x, y in zip(jax.tree.leaves(saved[path]), jax.tree.leaves(leaves), strict=True):
                np.testing.assert_allclose(x, y, atol=tolerance, err_msg=f"{trial.name} {path}")


OPTIMISERS = [
    ("adam", {}, 1),
    ("lion", {}, 1),
    ("sgd", {"hyper": {"momentum": 0.9}}, 1),
    ("adamw", {"hyper": {"b2": [0.9, 0.99]}, "rank": [1, 2]}, 1),
    ("rmsprop", {}, 1),
    ("adafactor", {"lr": 0.1}, 2),
    ("muon", {}, 2),
    ("contrib", {}, 1),
]


@pytest.mark.parametrize(("name", "changes", "programs"), OPTIMISERS, ids=[o[0] for o in OPTIMISERS])
def test_trials_of_any_optimiser_equal_their_solo_runs(tmp_path, name, changes, programs):
    """Adafactor and Muon mix the rows of a leaf: there each rank has a program of its own."""
    name = "dog" if name == "contrib" else name
    one = study(**{"optimizer": name} | changes)
    results = run(tmp_path / "run", one)
    check_alone(one, tiny.problem(), results, tolerance=2e-5)
    assert len(groups_of(results)) == programs


def test_schedule_free_trials_are_measured_at_their_average(tmp_path):
    one = study(optimizer="schedule_free_adamw", schedule="constant")
    results = run(tmp_path / "run", one)
    assert len(groups_of(results)) == 1
    problem = tiny.problem()
    for trial, row in zip(one.trials(), results.rows, strict=True):
        key = jax.random.key(trial.seed)
        params = problem.params(jax.random.fold_in(key, 0))
        plan = lk.resolve(one.spec(trial, problem.whole_rules), params, problem.apply, next(problem.train(0, 0)))
        base, factors = lk.split(params, plan, jax.random.fold_in(key, 1))
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.contrib.schedule_free_adamw(trial.lr))
        adapted, state, batches = lk.adapt(problem.apply, plan), tx.init(factors), problem.train(0, 0)

        def loss(factors, batch, adapted=adapted, base=base):
            return problem.loss(adapted(base, factors, batch), batch)

        for _ in range(STEPS):
            grads = jax.grad(loss)(factors, next(batches))
            updates, state = tx.update(grads, state, factors)
            factors = optax.apply_updates(factors, updates)
        wanted = optax.contrib.schedule_free_eval_params(state[1], factors)
        saved = lk.load_adapter(results.path / row["adapter"], base=base).factors
        for path, leaves in wanted.items():
            for x, y in zip(jax.tree.leaves(saved[path]), jax.tree.leaves(leaves), strict=True):
                np.testing.assert_allclose(x, y, atol=1e-5, err_msg=path)


def noisy(learning_rate, sigma=0.1):
    """Moves every row, zero ones too: a mask must hold them."""

    def init(params):
        return optax.EmptyState()

    def update(grads, state, params=None):
        return jax.tree.map(lambda g: -0.01 * g + sigma * 0.01, grads), state

    return optax.GradientTransformation(init, update)


def test_rows_that_an_optimiser_would_move_are_held_at_zero(tmp_path):
    one = study(optimizer=noisy, hyper={"sigma": [0.1, 0.2]})
    results = run(tmp_path / "run", one)
    assert len(groups_of(results)) == 1
    check_alone(one, tiny.problem(), results)


def clipped(learning_rate, limit):
    """Mixes the rows of a leaf, but only where the limit is near."""
    return optax.chain(
        optax.scale_by_adam(), optax.clip_by_block_rms(limit), optax.scale_by_learning_rate(learning_rate)
    )


@pytest.mark.parametrize("limits", [[1e3, 0.2], [0.2, 1e3]])
def test_rows_that_some_scalars_mix_have_programs_of_their_own(tmp_path, limits):
    one = study(optimizer=clipped, hyper={"limit": limits})
    results = run(tmp_path / "run", one)
    assert len(groups_of(results)) == len({row["rank"] for row in results.rows})
    check_alone(one, tiny.problem(), results)


def test_rows_that_large_gradients_mix_have_programs_of_their_own(tmp_path):
    def capped(learning_rate):
        return optax.chain(optax.clip_by_block_rms(5.0), optax.sgd(learning_rate))

    problem = tiny.problem(loss=lambda logits, batch: 1e4 * jnp.mean(tiny.losses(logits, batch)))
    one = study(optimizer=capped, clip=None)
    results = run(tmp_path / "run", one, problem)
    assert len(groups_of(results)) == len({row["rank"] for row in results.rows})
    check_alone(one, problem, results)


def test_traced_axes_share_one_program(tmp_path):
    """Rates per leaf, decays, seeds, alphas and a scalar of the loss: one compilation for 16 trials."""

    def loss(logits, batch, smoothing=0.0):
        mean = -jnp.mean(jax.nn.log_softmax(logits))
        return (1 - smoothing) * jnp.mean(tiny.losses(logits, batch)) + smoothing * mean

    one = study(rank=[1, 2], weight_decay=[0.0, 0.3], lr_ratio=[1.0, 8.0], hyper={"smoothing": [0.0, 0.2]}, seed=[1])
    problem = tiny.problem(loss=loss)
    results = run(tmp_path / "run", one, problem)
    assert results.compiles <= 2  # trials without weight decay may have a program of their own
    check_alone(one, problem, results)
    assert {row["hyper_smoothing"] for row in results.rows} == {0.0, 0.2}
    assert {(row["weight_decay"], row["lr_ratio"]) for row in results.rows} == {
        (w, r) for w in (0, 0.3) for r in (1, 8)
    }


def sized(seed, start, *, batch_size=16):
    step = start
    while True:
        yield tiny.points(1000 * (seed + 1) + step, batch_size)
        step += 1


CONDITIONS = [
    ({"dropout": [0.0, 0.25, 0.5]}, 1e-5),
    ({"start": ["kaiming", "pissa"]}, 1e-5),
    ({"batch_size": [8, 16], "rank": 2}, 1e-5),
    ({"accumulate": [1, 4], "rank": 2}, 1e-5),
    ({"quantise": [None, "int8"], "rank": 2}, 1e-5),
    ({"dtype": [None, "bfloat16"], "rank": 2}, 2e-2),
]


@pytest.mark.parametrize(("changes", "tolerance"), CONDITIONS, ids=[next(iter(c)) for c, _ in CONDITIONS])
def test_each_condition_is_a_program_and_equals_its_solo_run(tmp_path, changes, tolerance):
    one, problem = study(**changes), tiny.problem(train=sized, apply=relaxed)
    results = run(tmp_path / "run", one, problem)
    assert len(groups_of(results)) == 2
    check_alone(one, problem, results, tolerance)
    (axis,) = [name for name in changes if name != "rank"]
    assert {row[axis] for row in results.rows} == set(changes[axis])


def test_small_gradients_are_kept_whether_the_study_or_the_problem_asks_for_float16(tmp_path):
    """Both take gradients of 1,024 times the loss."""

    def half(key):
        return jax.tree.map(lambda x: x.astype(jnp.float16), tiny.params(key))

    def rounded(key):
        return jax.tree.map(lambda x: x.astype(jnp.float32), half(key))

    asked = run(tmp_path / "a", study(dtype="float16", rank=2), tiny.problem(apply=relaxed, params=rounded))
    held = run(tmp_path / "b", study(rank=2), tiny.problem(apply=relaxed, params=half))
    losses = [[row["val_loss"] for row in results.rows] for results in (asked, held)]
    np.testing.assert_array_equal(*losses)
    params, spec = tiny.params(jax.random.key(0)), lk.Spec({"up/kernel": lk.LoRA(rank=1)})
    assert loss_scale(params, lk.resolve(spec, params)) == 1
    assert loss_scale(half(jax.random.key(0)), lk.resolve(spec, half(jax.random.key(0)))) == 1024


def relaxed(p, batch):
    h = jnp.tanh(batch.x.astype(p["first"]["kernel"].dtype) @ p["first"]["kernel"])
    h = jnp.tanh(h @ p["up"]["kernel"]) @ p["down"]["kernel"]
    return (h @ p["head"]["kernel"] + p["head"]["bias"][None]).astype(jnp.float32)


def test_grids_give_methods_the_ranks_that_suit_them(tmp_path):
    one = study(
        grids=[
            {"variant": ["lora", "dora"], "rank": [1, 2]},
            {"variant": "lokr", "settings": {"lokr": {"factor": 2}}},
            {"variant": "ia3", "rank": 1, "alpha": None, "lr": [1e-2, 1e-1]},
        ],
        rank=2,
        alpha=4,
    )
    names = [trial.name for trial in one.trials()]
    assert names == [
        "r1_a4_lr0.01_upper_s0",
        "r2_a4_lr0.01_upper_s0",
        "dora_r1_a4_lr0.01_upper_s0",
        "dora_r2_a4_lr0.01_upper_s0",
        "lokr_r2_a4_lr0.01_upper_factor-2_s0",
        "ia3_r1_a1_lr0.01_upper_s0",
        "ia3_r1_a1_lr0.1_upper_s0",
    ]
    assert lk.Study.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    results = run(tmp_path / "run", one)
    assert [row["trial"] for row in results.rows] == names
    assert len({row["params"] for row in results.rows}) >= 4


def test_samples_are_drawn_once_and_cover_their_ranges():
    ranges = {"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "rank": [1, 2, 4, 8], "hyper.b2": {"low": 0.9, "high": 1}}
    one = study(sample=lk.Sample(conditions=16, ranges=ranges, seed=3), seed=[0, 1])
    trials = one.trials()
    assert len(trials) == 32
    assert one.trials() == trials
    assert lk.Study.from_dict(json.loads(json.dumps(one.to_dict()))).trials() == trials
    lrs = np.log10([t.lr for t in trials if t.seed == 0])
    assert np.histogram(lrs, bins=4, range=(-4, -1))[0].tolist() == [4, 4, 4, 4]  # Sobol: each quarter alike
    assert sorted({t.rank for t in trials}) == [1, 2, 4, 8]
    assert all(0.9 <= dict(t.hyper)["b2"] <= 1 for t in trials)
    other = study(sample=lk.Sample(conditions=16, ranges=ranges, seed=3, kind="random"), seed=[0, 1]).trials()
    assert {t.lr for t in other} != {t.lr for t in trials}


BAD = [
    ({"hyper": {"momentum": 0.9}}, "study hyper 'momentum' is read by nothing: optimizer 'adamw' has no such keyword"),
    ({"optimizer": "sgd", "weight_decay": 0.1}, "study weight_decay is 0.1, and optimizer 'sgd' has none"),
    ({"optimizer": "adamv"}, "optimizer 'adamv' is no optimiser of optax or optax.contrib"),
    ({"optimizer": "no_such_module:make"}, "optimizer 'no_such_module:make' cannot be imported"),
    ({"batch_size": 8}, "study batch_size is 8, and train of problem 'points' takes none"),
    ({"hyper": {"lr": 1}}, "study hyper holds 'lr', which is an axis of the study"),
    ({"hyper": {"b2": "high"}}, "study hyper 'b2' holds 'high'; it must be a number"),
    ({"dropout": 1.0}, "study dropout holds 1.0; it must be a number in [0, 1)"),
    ({"dtype": "int8"}, "study dtype holds 'int8'; it must be None, float32"),
    ({"quantise": "int3"}, "study quantise holds 'int3'; it must be None, int8"),
    ({"grids": [{"ranks": [1]}]}, "grid 1 of the study has the unknown axis 'ranks'"),
    ({"grids": [{"targets": "lower"}]}, "targets 'lower' of a grid are unknown; the study has upper"),
    ({"grids": [{}], "sample": {"conditions": 2, "ranges": {"rank": [1]}}}, "a study has grids or a sample, not both"),
    ({"sample": {"conditions": 2, "ranges": {"ranks": [1]}}}, "sample ranges hold 'ranks', which is no axis"),
    ({"sample": {"conditions": 0, "ranges": {"rank": [1]}}}, "sample conditions is 0"),
    ({"sample": {"conditions": 2, "ranges": {"lr": {"low": 1, "high": 0.1}}}}, "it must be low < high"),
    ({"sample": {"ranges": {}}}, "it must be an object with conditions, ranges"),
    ({"variant": "ia3", "rank": 2, "alpha": None}, "study variant 'ia3' has no rank; give rank=1."),
    ({"variant": "ia3", "rank": 1, "alpha": None, "dropout": 0.1}, "study variant 'ia3' has no dropout"),
    ({"variant": "vera", "alpha": None, "lr_ratio": 4, "optimizer": "schedule_free_sgd", "rank": 1}, None),
]


@pytest.mark.parametrize(("changes", "says"), [b for b in BAD if b[1]], ids=[b[1][:40] for b in BAD if b[1]])
def test_what_nothing_reads_or_fits_is_refused_before_anything_is_written(tmp_path, changes, says):
    with pytest.raises(lk.LoraxError) as e:
        run(tmp_path / "run", study(**changes))
    assert says in str(e.value)
    assert len(str(e.value).splitlines()) <= 4
    assert not (tmp_path / "run").exists()


def test_a_quantised_trial_does_not_depend_on_the_other_target_sets(tmp_path):
    """Its base is quantised where it is adapted, and its tests are of that base."""
    common = {"quantise": "int8", "rank": 1, "seed": [0]}
    targets = {"a": ["up/kernel"], "b": ["up/kernel", "first/kernel"]}
    grids = [{"dropout": 0.0, "targets": ["a", "b"]}, {"dropout": 0.5, "targets": ["a"]}]
    many = run(tmp_path / "many", study(**common, targets=targets, grids=grids))
    few = run(tmp_path / "few", study(**common, targets=targets, grids=[grids[0] | {"targets": ["a"]}, grids[1]]))
    found = {row["trial"]: row for row in many.rows}
    assert len(found) == 3
    for row in few.rows:
        for name in ("train_loss", "val_loss", "test_loss"):
            assert found[row["trial"]][name] == pytest.approx(row[name], abs=1e-7), (row["trial"], name)
