"""Joins models and tasks into problems to train, evaluate and compress: where a name becomes weights and data."""

from lorax_kit.workloads.compression import compress_subject, save_small
from lorax_kit.workloads.evaluation import evaluate_adapter
from lorax_kit.workloads.problems import problem_from, problem_of
from lorax_kit.workloads.sentiment import Sentiment, inspect_model
from lorax_kit.workloads.subjects import Subject, sentiment_subject, subject_of, text_subject
from lorax_kit.workloads.training import train_adapter

__all__ = [
    "Sentiment",
    "Subject",
    "compress_subject",
    "evaluate_adapter",
    "inspect_model",
    "problem_from",
    "problem_of",
    "save_small",
    "sentiment_subject",
    "subject_of",
    "text_subject",
    "train_adapter",
]
