"""What the package promises, tried on a tiny model on the default device: about ten seconds, most of it compilation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorax_kit.checkpoint import load_adapter, save_adapter
from lorax_kit.core import Spec, merge, split
from lorax_kit.measure import compilations
from lorax_kit.methods import LoRA
from lorax_kit.parallel import device_mesh, sharded_step
from lorax_kit.training import make_step
from lorax_kit.transform import adapt, resolve

RANK, ALPHA, STEPS = 4, 8, 4
TOLERANCE = 1e-5
"""Of the largest difference of fp32 results, relative to the largest entry."""


class Check(NamedTuple):
    """A promise that was tried.

    Attributes:
      name: the promise.
      ok: whether it holds.
      seconds: it took.
      detail: what was measured, or the error.
      mend: what to do where it does not hold.
    """

    name: str
    ok: bool
    seconds: float
    detail: str
    mend: str


class Toy(NamedTuple):
    """A two-layer network with factors that are not zero, and a batch (x, y)."""

    plan: Any
    base: Any
    factors: Any
    batch: tuple[jax.Array, jax.Array]


def apply(params: Any, x: jax.Array) -> jax.Array:
    """The network."""
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def toy(rows: int = 16) -> Toy:
    """The same numbers at every call."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)

    params = {"up": {"kernel": draw(16, 32)}, "down": {"kernel": draw(32, 8)}}
    batch = (draw(rows, 16), draw(rows, 8))
    plan = resolve(Spec({"**/kernel": LoRA(rank=RANK, alpha=ALPHA)}), params, apply, batch[0])
    base, factors = split(params, plan, jax.random.key(0))
    return Toy(plan, base, jax.tree.map(lambda x: draw(*x.shape), factors), batch)


def _loss(plan: Any) -> Callable[..., jax.Array]:
    adapted = adapt(apply, plan)
    return lambda base, factors, batch: jnp.mean((adapted(base, factors, batch[0]) - batch[1]) ** 2)


class Trained(NamedTuple):
    """The factors after a few steps, and the compilations of each step."""

    factors: Any
    compiled: list[int]


def train(toy: Toy) -> Trained:
    """Take a few steps by a step of its own."""
    init, step = make_step(_loss(toy.plan), optax.sgd(0.1))
    state, compiled = init(toy.factors), []
    for _ in range(STEPS):
        with compilations() as seconds:
            state, _ = step(state, toy.base, toy.batch)
        compiled.append(len(seconds))
    return Trained(state.factors, compiled)


@cache
def first_training() -> tuple[Toy, Any, Trained]:
    """A toy, its base as it was before training, and what training gave: shared, because compilation takes seconds."""
    given = toy()
    before = jax.tree.map(lambda x: np.array(x, copy=True), given.base)
    return given, before, train(given)


def _difference(ours: Any, theirs: Any) -> float:
    """The largest difference of any leaf's entries, relative to that leaf's largest entry."""
    pairs = zip(map(np.asarray, jax.tree.leaves(ours)), map(np.asarray, jax.tree.leaves(theirs)), strict=True)
    return max(float(np.max(np.abs(x - y)) / np.max(np.abs(y))) for x, y in pairs)


def _close(ours: Any, theirs: Any) -> tuple[bool, str]:
    difference = _difference(ours, theirs)
    return difference <= TOLERANCE, f"relative difference {difference:.1e}, at most {TOLERANCE:.0e} allowed"


def _same(ours: Any, theirs: Any) -> bool:
    """Whether all leaves are equal bit for bit."""
    pairs = zip(map(np.asarray, jax.tree.leaves(ours)), map(np.asarray, jax.tree.leaves(theirs)), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs)


def adapted_equals_merged() -> tuple[bool, str]:
    """Compare the adapted function with the plain one of merged params."""
    plan, base, factors, (x, _) = toy()
    return _close(jax.jit(adapt(apply, plan))(base, factors, x), jax.jit(apply)(merge(base, factors, plan), x))


