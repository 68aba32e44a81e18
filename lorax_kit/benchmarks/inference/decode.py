"""Tokens a second while writing, against transformers on torch with the same weights in the same run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from lorax_kit.algebra import Adaptation, rows_of, stack
from lorax_kit.benchmarks.timing import alternate, ratio
from lorax_kit.benchmarks.torch_peer import lacking, thread_counts, torch_writer
from lorax_kit.core.merge import split
from lorax_kit.core.specs.spec import Spec
from lorax_kit.generate import Decoder, Writer, adapted, decoder_of, per_row_decoder
from lorax_kit.methods import LoRA
from lorax_kit.models import Loaded, load_model
from lorax_kit.transform import resolve

DECODE_COLUMNS = ("batch", "prompt", "new", "ours_tokens_s", "torch_tokens_s", "torch_threads", "ratio", "compile_s")
MIXED_DECODE_COLUMNS = ("batch", "adapters", "new", "one_tokens_s", "mixed_tokens_s", "time_ratio", "compile_s")
TARGETS = "layer_*/**/kernel"


def bench_decode(
    *,
    model: str = "smollm2",
    batches: Sequence[int] = (1, 8),
    prompt: int = 16,
    new: int = 48,
    rounds: int = 5,
    peer: bool = True,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """One row a batch size: greedy, prompts of random tokens, all rows as long as the next.

    Tokens a second are of whole calls, prompts read included. Torch has a turn with as many threads as it chooses and
    one with a single thread; the faster is the peer, `torch_threads` says which. `ratio` is the median over alternating
    rounds of its time against ours, `compile_s` what the first call takes beyond the median of the others.
    """
    loaded = load_model(model)
    # No end of text, so that every row writes as many tokens on both sides.
    writer = Writer(replace(decoder_of(loaded), eos=()), loaded.tokenizer)
    theirs = torch_writer(loaded) if peer and lacking() is None else None
    rows = []
    for batch in batches:
        rng = np.random.default_rng(batch)
        prompts = rng.integers(100, loaded.config.vocab_size, (batch, prompt)).tolist()
        began = time.perf_counter()
        first = writer(loaded.params, prompts, max_new_tokens=new)
        took = time.perf_counter() - began
        runs: dict[str, Any] = {"ours": lambda p=prompts: writer(loaded.params, p, max_new_tokens=new)}
        same, threads = None, {}
        if theirs is not None:
            threads = {f"torch_{count}": count for count in thread_counts()}
            same = [list(one.tokens) for one in first] == theirs(prompts, new, 1)
            runs |= {name: lambda p=prompts, n=count: theirs(p, new, n) for name, count in threads.items()}
        bar = tqdm(range(rounds), desc=f"batch {batch}", disable=None if progress else True)
        times = alternate(runs, bar)
        ours = median(times["ours"]) / 1000
        peer_name = min(threads, key=lambda name: median(times[name]), default=None)
        against = None if peer_name is None else ratio(times, peer_name, "ours")
        rows.append(
            {
                "batch": batch,
                "prompt": prompt,
                "new": new,
                "ours_tokens_s": batch * new / ours,
                "torch_tokens_s": None if peer_name is None else batch * new / (median(times[peer_name]) / 1000),
                "torch_threads": None if peer_name is None else threads[peer_name],
                "ratio": None if against is None else against.median,
                "spread": None if against is None else against.spread,
                "compile_s": took - ours,
                "same_tokens": same,
                "backend": jax.default_backend(),
                "device": jax.devices()[0].device_kind,
            }
        )
    return rows


def bench_mixed_decode(
    *, model: str = "smollm2", rows: int = 32, new: int = 24, rank: int = 8, rounds: int = 5, progress: bool = True
) -> dict[str, Any]:
    """A batch of which each row writes with an adapter of its own, against one factored adapter for all.

    `time_ratio` is the median over alternating rounds of the mixed batch's time against the other's.
    """
    loaded = load_model(model)
    adapters = [_drawn(loaded, rank, seed) for seed in range(rows)]
    stacked = stack(adapters, base=loaded.params)
    decoder = replace(decoder_of(loaded), eos=())
    prompts = np.random.default_rng(0).integers(100, loaded.config.vocab_size, (rows, 16)).tolist()
    writers: dict[str, tuple[Decoder, Any]] = {
        "one": (adapted(decoder, adapters[0].plan), (loaded.params, adapters[0].factors)),
        "mixed": (per_row_decoder(decoder, stacked), (loaded.params, rows_of(stacked, range(rows)))),
    }
    runs, began = {}, time.perf_counter()
    for name, (own, params) in writers.items():
        writer = Writer(own, loaded.tokenizer)
        writer(params, prompts, max_new_tokens=new)
        runs[name] = lambda w=writer, p=params: w(p, prompts, max_new_tokens=new)
    compiled = time.perf_counter() - began
    times = alternate(runs, tqdm(range(rounds), desc="mixed", disable=None if progress else True))
    return {
        "batch": rows,
        "adapters": rows,
        "rank": rank,
        "new": new,
        **{f"{name}_tokens_s": rows * new / (median(x) / 1000) for name, x in times.items()},
        "time_ratio": ratio(times, "mixed", "one").median,
        "spread": ratio(times, "mixed", "one").spread,
        "compile_s": compiled - sum(median(x) for x in times.values()) / 1000,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def _drawn(loaded: Loaded, rank: int, seed: int) -> Adaptation:
    """A random adapter of all linear maps."""
    ids = jnp.zeros((1, 4), jnp.int32)

    def fn(params: Any, ids: Any) -> Any:
        return loaded.model.apply({"params": params}, ids, jnp.ones_like(ids))

    plan = resolve(Spec({TARGETS: LoRA(rank=rank)}), loaded.params, fn, ids)
    _, factors = split(loaded.params, plan, jax.random.key(seed))
    keys = jax.random.key(seed + 1)
    return Adaptation(plan, jax.tree.map(lambda x: jax.random.normal(keys, x.shape, x.dtype) / 50, factors))
