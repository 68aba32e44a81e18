"""A training under way on disk: what `fit` goes on from after an interruption, to the same bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax_kit.checkpoint.agreed import told
from lorax_kit.core.specs.setting import shown
from lorax_kit.errors import LoraxError
from lorax_kit.files.staging import staged
from lorax_kit.json_text import first_difference, parse_json, sealed_json
from lorax_kit.processes import gathered, is_shared, spread
from lorax_kit.training.step import State


class Saved(NamedTuple):
    """Where a training stands.

    Attributes:
      state: after the last step.
      history: rows of the epochs that are done.
      best: (place in the history, factors) of the best epoch so far, or None.
      waited: epochs since then.
      totals: sums of the epoch under way, by name.
      steps, seconds: of the epoch under way.
      stopped: why training ended, or None while it goes on.
    """

    state: State
    history: list[dict[str, float]]
    best: tuple[int, Any] | None = None
    waited: int = 0
    totals: Mapping[str, Any] = {}
    steps: int = 0
    seconds: float = 0.0
    stopped: str | None = None


def save_training(file: Path, saved: Saved, settings: Mapping[str, Any]) -> None:
    """Write where a training stands, in one step: the file is never half new.

    Where its arrays lie over several processes, all of them call this, and process 0 writes.

    Args:
      settings: JSON data that say what is trained; another training does not go on from this file.
    """
    best = None if saved.best is None else saved.best[1]
    together = is_shared(saved.state)
    leaves = [_plain(x) for x in jax.tree.leaves((saved.state, best, dict(saved.totals)))]
    facts = {
        "settings": settings,
        "leaves": [[str(x.dtype), list(x.shape)] for x in leaves],
        "history": saved.history,
        "best": None if saved.best is None else saved.best[0],
        "names": sorted(saved.totals),
        **{name: getattr(saved, name) for name in ("waited", "steps", "seconds", "stopped")},
    }
    # As bytes: the format knows no bfloat16.
    arrays: dict[str, Any] = {
        f"leaf_{i}": np.ascontiguousarray(x).reshape(-1).view(np.uint8) for i, x in enumerate(leaves)
    }

    def write() -> None:
        with staged(file, overwrite=True) as new, open(new, "wb") as opened:
            np.savez(opened, facts=np.array(sealed_json(facts)), **arrays)

    return told(write) if together else write()


def load_training(file: Path, state: State, settings: Mapping[str, Any]) -> Saved | None:
    """Read where the same training stands; None without a file.

    Args:
      state: as training began; its structure, and where its arrays lie, are those of what is read.

    Raises:
      LoraxError: a damaged file, or another training's.
    """
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            facts = parse_json(str(stored["facts"]))
            shapes = [(jnp.dtype(dtype), tuple(shape)) for dtype, shape in facts["leaves"]]
            leaves = [stored[f"leaf_{i}"].view(dtype).reshape(shape) for i, (dtype, shape) in enumerate(shapes)]
        known, history, names = facts["settings"], list(facts["history"]), list(facts["names"])
        waited, steps, seconds = int(facts["waited"]), int(facts["steps"]), float(facts["seconds"])
        place, stopped = facts["best"], facts["stopped"]
    except Exception as e:  # zipfile and numpy raise many kinds
        raise LoraxError(f"{str(file)!r} is damaged: {e}.\n  delete it: training then begins anew") from None
    ours = json.loads(json.dumps(settings))
    if ours != known:
        name, *values = first_difference(known, ours)
        was, now = ("left out" if x is None else shown(x) for x in values)
        raise LoraxError(
            f"{str(file)!r} is of an interrupted training of other settings: {name} was {was}, and is {now}.\n"
            "  give the same settings to go on, or delete the file to begin anew"
        )
    templates = jax.tree.leaves((state, None if place is None else state.factors, dict.fromkeys(names, np.float32(0))))
    wanted = [(x.dtype, x.shape) for x in map(_plain, templates)]
    if [(x.dtype, x.shape) for x in leaves] != wanted:
        raise LoraxError(f"{str(file)!r} is of another training: its arrays do not fit.\n  delete it to begin anew")
    count = len(jax.tree.leaves(state))
    read = [_placed(x, y) for x, y in zip(leaves[:count], templates, strict=False)]
    rest = leaves[count:]
    best = (
        None
        if place is None
        else (int(place), jax.tree.unflatten(jax.tree.structure(state.factors), rest[: len(rest) - len(names)]))
    )
    totals = dict(zip(names, rest[len(rest) - len(names) :], strict=True))
    return Saved(
        jax.tree.unflatten(jax.tree.structure(state), read), history, best, waited, totals, steps, seconds, stopped
    )


def _plain(x: Any) -> np.ndarray:
    """An array of numbers; of random keys their words."""
    keys = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    whole: np.ndarray = gathered(jax.random.key_data(x) if keys else x)
    return whole


def _placed(x: np.ndarray, like: Any) -> Any:
    """What was read, as the array it stands for, and where that lies."""
    if not isinstance(like, jax.Array):
        return x
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(jnp.asarray(x), impl=jax.random.key_impl(like))
        return spread(key, like.sharding) if is_shared(like) else key
    return spread(x, like.sharding) if len(like.sharding.device_set) > 1 else jnp.asarray(x, like.dtype)