def gradient_equals_autodiff() -> tuple[bool, str]:
    """Compare the factors' gradient with that through W + s A^T B, formed here."""
    plan, base, factors, batch = toy()

    def materialised(factors: Any) -> jax.Array:
        def weight(name: str) -> jax.Array:
            f = factors[f"{name}/kernel"]
            return base[name]["kernel"] + ALPHA / RANK * f.a.T @ f.b

        y = apply({name: {"kernel": weight(name)} for name in ("up", "down")}, batch[0])
        return jnp.mean((y - batch[1]) ** 2)

    ours = jax.jit(jax.grad(partial(_loss(plan), base)))(factors, batch)
    return _close(ours, jax.jit(jax.grad(materialised))(factors))


def base_stays() -> tuple[bool, str]:
    """Compare the base before and after training, which must have moved the factors."""
    given, before, trained = first_training()
    same, moved = _same(given.base, before), not _same(trained.factors, given.factors)
    return same and moved, f"base {'the same bits' if same else 'changed'}, factors {'trained' if moved else 'unmoved'}"


def one_compilation() -> tuple[bool, str]:
    """Count the compilations of a step that runs several times."""
    counts = first_training()[2].compiled
    return counts[0] > 0 and not any(counts[1:]), f"compilations of {STEPS} steps: {', '.join(map(str, counts))}"


def adapter_is_read_back() -> tuple[bool, str]:
    """Save an adapter to a temporary folder, and load it."""
    plan, base, factors, _ = toy()
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(Path(folder) / "adapter", plan, factors, base=base)
        read = load_adapter(Path(folder) / "adapter", base=base)
    same = _same(read.factors, factors) and read.plan == plan
    return same, "the same bits" if same else "other numbers than were saved"


def same_result_twice() -> tuple[bool, str]:
    """Compile and train once more from the same start."""
    first, second = first_training()[2].factors, train(toy()).factors
    if _same(first, second):
        return True, "the same bits"
    return False, f"relative difference {_difference(first, second):.1e} after {STEPS} steps"


def devices_agree() -> tuple[bool, str]:
    """Train over all devices of this process, and on one."""
    local = jax.local_devices()
    given = toy(rows=4 * len(local))
    init, step = sharded_step(_loss(given.plan), optax.sgd(0.1), device_mesh(devices=local))
    state = init(given.factors)
    for _ in range(STEPS):
        state, _ = step(state, given.base, given.batch)
    ok, detail = _close(state.factors, train(given).factors)
    return ok, f"{len(local)} devices: {detail}"


PLAIN = "unset XLA_FLAGS and JAX_* and try again; if it stays, install the versions of constraints.txt, and report it"
CHECKS: tuple[tuple[str, Callable[[], tuple[bool, str]], str], ...] = (
    ("adapted equals merged", adapted_equals_merged, PLAIN),
    ("gradient equals autodiff through W + s A^T B", gradient_equals_autodiff, PLAIN),
    ("base unchanged by training", base_stays, PLAIN),
    ("one compilation for repeated steps", one_compilation, PLAIN),
    ("saved adapter is read back", adapter_is_read_back, "export TMPDIR=FOLDER on a local disk; else " + PLAIN),
    (
        "same result twice",
        same_result_twice,
        "on a GPU: export XLA_FLAGS=--xla_gpu_deterministic_ops=true; else " + PLAIN,
    ),
    ("several devices agree with one", devices_agree, PLAIN),
)


def try_promises() -> list[Check]:
    """Try each promise; that of several devices only where there are several."""
    first_training.cache_clear()
    several = len(jax.local_devices()) > 1
    with jax.default_matmul_precision("highest"):
        return [tried(*check) for check in CHECKS if several or check[1] is not devices_agree]


def tried(name: str, run: Callable[[], tuple[bool, str]], mend: str) -> Check:
    """A check's outcome; whatever it raises is an outcome, too."""
    began = perf_counter()
    try:
        ok, detail = run()
    except Exception as e:
        ok, detail = False, f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
    return Check(name, ok, round(perf_counter() - began, 2), detail, mend)
