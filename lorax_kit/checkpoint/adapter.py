"""Adapters on disk: factors and spec, apart from the base, written by orbax in one atomic step.

Beside the factors stands `spec` JSON: the spec, the contracted axes, a fingerprint of the base, shapes, and the
versions that wrote it; and the digests of all files. Nothing of the base is stored.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from lorax_kit.checkpoint.fingerprint import (
    differences,
    digests,
    fingerprint,
    first_difference,
    statistics,
    whole_fingerprint,
)
from lorax_kit.checkpoint.seal import SEAL, check_seal, damaged, seal
from lorax_kit.checkpoint.staging import refuse_existing, staged
from lorax_kit.core.errors import AdapterError, LoraxError
from lorax_kit.core.factors import Factors, FactorTree, FullLeaf
from lorax_kit.core.merge import check_params
from lorax_kit.core.paths import Params, flatten
from lorax_kit.core.plan import Axes, Plan, make_plan, match
from lorax_kit.core.spec import LoRA, Spec
from lorax_kit.version import __version__

FORMAT = 1
_FIELDS = ("a", "b", "magnitude")


class Adapter(NamedTuple):
    """What `load_adapter` returns.

    Attributes:
      spec, plan: of the adaptation; the plan fits the base it was loaded for.
      factors: as `lk.merge` and `lk.adapt` take them.
      meta: what the writer added.
    """

    spec: Spec
    plan: Plan
    factors: dict[str, Factors | FullLeaf]
    meta: dict[str, Any]


def named_arrays(factors: FactorTree) -> dict[str, np.ndarray]:
    """Flat names -> arrays: `path:a`, `path:b`, `path:magnitude`, `path:value`.

    Raises:
      AdapterError: factors with a traced scale, which no file holds.
    """
    out = {}
    for path, leaf in factors.items():
        if isinstance(leaf, Factors) and leaf.scale is not None:
            raise AdapterError(
                f"the factors at {path!r} carry a traced scale; on disk the scale is the spec's alpha and rank.\n"
                "  save with a spec of that scale, and factors._replace(scale=None)"
            )
        for name, x in leaf._asdict().items():
            if x is not None:
                out[f"{path}:{name}"] = np.asarray(x)
    return out


def check_finite(arrays: Mapping[str, np.ndarray]) -> None:
    """Raise `AdapterError` at the first array with a NaN or an infinity."""
    for name, x in arrays.items():
        if not np.isfinite(x.astype(np.float32)).all():
            raise AdapterError(f"{name!r} holds values that are not finite; nothing was saved.")


def save_adapter(
    path: str | Path,
    spec: Spec,
    factors: FactorTree,
    *,
    base: Params,
    plan: Plan | None = None,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Save an adapter: spec + factors, apart from the base.

    The directory appears whole or not at all: it is written beside `path` and renamed.

    Args:
      path: directory to create.
      spec: what the factors adapt.
      factors: the trained tree.
      base: the frozen params; only a fingerprint is stored.
      plan: the plan of the factors; needed where a site is not an (in, out) matrix.
      meta: JSON data to keep with the adapter.
      overwrite: replace an existing directory; otherwise it is an error.

    Raises:
      AdapterError: the path exists, the factors do not fit the spec, or are not finite.
    """
    path = Path(path).absolute()
    refuse_existing(path, overwrite, SEAL)
    plan = make_plan(spec, base) if plan is None else _checked(plan, spec, base)
    check_params(flatten(base)[0], plan)
    arrays = named_arrays(factors)
    expected = _shapes(plan)
    found = {name: x.shape for name, x in arrays.items() if not name.endswith(":magnitude")}
    if expected != found:
        odd = min(set(expected.items()) ^ set(found.items()))[0]
        raise AdapterError(
            f"the factors do not fit the spec at {odd!r}: {found.get(odd, 'missing')} against "
            f"{expected.get(odd, 'none planned')}.\n  save them with the spec they were split by"
        )
    check_finite(arrays)
    try:
        json.dumps(dict(meta or {}))
    except (TypeError, ValueError) as e:
        raise AdapterError(f"meta is not JSON data: {e}; nothing was saved.") from None
    document = {
        "format": FORMAT,
        "spec": spec.to_dict(),
        "axes": {s.path: {**asdict(s.axes), "use": s.use} for s in plan.sites},
        "base": fingerprint(base, [f.path for f in plan.full]),
        "leaves": digests(base, [f.path for f in plan.full]),
        "arrays": {n: {"shape": x.shape, "dtype": str(x.dtype)} for n, x in arrays.items()},
        "versions": {"lorax_kit": __version__, **{name: version(name) for name in ("jax", "orbax-checkpoint")}},
        "meta": dict(meta or {}),
    }
    with staged(path, overwrite) as new:
        _write(new, arrays, document)


def _checked(plan: Plan, spec: Spec, base: Params) -> Plan:
    """The plan, if it is what the spec says of this base; on disk only the spec is kept."""
    settings = match(spec, base)
    sites = {p for p, setting in settings.items() if isinstance(setting, LoRA)}
    axes = {site.path: (site.axes, site.use) for site in plan.sites}
    if sites != set(axes):
        odd = min(sites ^ set(axes))
    else:
        made = make_plan(spec, base, axes)
        if made == plan:
            return plan
        ours, theirs = ({x.path: x for x in [*p.sites, *p.full]} for p in (made, plan))  # type: ignore[attr-defined]
        odd = min((p for p in {*ours, *theirs} if ours.get(p) != theirs.get(p)), default="compute_dtype")
    raise AdapterError(
        f"the plan is not that of the spec and this base: they differ at {odd!r}.\n"
        "  save with the spec the plan was resolved from"
    )


