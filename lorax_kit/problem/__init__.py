"""What everything that trains or measures takes: a model on data, with its loss and its metrics."""

from lorax_kit.problem.address import problem_at, problem_builder
from lorax_kit.problem.evaluate import Evaluator, val_and_test, version
from lorax_kit.problem.metric import ACCURACY, LOSS, MSE, PERPLEXITY, Metric
from lorax_kit.problem.problem import Problem
from lorax_kit.problem.sums import Score

__all__ = [
    "ACCURACY",
    "LOSS",
    "MSE",
    "PERPLEXITY",
    "Evaluator",
    "Metric",
    "Problem",
    "Score",
    "problem_at",
    "problem_builder",
    "val_and_test",
    "version",
]
