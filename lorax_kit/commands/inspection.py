"""`inspect`: the parameters of a model, or how each site of a spec runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lorax_kit.core.merge import split
from lorax_kit.core.paths import paths
from lorax_kit.core.quantised import quantise
from lorax_kit.core.spec import AnySetting, Spec
from lorax_kit.errors import PlanError, StudyError
from lorax_kit.models import BertClassifier, classifier_params, load_bert
from lorax_kit.problems.packaged.sentiment import HEAD
from lorax_kit.transform import adapt, all_linear, explain, resolve


def inspect_model(
    source: str, spec: Spec | AnySetting | None, batch_size: int, tokens: int, method: str | None = None
) -> tuple[dict[str, Any], str]:
    """Parameters of a model, or with a spec how each site runs: as data, and as text.

    A setting is that of `lk.all_linear`, which says on stderr what it took; the head is left out. With a `method` of
    `lk.quantise` the sites' own parameters are kept in few bits.
    """
    pretrained = load_bert(source)
    model = BertClassifier(pretrained.config, num_classes=2)
    params = classifier_params(pretrained, 2, jax.random.key(0))
    rows = [{"path": p, "shape": list(x.shape), "dtype": str(x.dtype)} for p, x in paths(params).items()]
    if spec is None:
        lines = [f"{r['path']:<50} {'x'.join(map(str, r['shape'])):>12}  {r['dtype']}" for r in rows]
        text = "\n".join([*lines, f"{sum(x.size for x in jax.tree_util.tree_leaves(params)):,} parameters"])
        return {"model": source, "parameters": rows}, text
    if tokens > pretrained.config.max_position_embeddings:
        raise StudyError(
            f"{tokens} tokens are above the model's {pretrained.config.max_position_embeddings} positions."
        )
    shape = jax.ShapeDtypeStruct((batch_size, tokens), jnp.int32)

    def apply(params: Any, ids: Any, mask: Any) -> Any:
        return model.apply({"params": params}, ids, mask)

    if not isinstance(spec, Spec):
        spec = all_linear(spec, params, apply, shape, shape, exclude=HEAD)  # type: ignore[arg-type]
    plan = resolve(spec, params, apply, shape, shape)
    base, factors = split(params, plan, jax.random.key(0))
    if method is not None:
        if not plan.sites:
            raise PlanError("the spec adapts no parameter at low rank, so there is none to quantise.")
        base = quantise(base, [site.path for site in plan.sites], method)
    found = explain(adapt(apply, plan), base, factors, shape, shape)
    full = [leaf.path for leaf in plan.full]
    return {"model": source, **found.to_dict(), "full": full, "parameters": rows}, str(found)
