"""Stacked trials against solo ones: the same numbers, one program, one copy of what they share."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk
from lorax_kit.core.paths import flatten
from lorax_kit.study.programs.engine import Engine
from lorax_kit.study.programs.forms import kinds, trial_plan, union_plan
from lorax_kit.study.programs.packing import pack, start, unpack
from lorax_kit.study.programs.slices import Layout, laid_out
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")

# Sums over a batch run in another order in the stacked program; 20 AdamW steps at 1e-2.
TOLERANCE = 1e-5


def pack_of(study, trials, problem=None, size=None):
    problem = problem or tiny.problem()
    params = problem.params(jax.random.key(0))
    plan = union_plan(study, problem, trials, params, next(problem.train(0, 0)))
    return pack(study, problem, trials, plan, params, size=size)


def trained(study, problem=None, trials=None, mesh=None, layout=None):
    problem = problem or tiny.problem()
    trials = trials or kinds(study, problem, study.trials())[0][0]
    params = problem.params(jax.random.key(0))
    layout = layout or Layout(len(trials), len(trials))
    stacked = pack_of(study, trials, problem, layout.size)
    plan = stacked.plan
    engine = Engine(study, problem, plan, params, layout, mesh)
    if study.stream == "seed":
        streams = [problem.train(seed, 0) for seed in study.streams]
        batches = (jax.tree.map(lambda *x: np.stack(x), *together) for together in zip(*streams, strict=True))
    else:
        batches = problem.train(0, 0)
    return engine.train(stacked, lambda start: batches, problem.val)[0], trials, plan, params, engine


def solo(study, problem, plan, trial, params, seed):
    """The trial alone, by the public functions a user would call, with the schedule written out."""
    own = trial_plan(study, problem, plan, trial, params)
    base, factors = start(problem, own, trial.seed)
    adapted = lk.adapt(problem.apply, own)
    schedule = optax.linear_schedule(trial.lr, 0.0, study.steps)
    tx = lk.partition(optax.adamw(schedule, weight_decay=trial.weight_decay), own, clip=study.clip)

    def loss(base, f, batch):
        return problem.loss(adapted(base, f, batch), batch) + lk.penalty(own, f)

    init, step = lk.make_step(loss, tx)
    state, losses, batches = init(factors), [], problem.train(seed, 0)
    for _ in range(study.steps):
        state, info = step(state, base, next(batches))
        losses.append(float(info.loss))
    return state.factors, losses


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rslora": True, "weight_decay": 0.1},
        {"stream": "seed"},
        {"targets": {"up": ["up/kernel"], "both": ["{up,down}/kernel"]}, "rank": [1, 3], "seed": [0]},
        {"variant": "dora", "probe_lr": ()},
        {"start": "pissa", "rank": [1, 3], "weight_decay": 0.1},
    ],
    ids=["ladder", "rslora", "own streams", "target sets", "dora", "pissa"],
)
def test_stacked_trial_equals_its_solo_run_after_20_steps(changes):
    study, problem = tiny.study(**changes), tiny.problem()
    result, trials, plan, params, _ = trained(study)
    for i, trial in enumerate(trials):
        own = trial_plan(study, problem, plan, trial, params)
        mine = unpack(own, result.factors, i)
        alone, losses = solo(study, problem, plan, trial, params, trial.seed if study.stream == "seed" else 0)
        np.testing.assert_allclose(result.losses[:, i], losses, atol=TOLERANCE, err_msg=trial.name)
        assert set(mine) == set(alone)
        for path in mine:
            for x, y in zip(jax.tree.leaves(mine[path]), jax.tree.leaves(alone[path]), strict=True):
                np.testing.assert_allclose(x, y, atol=TOLERANCE, err_msg=f"{trial.name} {path}")


@pytest.mark.parametrize("stream", ["shared", "seed"])
def test_slice_after_slice_equals_all_at_once(stream):
    """Packs that slices fill, and packs whose last slices are copies, which are not computed."""
    study = tiny.study(rank=[1, 2, 3], probe_lr=3e-2, stream=stream, eval_every=10)
    whole, trials, *_ = trained(study)
    assert len(trials) == 8
    for layout in (Layout(8, 2), Layout(8, 1), Layout(9, 3), Layout(16, 4)):
        sliced, *_, engine = trained(study, layout=layout)
        assert engine.compiles == 1
        np.testing.assert_allclose(sliced.losses[:, :8], whole.losses, atol=TOLERANCE, err_msg=str(layout))
        for x, y in zip(jax.tree.leaves(sliced.factors), jax.tree.leaves(whole.factors), strict=True):
            np.testing.assert_allclose(x[:8], y, atol=TOLERANCE, err_msg=str(layout))
        for (step, ours), (again, theirs) in zip(sliced.evaluations, whole.evaluations, strict=True):
            assert step == again
            assert [m["loss"] for m in ours] == pytest.approx([m["loss"] for m in theirs], abs=TOLERANCE)
        untouched = [x[12:] for x in jax.tree.leaves(sliced.factors) if layout.size == 16]
        start = [x[-1] for x in jax.tree.leaves(pack_of(study, trials).factors)]
        for x, y in zip(untouched, start, strict=False):
            np.testing.assert_array_equal(x, np.broadcast_to(y, x.shape))


def test_layouts_fit_and_waste_few_places():
    for trials, most, devices in itertools.product(range(1, 40), range(1, 12), (1, 3)):
        for at_once in range(1, most + 1):
            layout = laid_out(trials, most, at_once, devices)
            case = (trials, most, devices, at_once, layout)
            assert layout.size % layout.width == 0, case
            assert 1 <= layout.at_once <= at_once, case
            assert layout.size <= most * devices, case
            assert -(-trials // layout.size) == -(-trials // (most * devices)), case
    assert laid_out(24, 100, 5) == Layout(24, 4)
    assert laid_out(25, 100, 2) == Layout(25, 1)


def test_batches_of_two_shapes_compile_twice_and_equal_the_solo_run():
    def stream(seed, begin):
        for step, batch in enumerate(tiny.stream(seed, begin), begin):
            yield jax.tree.map(lambda x: x[: 8 + 8 * (step % 2 == 0)], batch)  # noqa: B023

    study, problem = tiny.study(), tiny.problem(train=stream)
    result, trials, plan, params, engine = trained(study, problem)
    assert engine.compiles == 2
    for i in (0, len(trials) - 1):
        _, losses = solo(study, problem, plan, trials[i], params, 0)
        np.testing.assert_allclose(result.losses[:, i], losses, atol=TOLERANCE)


def test_trials_differ_where_they_should():
    """The test above would pass for trials that all do the same."""
    result, trials, *_ = trained(tiny.study())
    last = {trial.name: loss for trial, loss in zip(trials, result.losses[-1], strict=True)}
    assert len({round(float(x), 6) for x in last.values()}) == len(trials)


def test_all_ranks_and_the_probe_share_one_compiled_step():
    study = tiny.study()
    traces = []

    def apply(p, batch):
        traces.append(1)
        return tiny.apply(p, batch)

    problem = tiny.problem(apply=apply)
    traces.clear()
    *_, engine = trained(study, problem)
    assert engine.compiles == 1
    # The plan's trace, and the step's (adapt and vmap see the function once each); never one per trial or step.
    assert len(traces) <= 4


def test_rows_above_the_rank_stay_exactly_zero():
    study = tiny.study(weight_decay=0.1)
    result, trials, *_ = trained(study)
    for i, trial in enumerate(trials):
        a = result.factors["up/kernel"].a[i]
        assert not np.any(a[trial.rank :])
        assert trial.rank == 0 or np.all(np.any(a[: trial.rank], axis=1))


def test_unpack_refuses_rows_that_moved():
    study, problem = tiny.study(), tiny.problem()
    result, trials, plan, params, _ = trained(study)
    bad = jax.tree.map(lambda x: x + 1, result.factors)
    with pytest.raises(lk.StudyError, match="no longer zero"):
        unpack(trial_plan(study, problem, plan, trials[0], params), bad, 0)


def compiled(study, problem, trials, layout=None):
    stacked = pack_of(study, trials, problem)
    params = problem.params(jax.random.key(0))
    engine = Engine(study, problem, stacked.plan, params, layout or Layout(len(trials), len(trials)))
    return engine.compile(*engine.begin(stacked), next(problem.train(0, 0)))


def flops(study, problem, trials):
    return compiled(study, problem, trials).cost_analysis()["flops"]


def test_the_frozen_prefix_is_computed_once_for_all_trials():
    """Ten frozen layers before the first site: eight trials must not cost eight times one."""
    deep = jnp.asarray(np.random.default_rng(0).normal(size=(10, 6, 6)) / 6**0.5, jnp.float32)

    def apply(p, batch):
        x = batch.x
        for i in range(10):
            x = jnp.tanh(x @ p["deep"][i])
        return tiny.apply(p, batch._replace(x=x))

    problem = tiny.problem(apply=apply, params=lambda key: tiny.params(key) | {"deep": deep})
    study = tiny.study(rank=1, seed=range(8), probe_lr=())
    trials = study.trials()
    one, eight = (flops(study, problem, trials[:n]) for n in (1, 8))
    without = [flops(study, tiny.problem(), trials[:n]) for n in (1, 8)]
    # Eight trials add the same work with and without the prefix: it is not among what is repeated.
    assert eight - one == pytest.approx(without[1] - without[0], rel=0.02)
    assert one - without[0] >= 10 * 2 * 16 * 6 * 6
    # Slice after slice, too: XLA takes the ten products out of the loop over slices.
    entry = compiled(study, problem, trials, Layout(8, 2)).as_text().partition("ENTRY ")[2]
    assert " while(" in entry
    assert entry.count("= f32[16,6]") >= 10


def test_a_nan_stops_its_trial_and_only_that():
    study = tiny.study(rank=[1, 2], lr=[1e-2], seed=[0, 1])
    healthy, trials, *_ = trained(study)

    def params(key):
        """Seed 1 starts with a head so large that its loss overflows."""
        p = tiny.params(key)
        seed_one = jax.random.fold_in(jax.random.key(1), 0)
        bad = jnp.all(jax.random.key_data(key) == jax.random.key_data(seed_one))
        return p | {"head": jax.tree.map(lambda x: jnp.where(bad, jnp.inf, x), p["head"])}

    result, *_ = trained(study, tiny.problem(params=params))
    for i, trial in enumerate(trials):
        if trial.seed == 1:
            assert result.failed[i] == 1
        else:
            assert result.failed[i] == 0
            np.testing.assert_array_equal(result.losses[:, i], healthy.losses[:, i])


def test_trials_sharded_over_devices_equal_one_device():
    study = tiny.study(rank=[1, 2, 3], probe_lr=3e-2)
    assert len(study.trials()) == 8
    alone, *_ = trained(study)
    mesh = lk.device_mesh("trial", jax.devices()[:4])
    spread, *_, engine = trained(study, mesh=mesh)
    assert engine.compiles == 1
    np.testing.assert_allclose(spread.losses, alone.losses, atol=TOLERANCE)
    for x, y in zip(jax.tree.leaves(spread.factors), jax.tree.leaves(alone.factors), strict=True):
        np.testing.assert_allclose(x, y, atol=TOLERANCE)


MESHES = [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]


@pytest.mark.parametrize("stream", ["shared", "seed"])
def test_trials_and_data_on_one_mesh_equal_one_device(stream):
    """What devices send each other is the gradient of the factors, once per trial: never the base's."""
    study = tiny.study(rank=[1, 2, 3], probe_lr=3e-2, stream=stream, clip=None)
    alone, trials, *_ = trained(study)
    params = flatten(tiny.params(jax.random.key(0)))[0]
    for shape in MESHES:
        # On two devices the trials of each follow each other two by two.
        layout = Layout(8, 2, 2) if shape[0] == 2 else None
        spread, *_, engine = trained(study, mesh=lk.study_mesh(*shape), layout=layout)
        assert engine.compiles == 1, shape
        np.testing.assert_allclose(spread.losses, alone.losses, atol=TOLERANCE, err_msg=str(shape))
        for x, y in zip(jax.tree.leaves(spread.factors), jax.tree.leaves(alone.factors), strict=True):
            np.testing.assert_allclose(x, y, atol=TOLERANCE, err_msg=str(shape))
        local = len(trials) // shape[0]
        grads = sum(x.nbytes for x in jax.tree.leaves(alone.factors)) // shape[0]
        few = 4 * 8 * local * engine.layout.slices  # the losses and norms of its trials
        if shape[1] == 1:
            assert engine.collective_bytes <= 16 * len(trials), shape  # losses, norms, whether they are finite
        else:
            assert grads <= engine.collective_bytes <= grads + few, shape
        assert engine.collective_bytes < grads + sum(x.nbytes for x in params.values())


