"""Metrics: a direction that is said, values that add up over batches, and what is refused."""

import math

import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.problem import ACCURACY, PERPLEXITY
from lorax_kit.problem.metric import standard, with_loss
from lorax_kit.problem.sums import means_of, sums_of

BAD = [
    (lambda: lk.Metric("bleu", better="max"), "metric 'bleu' has better='max'; it must be 'higher' or 'lower'."),
    (lambda: lk.Metric("top-1", better="higher"), "metric name 'top-1' goes into column names"),
    (lambda: lk.Metric("examples", better="higher"), "metric name 'examples' is taken"),
    (lambda: lk.Metric("f", better="higher", of="a", of_outputs=max), "metric 'f' has both of= and of_outputs="),
    (lambda: lk.Metric("f", better="higher", of=3), "metric 'f' has of=3; it must be a function"),
    (lambda: lk.Metric("f", better="higher", format="d"), "metric 'f' has format='d'; it must be one for a float"),
    (lambda: lk.Metric("f", better="higher", bounds=(1, 0)), "metric 'f' has bounds=(1, 0); give (least, greatest)"),
    (lambda: standard("bleu"), "metric 'bleu' is not known, nor whether it is better when higher or lower."),
    (lambda: with_loss(["mse", lk.Metric("mse", better="lower")]), "there are two metrics named 'mse'."),
    (lambda: ACCURACY({"loss": 1.0}), "metric 'accuracy' reads the score 'correct', which is not there"),
    (lambda: ACCURACY({"correct": 1.2}), "metric 'accuracy' is 1.2, and must lie between 0 and 1."),
    (lambda: lk.Metric("f", better="lower")({"f": np.ones(3)}), "metric 'f' came to shape (3,); it must be one number"),
    (lambda: sums_of({"loss": 1.0}, "P"), "the score of P has sums without a weight: nothing says what 'loss' is"),
    (lambda: sums_of({"right": 1.0, "weight": 2}, "P"), "the score of P lacks 'loss'; it has 'right'."),
    (lambda: sums_of({"loss": np.ones(2), "weight": 2}, "P"), "the sum of 'loss' in the score of P has shape (2,)"),
    (lambda: sums_of(3.0, "P"), "the score of P is a float."),
    (lambda: means_of([sums_of({"loss": 0.0, "weight": 0}, "P")], "P"), "the examples of P weigh 0 in 'loss'"),
    (lambda: means_of([], "P"), "there are no examples of P to evaluate."),
]


@pytest.mark.parametrize(("call", "says"), BAD, ids=[says[:40] for _, says in BAD])
def test_what_is_refused_says_why(call, says):
    with pytest.raises(lk.StudyError) as e:
        call()
    assert says in str(e.value)
    assert len(str(e.value).splitlines()) <= 4


def test_means_are_those_of_all_examples_whatever_the_batches():
    """Batches of 3 and 5 tokens; counts by class add up as arrays."""
    rng = np.random.default_rng(0)
    losses = rng.random(8)
    hits = rng.random((8, 4)) > 0.5
    parts = [
        sums_of({"loss": lk.Weighted(losses[s].sum(), len(losses[s])), "hits": hits[s].sum(0), "weight": 2}, "P")
        for s in (slice(0, 3), slice(3, 8))
    ]
    means, weight = means_of(parts, "P")
    assert weight == 8
    assert means["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    np.testing.assert_allclose(means["hits"], hits.sum(0) / 4)
    assert PERPLEXITY(means) == pytest.approx(math.exp(losses.mean()), rel=1e-6)


def test_nan_passes_bounds_and_rounding_does_not_break_them():
    assert math.isnan(ACCURACY({"correct": math.nan}))
    assert ACCURACY({"correct": 1 + 1e-7}) == pytest.approx(1)
