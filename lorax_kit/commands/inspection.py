"""`inspect`: the parameters of a model, or how each site of a spec runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorax_kit.core.merge import split
from lorax_kit.core.paths import Params, paths
from lorax_kit.core.quantised import quantize
from lorax_kit.core.specs.spec import AnySetting, Spec
from lorax_kit.errors import PlanError, StudyError
from lorax_kit.models import Loaded, classify, fresh_head, load_model
from lorax_kit.problems.packaged.sentiment import HEAD
from lorax_kit.transform import adapt, all_linear, explain, resolve


def inspect_model(
    source: str, spec: Spec | AnySetting | None, batch_size: int, tokens: int, method: str | None = None
) -> tuple[dict[str, Any], str]:
    """Parameters of a model, or with a spec how each site runs: as data, and as text.

    An encoder has a classifier of two classes around it, a decoder and an encoder-decoder their head of words.

    A setting is that of `lk.all_linear`, which says on stderr what it took; the head is left out. With a `method` of
    `lk.quantize` the sites' own parameters are kept in few bits.
    """
    loaded = load_model(source)
    params, apply, head = _whole(loaded)
    rows = [{"path": p, "shape": list(x.shape), "dtype": str(x.dtype)} for p, x in paths(params).items()]
    if spec is None:
        lines = [f"{r['path']:<50} {'x'.join(map(str, r['shape'])):>12}  {r['dtype']}" for r in rows]
        text = "\n".join([*lines, f"{sum(x.size for x in jax.tree_util.tree_leaves(params)):,} parameters"])
        return {"model": source, "parameters": rows}, text
    if loaded.positions is not None and tokens > loaded.positions:
        raise StudyError(f"{tokens} tokens are above the model's {loaded.positions} positions.")
    shape = jax.ShapeDtypeStruct((batch_size, tokens), jnp.int32)
    if not isinstance(spec, Spec):
        spec = all_linear(spec, params, apply, shape, shape, exclude=head)  # type: ignore[arg-type]
    plan = resolve(spec, params, apply, shape, shape)
    base, factors = split(params, plan, jax.random.key(0))
    if method is not None:
        if not plan.sites:
            raise PlanError("the spec adapts no parameter at low rank, so there is none to quantise.")
        base = quantize(base, [site.path for site in plan.sites], method)
    explanation = explain(adapt(apply, plan), base, factors, shape, shape)
    full = [leaf.path for leaf in plan.full]
    return {"model": source, **explanation.to_dict(), "full": full, "parameters": rows}, str(explanation)


def _whole(loaded: Loaded) -> tuple[Params, Callable[..., Any], tuple[str, ...]]:
    """(params, function of them, ids and mask, patterns of the head) of a model with a head."""
    model: Any = loaded.model
    if loaded.kind == "encoder":
        head = fresh_head(loaded.config.hidden_size, 2, jax.random.key(0))

        def classes(params: Any, ids: Any, mask: Any) -> Any:
            hidden = model.apply({"params": params["encoder"]}, ids, mask)
            return classify(loaded.family, {"output": params["classifier"]}, hidden, mask)

        return {"encoder": loaded.params, "classifier": head["output"]}, classes, HEAD

    written = loaded.kind == "encoder-decoder"
    # A decoder that was saved as a classifier has no head of words.
    wordless = not (written or loaded.config.tie_word_embeddings or "head" in loaded.params)

    def words(params: Any, ids: Any, mask: Any) -> Any:
        more = (ids, mask) if written else ()
        return model.apply({"params": params}, ids, mask, *more, **({"hidden": True} if wordless else {}))

    return loaded.params, words, ("head/kernel",) if "head" in loaded.params else ()