@pytest.mark.parametrize("shape", [(2, 1, 2), (1, 2, 2), (1, 1, 4)])
def test_a_base_in_parts_trains_the_same_trials(monkeypatch, shape):
    monkeypatch.setattr("lorax_kit.study.programs.engine.base_layout", partial(lk.layout, smallest=1))
    study, (trials, data, fsdp) = tiny.study(rank=[1, 2, 3], probe_lr=3e-2), shape
    alone, *_ = trained(study)
    spread, *_, engine = trained(study, mesh=lk.study_mesh(trials, data, fsdp=fsdp))
    kernel = engine.base["up/kernel"]
    assert kernel.addressable_shards[0].data.nbytes * fsdp == kernel.nbytes
    np.testing.assert_allclose(spread.losses, alone.losses, atol=TOLERANCE)
    for x, y in zip(jax.tree.leaves(spread.factors), jax.tree.leaves(alone.factors), strict=True):
        np.testing.assert_allclose(x, y, atol=TOLERANCE)


def test_batches_that_do_not_split_over_the_mesh_are_named():
    def stream(seed, start):
        while True:
            yield tiny.points(0, 15)

    with pytest.raises(lk.StudyError, match="a batch of 15 examples of problem 'points' does not split over 2 devices"):
        trained(tiny.study(), tiny.problem(train=stream), mesh=lk.study_mesh(1, 2))
    with pytest.raises(lk.LoraxError, match="a mesh of 64 x 1 x 1 devices needs 64"):
        lk.study_mesh(64)


def test_base_is_bitwise_unchanged():
    *_, params, _ = trained(tiny.study())
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(tiny.params(jax.random.key(0))), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