def _shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for site in plan.sites:
        shapes[f"{site.path}:a"], shapes[f"{site.path}:b"] = site.a_shape, site.b_shape
    return shapes | {f"{leaf.path}:value": leaf.shape for leaf in plan.full}


def _write(path: Path, arrays: dict[str, np.ndarray], document: dict[str, Any]) -> None:
    with _quiet(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(factors=ocp.args.StandardSave(arrays), spec=ocp.args.JsonSave(document))
        checkpointer.save(path, items)
    seal(path)


class _quiet:
    """Orbax logs every save at INFO through absl; an adapter is small, and callers have their own progress."""

    def __enter__(self) -> None:
        self._level = logging.getLogger("absl").level
        logging.getLogger("absl").setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("absl").setLevel(self._level)


def read_document(path: str | Path) -> dict[str, Any]:
    """The JSON beside an adapter's factors: spec, fingerprint, arrays, versions, meta.

    Raises:
      AdapterError: no adapter there, or its JSON is damaged.
    """
    path = Path(path).absolute()
    if not (path / "spec").is_dir():
        raise AdapterError(
            f"{str(path)!r} is not an adapter: it has no 'spec' inside.\n  adapters are made by lk.save_adapter"
        )
    check_seal(path)
    try:
        with _quiet(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            document = checkpointer.restore(path, ocp.args.Composite(spec=ocp.args.JsonRestore()))["spec"]
        if document["format"] != FORMAT:
            raise AdapterError(f"{str(path)!r} has format {document['format']!r}; this version reads {FORMAT}.")
        document["spec"] = Spec.from_dict(document["spec"])
        _ = document["base"], document["arrays"], document["axes"], document["meta"]
    except LoraxError:
        raise
    except Exception as e:
        raise damaged(path, _first_line(e)) from e
    return document


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:160]


def load_adapter(path: str | Path, *, base: Params) -> Adapter:
    """Load an adapter for the base it was trained on.

    Args:
      path: directory written by `save_adapter`.
      base: the frozen params.

    Raises:
      AdapterError: nothing there, damaged or truncated files, another base, shapes that do not fit.
    """
    path = Path(path).absolute()
    document = read_document(path)
    spec = document["spec"]
    axes = {
        p: (Axes(inputs=tuple(x["inputs"]), outputs=tuple(x["outputs"]), stack=tuple(x["stack"])), str(x["use"]))
        for p, x in document["axes"].items()
    }
    check_base(path, document, base)
    plan = make_plan(spec, base, axes)
    stored = document["arrays"]
    expected = {name: list(shape) for name, shape in _shapes(plan).items()}
    for name, shape in expected.items():
        have = stored.get(name, {}).get("shape")
        if have != shape:
            raise AdapterError(f"the adapter at {str(path)!r} has {name!r} of shape {have}, its spec expects {shape}.")
    target = {n: jax.ShapeDtypeStruct(tuple(x["shape"]), np.dtype(x["dtype"])) for n, x in stored.items()}
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for n, x in target.items()}
    try:
        with _quiet(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            items = ocp.args.Composite(factors=ocp.args.StandardRestore(target))
            arrays = checkpointer.restore(path, items)["factors"]
    except Exception as e:
        raise damaged(path, _first_line(e)) from e
    factors: dict[str, Factors | FullLeaf] = {}
    for site in plan.sites:
        factors[site.path] = Factors(*(arrays.get(f"{site.path}:{name}") for name in _FIELDS))  # type: ignore[arg-type]
    for leaf in plan.full:
        factors[leaf.path] = FullLeaf(arrays[f"{leaf.path}:value"])
    return Adapter(spec, plan, factors, document["meta"])


def check_base(path: Path, document: Mapping[str, Any], base: Params) -> None:
    """Raise `AdapterError` where the adapter is of another base; warn where only running statistics differ."""
    full = [name.removesuffix(":value") for name in document["arrays"] if name.endswith(":value")]
    own, stored, moving = fingerprint(base, full), document.get("leaves"), statistics(base)
    if own != document["base"]:
        if stored is None and whole_fingerprint(base, full) == document["base"]:  # 0.1.0 counted all arrays
            return
        found = {} if stored is None else differences(digests(base, full), stored)
        found = {p: x for p, x in found.items() if p not in moving}
        prints = f"fingerprint of its base {document['base'][:12]}, of this one {own[:12]}"
        raise AdapterError(
            f"the adapter at {str(path)!r} belongs to another base.\n"
            f"  {first_difference(found) if found else prints}\n"
            "  load the weights it was trained on"
        )
    if stored is not None and moving and (found := differences(digests(base, full), stored)):
        warnings.warn(
            f"the adapter at {str(path)!r} was saved over other running statistics: {first_difference(found)}.",
            stacklevel=3,
        )


def adapter_bytes(path: str | Path) -> int:
    """Bytes of every file of an adapter on disk."""
    return sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file())
