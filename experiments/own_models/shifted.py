"""What the examples beside it share: scanned digits, upright to learn from, turned by a quarter to adapt to.

1,797 digits of 8 x 8 grey values (scikit-learn's `load_digits`; Alpaydin and Kaynak, 1998).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorax_kit as lk
from lorax_kit.analysis.statistics.conditions import interval


class Batch(NamedTuple):
    """Images (B, 8, 8, 1) from 0 to 1, and their digits (B,)."""

    x: np.ndarray
    label: np.ndarray


def digits() -> tuple[Batch, dict[str, Batch]]:
    """Upright images, and turned ones by part: the parts hold no image twice."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, label = (found.images[..., None] / 16).astype(np.float32), found.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    cuts = {"train": order[900:1100], "val": order[1100:1300], "test": order[1300:]}
    turned = np.rot90(x, axes=(1, 2)).copy()
    return Batch(x[order[:900]], label[order[:900]]), {name: Batch(turned[i], label[i]) for name, i in cuts.items()}


def stream(data: Batch, size: int, seed: int, start: int) -> Iterator[Batch]:
    """Endless batches; the step alone says which rows."""
    step = start
    while True:
        index = np.random.default_rng((seed, step)).integers(len(data.label), size=size)
        yield Batch(data.x[index], data.label[index])
        step += 1


def loss(logits: Any, batch: Batch) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()


def score(logits: Any, batch: Batch) -> lk.Score:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.label)
    return lk.Score(losses.sum(), (logits.argmax(-1) == batch.label).sum(), jnp.float32(len(batch.label)))


def trained(params: Any, apply: Callable[[Any, Any], Any], data: Batch, steps: int = 400) -> Any:
    """The params after training on upright digits."""
    tx = optax.adam(3e-3)

    @jax.jit
    def step(params: Any, state: Any, batch: Batch) -> tuple[Any, Any]:
        grads = jax.grad(lambda p: loss(apply(p, batch.x), batch))(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _, batch in zip(range(steps), stream(data, 64, 0, 0), strict=False):
        params, state = step(params, state, batch)
    return params


def adapt_to_turned(name: str, params: Any, apply: Callable[[Any, Any], Any], targets: str) -> None:
    """Train the model on upright digits, then low-rank factors alone on turned ones, and print what that gave."""
    upright, turned = digits()
    base = trained(params, apply, upright)
    problem = lk.Problem(
        name=name,
        params=lambda key: base,
        apply=lambda p, batch: apply(p, batch.x),
        loss=loss,
        score=score,
        train=lambda seed, start: stream(turned["train"], 32, seed, start),
        val=[turned["val"]],
        test=[turned["test"]],
        facts={"train": 200, "val": 200, "test": len(turned["test"].label)},
    )
    study = lk.Study(rank=(1, 2, 8), lr=1e-2, seed=range(6), targets={"all": [targets]}, steps=300)
    results = lk.run(study, problem, out=f"runs/own_models/{name}", command=f"python experiments/own_models/{name}.py")
    before = float((apply(base, turned["test"].x).argmax(-1) == turned["test"].label).mean())
    print(f"{name}: turned digits {before:.1%} as trained on upright ones")
    for rank in study.rank:
        rows = [row for row in results.rows if row["rank"] == rank]
        found = interval([row["test_accuracy"] for row in rows])
        numbers = rows[0]["params"]
        print(f"  rank {rank}: {found.mean:.1%} [{found.low:.1%}, {found.high:.1%}], {numbers:,} numbers trained")
