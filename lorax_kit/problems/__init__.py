"""Problems that a configuration names: tasks on rows of one's own, and those on packaged data."""

from lorax_kit.problems.answer import Answer
from lorax_kit.problems.chat import Chat
from lorax_kit.problems.choose import Choose
from lorax_kit.problems.classify import Classify
from lorax_kit.problems.language import Language
from lorax_kit.problems.load import problem_from, problem_of, settings_from, settings_of
from lorax_kit.problems.packaged.plays import PlaysText
from lorax_kit.problems.packaged.sentiment import Sentiment
from lorax_kit.problems.regress import Regress
from lorax_kit.problems.translate import Translate

__all__ = [
    "Answer",
    "Chat",
    "Choose",
    "Classify",
    "Language",
    "PlaysText",
    "Regress",
    "Sentiment",
    "Translate",
    "problem_from",
    "problem_of",
    "settings_from",
    "settings_of",
]
