"""Problems that go by a name: where the name becomes weights and data."""

from lorax_kit.problems.load import problem_from, problem_of
from lorax_kit.problems.packaged.plays import PlaysText
from lorax_kit.problems.packaged.sentiment import Sentiment

__all__ = ["PlaysText", "Sentiment", "problem_from", "problem_of"]
