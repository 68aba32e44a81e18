"""What a task makes of a model's outputs: losses and counts; nothing here knows about low-rank adaptation."""

from lorax_kit.tasks.losses import correct, cross_entropies, cross_entropy, next_tokens

__all__ = ["correct", "cross_entropies", "cross_entropy", "next_tokens"]
