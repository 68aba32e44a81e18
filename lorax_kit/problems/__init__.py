"""Problems that go by a name: where the name becomes weights and data."""

from lorax_kit.workloads.plays import PlaysText
from lorax_kit.workloads.problems import problem_from, problem_of
from lorax_kit.workloads.sentiment import Sentiment

__all__ = ["PlaysText", "Sentiment", "problem_from", "problem_of"]
