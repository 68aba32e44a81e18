"""What the commands of `lorax-kit` do, as functions: train, evaluate, predict, compress, export, exchange, ..."""

from typing import TYPE_CHECKING

from lorax_kit.extras import importing

if TYPE_CHECKING:
    from lorax_kit.commands.adapters.evaluation import evaluate_adapter, evaluate_base, evaluate_small
    from lorax_kit.commands.adapters.training import train_adapter
    from lorax_kit.commands.analysis import analyse_run
    from lorax_kit.commands.compress.compression import compress_subject, save_small
    from lorax_kit.commands.compress.recipe import Healing, Recipe
    from lorax_kit.commands.compress.subjects import (
        Subject,
        adapter_subject,
        sentiment_subject,
        subject_of,
        text_subject,
    )
    from lorax_kit.commands.inspection import inspect_model

__all__ = [
    "Healing",
    "Recipe",
    "Subject",
    "adapter_subject",
    "analyse_run",
    "compress_subject",
    "evaluate_adapter",
    "evaluate_base",
    "evaluate_small",
    "inspect_model",
    "save_small",
    "sentiment_subject",
    "subject_of",
    "text_subject",
    "train_adapter",
]
__getattr__, __dir__ = importing(
    __name__,
    {
        "Healing": "compress.recipe",
        "Recipe": "compress.recipe",
        "Subject": "compress.subjects",
        "adapter_subject": "compress.subjects",
        "analyse_run": "analysis",
        "compress_subject": "compress.compression",
        "evaluate_adapter": "adapters.evaluation",
        "evaluate_base": "adapters.evaluation",
        "evaluate_small": "adapters.evaluation",
        "inspect_model": "inspection",
        "save_small": "compress.compression",
        "sentiment_subject": "compress.subjects",
        "subject_of": "compress.subjects",
        "text_subject": "compress.subjects",
        "train_adapter": "adapters.training",
    },
)
