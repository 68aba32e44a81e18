"""What is claimed of smaller ranks, of more seeds and of the examples follows from the statistics of `analysis`."""

import numpy as np
import pytest

from lorax_kit.analysis.statistics.conditions import limits, over_examples, seeds_to_tell
from lorax_kit.report import read_run
from lorax_kit.report.answer import answer
from lorax_kit.report.claims import (
    add_seeds,
    examples_error,
    more_seeds,
    not_inferior_text,
    power,
    smallest_not_inferior,
)
from lorax_kit.report.conditions import differences, summarise
from tests.report import fake_run

PERPLEXITY = {"metric": "ppl", "metrics": [{"name": "ppl", "better": "lower", "format": ".4g"}]}


def ladder(folder, gaps, seeds=8, noise=0.002, **study):
    """Ranks 1, 2, 4, ... whose mean test accuracies are 0.9 minus the gaps; validation rises with the rank."""
    rng = np.random.default_rng(1)
    scores = {}
    for k, gap in enumerate(gaps):
        scores[2**k, 1e-3] = [(0.8 + 0.01 * k, float(x)) for x in 0.9 - gap + rng.normal(0, noise, seeds)]
    return fake_run.from_scores(folder, scores, **study)


def test_the_smallest_rank_within_the_margin_is_named_with_its_limit(tmp_path):
    found = summarise(read_run(ladder(tmp_path, (0.05, 0.003, 0.002, 0.0))))
    gap = differences(next(c for c in found.ladder if c.rank == 2), found.best, "test_accuracy")
    low, _ = limits(gap)
    assert smallest_not_inferior(found).smallest[0][-1] == 2
    text = not_inferior_text(found)
    assert "The smallest rank shown to be not inferior to rank 8, within a margin of 1.00 points, is 2" in text
    assert f"rank 2 is at worst {-100 * low:.2f} points worse, 8 seeds" in text
    assert "Below it, rank 1 is at worst 5" in text
    assert text in answer(found)


def test_no_rank_is_claimed_beyond_the_margin(tmp_path):
    run = ladder(tmp_path, (0.05, 0.03, 0.0))
    assert "No smaller rank is shown to be as good as rank 4 within a margin of 1.00 points" in not_inferior_text(
        summarise(read_run(run))
    )
    wide = summarise(read_run(run), margin=0.04)
    assert "within a margin of 4.00 points, is 2" in not_inferior_text(wide)
    with pytest.raises(ValueError, match="margin is 0; it must be above zero"):
        summarise(read_run(run), margin=0.0)


def test_the_margin_of_the_study_counts_unless_another_is_given(tmp_path):
    design = ladder(tmp_path / "design", (0.05, 0.0), design={"margin": 0.03})
    assert summarise(read_run(design)).margin == 0.03
    run = ladder(tmp_path, (0.05, 0.03, 0.0), margin=0.04)
    assert summarise(read_run(run)).margin == 0.04
    assert summarise(read_run(run), margin=0.02).margin == 0.02


def test_a_metric_that_is_no_share_needs_a_margin(tmp_path):
    def change(t):
        own = 20.0 - t["rank"] / 10 + 0.01 * (t["rank"] * t["seed"] % 5)
        return {"val_ppl": own, "test_ppl": own}

    run = fake_run.build(tmp_path, ranks=(1, 4, 8), probe=False, spectra=False, change=change, study=PERPLEXITY)
    found = summarise(read_run(run))
    assert found.best.rank == 8
    assert "No margin was stated for the ppl" in not_inferior_text(found)
    assert power(found) is None
    assert examples_error(found, found.best, found.metric) is None, "its spread over examples is not recorded"
    stated = summarise(read_run(run), margin=0.5)
    text = not_inferior_text(stated)
    assert "within a margin of 0.5, is 4" in text, "lower is better: rank 4 is 0.4 worse"
    assert "Below it, rank 1 is at worst 0.7" in text


def test_the_power_note_is_that_of_the_differences(tmp_path):
    found = summarise(read_run(ladder(tmp_path, (0.01, 0.0), seeds=4, noise=0.01)))
    other, told = power(found)
    gap = differences(other, found.best, "test_accuracy")
    assert told == seeds_to_tell(gap, 0.01)
    assert f"takes about {told.seeds} seeds" in answer(found)[-1]
    _, command = more_seeds(found)
    assert f"seed=range({max(6, told.seeds)})" in command


def test_no_absurd_number_of_seeds_is_proposed(tmp_path):
    run = ladder(tmp_path, (0.01, 0.0), seeds=8, noise=0.2)
    found = summarise(read_run(run), margin=0.001)
    assert power(found)[1].seeds > 1000
    assert more_seeds(found) is None
    few = summarise(read_run(ladder(tmp_path / "few", (0.01, 0.0), seeds=3, noise=0.2)), margin=0.001)
    assert "seed=range(6)" in more_seeds(few)[1]


def test_what_the_finite_validation_set_leaves_open_is_said(tmp_path):
    scores = {(1, 1e-3): [(0.79, 0.8)] * 2, (2, 1e-3): [(0.60, 0.8)] * 2, (4, 1e-3): [(0.80, 0.8)] * 2}
    found = summarise(read_run(fake_run.from_scores(tmp_path, scores, task={"val": 100})))
    low, high = over_examples(0.8, 100)[1:3]
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}, Wilson, 100 validation examples"
    assert (
        f"its mean accuracy, 80.0 % ({interval}), would differ on other examples, whatever the seeds; "
        "rank 1 lies within that interval."
    ) in answer(found)[1]


def test_enough_seeds_ask_for_no_more(tmp_path):
    found = summarise(read_run(ladder(tmp_path, (0.05, 0.0), seeds=8, noise=0.001)))
    assert more_seeds(found) is None


COMMANDS = {
    "lorax-kit study --config a.json --out runs/a": "lorax-kit study --config a.json --out runs/a --seeds 6",
    "lorax-kit study --config 'a b.json' --out r --json --overwrite --seeds 3": (
        "lorax-kit study --config 'a b.json' --out r --seeds 6"
    ),
    "lorax-kit study --seeds=3 --out=r --config a.json": "lorax-kit study --out=r --config a.json --seeds 6",
    "python mine.py": "lk.run(dataclasses.replace(study, seed=range(6)), problem, out={run})",
    "lorax-kit study 'unclosed": "lk.run(dataclasses.replace(study, seed=range(6)), problem, out={run})",
    "": "lk.run(dataclasses.replace(study, seed=range(6)), problem, out={run})",
}


@pytest.mark.parametrize(("command", "wanted"), COMMANDS.items())
def test_the_command_that_adds_seeds(tmp_path, command, wanted):
    run = read_run(fake_run.from_scores(tmp_path / "a run", {(1, 1e-3): [(0.8, 0.8)]}, command=command))
    assert add_seeds(run, 6) == wanted.format(run=repr(str(run.path)))


def test_the_error_of_the_examples_is_apart(tmp_path):
    run = fake_run.from_scores(tmp_path, {(1, 1e-3): [(0.8, 0.75), (0.8, 0.85)]}, task={"test": 400, "val": 100})
    found = summarise(read_run(run))
    assert examples_error(found, found.best, "test_accuracy") == over_examples(0.8, 400)
    assert examples_error(found, found.best, "val_accuracy") == over_examples(0.8, 100)
