"""Commands of one adapter: train, evaluate, inspect, predict, generate, convert, combine, merge."""

from lorax_kit.cli.adapters import exchange, generate, predict, training  # each registers its commands

__all__ = ["exchange", "generate", "predict", "training"]
