"""Trials that start from data, stacked: what each trains is what it would train alone, for every rank."""

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.study.programs.forms import trial_plan, union_plan
from lorax_kit.study.programs.packing import pack, start, unpack
from tests import tiny


def hinted(study):
    """The tiny problem with calibrated inputs and gradients of what the study adapts."""
    problem = tiny.problem()
    params, batch = problem.params(jax.random.key(0)), next(problem.train(0, 0))
    plan = union_plan(study, problem, study.trials(), params, batch)
    stats = lk.calibrate(
        problem.apply, params, plan, [batch], loss=problem.loss, collect=["inputs", "gradient"], progress=False
    )
    return tiny.problem(hints=stats), params, plan


@pytest.mark.parametrize("name", ["eva", "lora_ga", "corda_kpm"])
def test_a_trial_begins_as_alone_with_rows_of_zero_behind_its_rank(name):
    study = tiny.study(rank=[2, 4], seed=[0], start=name, probe_lr=())
    problem, params, plan = hinted(study)
    stacked = pack(study, problem, study.trials(), plan, params)
    for i, trial in enumerate(study.trials()):
        own = trial_plan(study, problem, plan, trial, params)
        alone, mine = start(problem, own, trial.seed)[1], unpack(own, stacked.factors, i)
        for path in own.trained:
            for x, y in zip(jax.tree.leaves(mine[path]), jax.tree.leaves(alone[path]), strict=True):
                assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), (trial.name, path)


def test_a_study_without_the_data_says_so():
    study = tiny.study(rank=[2], seed=[0], start="eva", probe_lr=())
    _, params, plan = hinted(study)
    with pytest.raises(lk.PlanError, match=r"start 'eva' at '(up|down)/kernel' needs the inputs of the data there"):
        pack(study, tiny.problem(), study.trials(), plan, params)
