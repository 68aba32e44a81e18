"""What the step benchmarks train: a BERT classifier on random weights and tokens."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lorax_kit.core.plan import Plan
from lorax_kit.core.specs.setting import Full
from lorax_kit.core.specs.spec import Spec
from lorax_kit.data import Batch
from lorax_kit.methods import LoRA
from lorax_kit.models import BertClassifier, BertConfig
from lorax_kit.problem import Problem, Score
from lorax_kit.tasks import correct, cross_entropies, cross_entropy
from lorax_kit.transform import resolve

TARGETS = {"all-linear": "encoder/layer_*/**/kernel", "qv": "encoder/layer_*/attention/{query,value}/kernel"}
CLASSES = 2


class Case(NamedTuple):
    """A model, its inputs, and what is adapted.

    Attributes:
      config, model: the encoder's sizes, and the classifier.
      params: random, as Flax draws them: kernels of variance 1 / inputs, tables 1 / width.
      batch: random tokens, none of them padding.
      plan: low-rank factors of the targets, the head in full.
      scale: of every site.
    """

    config: BertConfig
    model: BertClassifier
    params: Any
    batch: Batch
    plan: Plan
    scale: float

    def apply(self, params: Any, batch: Batch) -> Array:
        """Logits (B, 2)."""
        logits: Any = self.model.apply({"params": params}, batch.ids, batch.mask)
        return logits

    def loss(self, logits: Array, batch: Any) -> Array:
        """Mean cross entropy."""
        return cross_entropy(logits, batch.label, batch.weight)

    def problem(self) -> Problem:
        """The case as a study takes it: its one batch for training, validation and test."""

        def score(logits: Any, batch: Any) -> Score:
            losses = jnp.sum(cross_entropies(logits, batch.label) * batch.weight)
            return Score(losses, correct(logits, batch.label, batch.weight), jnp.sum(batch.weight))

        return Problem(
            name="random",
            params=lambda key: self.params,
            apply=self.apply,
            loss=self.loss,
            score=score,
            head=("classifier/**",),
            train=lambda seed, at: itertools.repeat(self.batch),
            val=[self.batch],
            test=[self.batch],
        )


def make_case(
    *,
    width: int,
    layers: int,
    batch_size: int,
    length: int,
    rank: int,
    targets: str,
    head: int = 32,
    dtype: str = "float32",
) -> Case:
    """A case of these sizes: feed-forward of 4 x width, 8192 words, heads of `head`, params in `dtype`."""
    config = BertConfig(
        vocab_size=8192,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // head, 1),
        intermediate_size=4 * width,
        max_position_embeddings=max(length, 16),
    )
    model = BertClassifier(config, num_classes=CLASSES)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (batch_size, length)).astype(np.int32)
    label = rng.integers(0, CLASSES, batch_size).astype(np.int32)
    batch = jax.tree.map(jnp.asarray, Batch(ids, np.ones_like(ids), label, np.ones(batch_size, np.float32)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch.ids, batch.mask)["params"]
    params = jax.tree_util.tree_map_with_path(lambda path, x: _drawn(path, x.shape, dtype), shapes)
    setting = LoRA(rank=rank, alpha=2 * rank)
    spec = Spec({"classifier/**": Full(), TARGETS[targets]: setting})

    def apply(params: Any, batch: Batch) -> Any:
        return model.apply({"params": params}, batch.ids, batch.mask)

    return Case(config, model, params, batch, resolve(spec, params, apply, batch), setting.scale)


def _drawn(path: Any, shape: tuple[int, ...], dtype: str) -> Array:
    """A parameter, by a program per shape: a model's own `init` is one program, slow to compile, per model."""
    name = path[-1].key
    if name in ("bias", "scale"):
        return jnp.full(shape, 1.0 if name == "scale" else 0.0, dtype)
    fan_in = shape[0] if name == "kernel" else shape[1]
    key = jax.random.key(crc32(jax.tree_util.keystr(path).encode()))
    return _normal(key, shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: Array, shape: tuple[int, ...], dtype: str) -> Array:
    return jax.random.normal(key, shape, dtype)
