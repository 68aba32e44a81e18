"""A model that writes as programs of named arrays, its cache among them, for runtimes outside of the project.

One program reads a prompt and each token after it: both are T tokens read into a cache. An encoder-decoder has a second
one, which forms keys and values of the text that is read.

Shapes: B rows, T new tokens, P slots of the cache that are given, E tokens of the text read, N heads, K their size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import Array

from lorax_kit.core.lowrank import LowRank
from lorax_kit.core.paths import Params, flatten, unflatten
from lorax_kit.core.site import Site
from lorax_kit.errors import LoraxError
from lorax_kit.models import Loaded
from lorax_kit.models.cache import Cache, Cross
from lorax_kit.serve.program import parameters_read
from lorax_kit.transform import compressed


@dataclass(frozen=True, kw_only=True)
class Part:
    """One program.

    Args:
      name: "decoder" or "encoder".
      fn: `fn(params, *arrays)`, the arrays in the order of `inputs`; it returns those of `outputs`.
      inputs: name -> shape and dtype, sizes that vary by names.
      outputs: names.
      carried: output -> the input that it is at the next step.
    """

    name: str
    fn: Callable[..., tuple[Array, ...]]
    inputs: dict[str, jax.ShapeDtypeStruct]
    outputs: tuple[str, ...]
    carried: dict[str, str]


def parts_of(loaded: Loaded, *, grows: bool) -> list[Part]:
    """The programs of a model that writes, of its params as they are, `Quantised` or `LowRank`.

    The decoder's inputs are `ids` and `mask` int32 (B, T); the cache: `seen` bool (B, P), and `key_0`, `value_0`, ... a
    layer each, (B, N, P, K); of an encoder-decoder also `read` bool (B, E), `read_key_0`, `read_value_0`, ..., which
    its encoder gives. Its outputs are `logits` (B, V) of the token after the last, and the cache as `next_seen`,
    `next_key_0`, ... A prompt's padding stands on the left.

    Args:
      grows: the cache that is given holds what was read, nothing at first, and what is returned is longer by T. False:
        it has as many slots as the text will need, and the input `end`, int32 (), says how many are filled; programs
        that are compiled for each size (XLA's) would be compiled for each length otherwise.

    Raises:
      LoraxError: an encoder; an encoder-decoder that does not say what its texts begin with.

    Example:
      >>> from lorax_kit.models import load_model
      >>> (decoder,) = parts_of(load_model("smollm2"), grows=True)  # doctest: +SKIP
      >>> decoder.inputs["key_0"].shape  # doctest: +SKIP
      (batch, 3, past, 64)
    """
    if loaded.kind == "decoder":
        return [_decoder(loaded, grows)]
    if loaded.kind != "encoder-decoder":
        raise LoraxError(f"{loaded.source!r} is an encoder ({loaded.family}): it writes nothing.")
    if loaded.special.start is None:
        raise LoraxError(f"{loaded.source!r} does not say which token its texts begin with: decoder_start_token_id.")
    return [_encoder(loaded), _decoder(loaded, grows)]


def _sizes(scope: jax.export.SymbolicScope | None = None) -> dict[str, Any]:
    """Sizes that vary, by name."""
    names = ("batch", "tokens", "past", "slots", "length", "rank")
    scope = scope or jax.export.SymbolicScope()
    return dict(zip(names, jax.export.symbolic_shape(", ".join(names), scope=scope), strict=True))


def _heads(loaded: Loaded) -> tuple[int, int, int]:
    """(layers, N, K) of the cache."""
    cache = jax.eval_shape(lambda: loaded.model.empty_cache(1, 1))  # type: ignore[attr-defined]
    return len(cache.keys), cache.keys[0].shape[1], cache.keys[0].shape[3]


def _layered(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}{kind}_{i}" for i in range(layers) for kind in ("key", "value")]


def _paired(arrays: Any) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Keys and values, which come a layer each."""
    return tuple(arrays[::2]), tuple(arrays[1::2])


def _mixed(cache: Cache | Cross) -> tuple[Array, ...]:
    """Inverse of `_paired`."""
    return tuple(x for pair in zip(cache.keys, cache.values, strict=True) for x in pair)


def _decoder(loaded: Loaded, grows: bool) -> Part:
    longest = loaded.positions
    bounds = ["slots >= tokens", *([] if longest is None else [f"slots <= {longest}", f"tokens <= {longest}"])]
    size, (layers, heads, width) = _sizes(jax.export.SymbolicScope(bounds)), _heads(loaded)
    slots, two = size["past" if grows else "slots"], loaded.kind == "encoder-decoder"
    own_names, read = _layered("", layers), _layered("read_", layers) if two else []
    inputs = {name: jax.ShapeDtypeStruct((size["batch"], size["tokens"]), jnp.int32) for name in ("ids", "mask")}
    inputs["seen"] = jax.ShapeDtypeStruct((size["batch"], slots), jnp.bool_)
    if not grows:
        inputs["end"] = jax.ShapeDtypeStruct((), jnp.int32)
    for name in own_names:
        inputs[name] = jax.ShapeDtypeStruct((size["batch"], heads, slots, width), jnp.float32)
    if two:
        inputs["read"] = jax.ShapeDtypeStruct((size["batch"], size["length"]), jnp.bool_)
    for name in read:
        inputs[name] = jax.ShapeDtypeStruct((size["batch"], heads, size["length"], width), jnp.float32)
    held = ["seen", *([] if grows else ["end"]), *own_names]

    def fn(params: Params, *arrays: Array) -> tuple[Array, ...]:
        given = dict(zip(inputs, arrays, strict=True))
        cross = Cross(*_paired([given[name] for name in read]), given["read"]) if two else None
        cache = Cache(*_paired([given[name] for name in own_names]), given["seen"], given.get("end"), cross)
        more: Any = {"method": "decode"} if two else {}
        empty = (None, None) if two else ()

        def run(params: Params, ids: Array, mask: Array, cache: Cache) -> Any:
            return loaded.model.apply({"params": params}, ids, mask, *empty, cache, **more)

        logits, after = compressed(run)(params, given["ids"], given["mask"], cache)
        return (logits, after.seen, *([] if grows else [after.end]), *_mixed(after))

    carried = {f"next_{name}": name for name in held}
    return Part(name="decoder", fn=fn, inputs=inputs, outputs=("logits", *carried), carried=carried)


def _encoder(loaded: Loaded) -> Part:
    size, (layers, _, _) = _sizes(), _heads(loaded)
    inputs = {name: jax.ShapeDtypeStruct((size["batch"], size["length"]), jnp.int32) for name in ("ids", "mask")}

    def run(params: Params, ids: Array, mask: Array) -> tuple[Array, ...]:
        hidden = loaded.model.apply({"params": params}, ids, mask, method="encode")
        cache = loaded.model.empty_cache(ids.shape[0], 1)  # type: ignore[attr-defined]
        first = jnp.full((ids.shape[0], 1), loaded.special.start or 0, jnp.int32)
        # The decoder reads a token only for the keys and values that it forms of `hidden`: the rest is left out.
        outputs: Any = loaded.model.apply(
            {"params": params}, first, jnp.ones_like(first), hidden, mask, cache, method="decode"
        )
        return _mixed(outputs[1].cross)

    return Part(name="encoder", fn=compressed(run), inputs=inputs, outputs=tuple(_layered("read_", layers)), carried={})


def with_factors(part: Part, params: Params, sites: Collection[Site]) -> Part:
    """The program with the factors of an adapter as further inputs.

    They are PATH/a (R, *stack, *in) and PATH/b (R, *stack, *out) of each site. What is added to a parameter is a^T b,
    its scale within b. The rank R varies, and rows of zeros change nothing: sites whose ranks differ are filled up to
    the largest. Sites that the program does not read have no inputs.
    """
    read = parameters_read(part.fn, params, part.inputs)
    adapted = [site for site in sites if site.path in read]
    rank = _sizes(part.inputs["ids"].shape[0].scope)["rank"]  # type: ignore[attr-defined]
    factors: dict[str, jax.ShapeDtypeStruct] = {}
    for site in adapted:
        for name, shape in (("a", site.in_shape), ("b", site.out_shape)):
            factors[f"{site.path}/{name}"] = jax.ShapeDtypeStruct((rank, *site.stack_shape, *shape), jnp.float32)

    def fn(params: Params, *arrays: Array) -> tuple[Array, ...]:
        given = dict(zip(factors, arrays[len(part.inputs) :], strict=True))
        named, treedef = flatten(params)
        for site in adapted:
            named[site.path] = LowRank(
                a=given[f"{site.path}/a"],
                b=given[f"{site.path}/b"],
                residual=named[site.path],
                shape=site.shape,
                dtype=jnp.dtype(site.dtype),
                inputs=site.axes.inputs,
                outputs=site.axes.outputs,
                stack=site.axes.stack,
            )
        return part.fn(unflatten(named, treedef), *arrays[: len(part.inputs)])

    return replace(part, fn=fn, inputs=part.inputs | factors)
