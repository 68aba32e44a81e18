"""Adapters on disk: leaves and spec, apart from the base, written by orbax in one atomic step.

Beside the factors stands `spec` JSON: the spec, the contracted axes, a fingerprint of the base, shapes, and the
versions that wrote it; and the digests of all files. Nothing of the base is stored.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax_kit.checkpoint.agreed import told
from lorax_kit.checkpoint.document import axes_of, check_arrays, check_document, kept_by_json
from lorax_kit.checkpoint.fingerprint import (
    differences,
    digests,
    fingerprint,
    first_difference,
    statistics,
    whole_fingerprint,
)
from lorax_kit.checkpoint.orbax_files import read_arrays, read_json_item, ready, write_files
from lorax_kit.checkpoint.seal import SEAL, check_seal, damaged, seal, sealed_files
from lorax_kit.core.leaves import FactorTree, FullLeaf, check_factors
from lorax_kit.core.merge import check_params
from lorax_kit.core.method import leaf_shapes, method_of
from lorax_kit.core.paths import Params, flatten
from lorax_kit.core.plan import Plan, make_plan
from lorax_kit.core.specs.setting import is_int, shown
from lorax_kit.core.specs.spec import Spec
from lorax_kit.errors import AdapterError, LoraxError
from lorax_kit.files.reading import read_whole
from lorax_kit.files.staging import place, refuse_existing, staged
from lorax_kit.json_text import read_json
from lorax_kit.processes import gathered, is_shared
from lorax_kit.version import __version__

FORMAT = 2
READ = (1, 2)  # 1: a setting's `variant` in place of its kind, which `LoRA` still takes


class Adapter(NamedTuple):
    """What `load_adapter` returns.

    Attributes:
      plan: of the adaptation, with its spec; it fits the base it was loaded for.
      factors: as `lk.merge` and `lk.adapt` take them.
      meta: what the writer added.
    """

    plan: Plan
    factors: dict[str, Any]
    meta: dict[str, Any]

    @property
    def spec(self) -> Spec:
        """Of the plan."""
        return self.plan.spec


def named_arrays(factors: FactorTree) -> dict[str, np.ndarray]:
    """Flat names -> arrays: `path:LEAF`, LEAF a field of the method's leaves, or `value` where trained in full."""
    return {
        f"{path}:{name}": np.asarray(x)
        for path, leaves in factors.items()
        for name, x in leaves._asdict().items()
        if x is not None
    }


def check_finite(arrays: Mapping[str, np.ndarray]) -> None:
    """Raise `AdapterError` at the first array with a NaN or an infinity."""
    for name, x in arrays.items():
        if not np.isfinite(x.astype(np.float32)).all():
            raise AdapterError(f"{name!r} holds values that are not finite; nothing was saved.")


def save_adapter(
    path: str | Path,
    plan: Plan | Spec,
    factors: FactorTree,
    /,
    *,
    base: Params,
    meta: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    identity: BaseIdentity | None = None,
    **older: Any,
) -> None:
    """Save an adapter: plan + factors, apart from the base.

    The directory appears whole or not at all: it is written beside `path` and renamed. Where factors or base lie over
    several processes, all of them call this, and process 0 writes.

    Args:
      path: directory to create.
      plan: what the factors adapt, from `lk.resolve`; its spec is stored. The call of earlier versions,
        `save_adapter(path, spec, factors, base=base, plan=plan)`, still works, with a warning.
      factors: the trained tree.
      base: the frozen params; only a fingerprint is stored.
      meta: JSON data to keep with the adapter: what JSON does not give back equal (tuples, keys that are no strings) is
        refused.
      overwrite: replace an existing adapter, if nothing else lies in its directory; otherwise it is an error.
      identity: `identity_of(base, plan)`, where many adapters of one base are saved: it is hashed once. None: it is
        hashed here.

    Raises:
      AdapterError: the path exists or cannot be made, the factors do not fit the plan, or are not finite, or `meta` is
        not JSON data.
      PlanError: the plan does not fit the base.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import lorax_kit as lk
      >>> params = {"w": jnp.ones((4, 3))}
      >>> plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2)}), params, lambda p, x: x @ p["w"], jnp.ones((5, 4)))
      >>> base, factors = lk.split(params, plan, jax.random.key(0))
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> save_adapter(folder, plan, factors, base=base)
      >>> load_adapter(folder, base=base).plan == plan
      True
    """
    path, together = place(path), is_shared((factors, base))
    check = read_whole(lambda path: refuse_existing(path, overwrite, SEAL, own=sealed_files(path)))
    # Of several processes the writer alone looks: another may be late, and find what this one has written.
    told(lambda: check(path), AdapterError) if together else check(path)
    plan = plan_of(plan, base, older, "save_adapter")
    check_params(flatten(base)[0], plan)
    check_factors(plan, factors)
    arrays = named_arrays(gathered(factors))
    check_finite(arrays)
    meta, identity = kept_by_json(meta), identity or identity_of(base, plan)
    stored, same = _apart(arrays)
    document = {
        "format": FORMAT,
        "spec": plan.spec.to_dict(),
        "axes": {s.path: {**asdict(s.axes), "use": s.use} for s in plan.sites},
        "base": identity.fingerprint,
        "leaves": identity.leaves,
        "arrays": {n: {"shape": x.shape, "dtype": str(x.dtype)} for n, x in stored.items()},
        "same": same,
        "versions": {"lorax_kit": __version__, **ready()},
        "meta": meta,
    }

    def write() -> None:
        with staged(path, overwrite) as new:
            write_files(new, stored, document)
            seal(new)

    return told(write, AdapterError) if together else write()


class BaseIdentity(NamedTuple):
    """What tells one base from another, without the parameters that adapters bring their own values for.

    Attributes:
      fingerprint: of all arrays.
      leaves: path -> dtype, shape and digest, to say in what another base differs.
    """

    fingerprint: str
    leaves: dict[str, list[Any]]


def identity_of(base: Params, plan: Plan) -> BaseIdentity:
    """Hash a base; about a second per GiB."""
    own = [leaf.path for leaf in plan.full]
    return BaseIdentity(fingerprint(base, own), digests(base, own))


def plan_of(given: Plan | Spec, base: Params, older: Mapping[str, Any], who: str) -> Plan:
    """The plan of a call that saves; from a spec, and the keyword `plan`, as earlier versions were called.

    Raises:
      AdapterError: neither; or a plan that is not what its own spec says of this base, which is all that a file keeps.
    """
    unknown = set(older) - {"plan"}
    if unknown:
        raise TypeError(f"{who}() got an unexpected keyword argument {min(unknown)!r}")
    plan: Any = given
    if isinstance(given, Spec):
        warnings.warn(f"{who}(path, spec, ...) will go: give the plan, {who}(path, plan, ...)", DeprecationWarning, 3)
        plan = older.get("plan")
        plan = make_plan(given, base) if plan is None else plan
        if isinstance(plan, Plan) and plan.spec != given:
            plan = replace(plan, spec=given)
    elif older.get("plan") is not None:
        raise AdapterError(f"{who} was given two plans.\n  the second argument is the plan")
    if not isinstance(plan, Plan):
        raise AdapterError(f"{who} needs the plan of the factors, not {type(plan).__name__}.\n  it is from lk.resolve")
    made = make_plan(plan.spec, base, {site.path: (site.axes, site.use) for site in plan.sites})
    if made != plan:
        ours, theirs = ({x.path: x for x in [*p.sites, *p.full]} for p in (made, plan))  # type: ignore[attr-defined]
        odd = min(p for p in {*ours, *theirs} if ours.get(p) != theirs.get(p))
        raise AdapterError(
            f"the plan is not that of its spec and this base: they differ at {odd!r}.\n"
            "  save with the plan that lk.resolve returned, and the base it was resolved against"
        )
    return plan


def _apart(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays that differ, and name -> name of its equal for the others: VeRA's draws are shared by many sites."""
    first: dict[Any, str] = {}
    same = {}
    for name, x in arrays.items():
        key = (
            x.shape,
            str(x.dtype),
            hashlib.sha256(np.ascontiguousarray(x).view(np.uint8).data).digest() if x.size else b"",
        )
        if first.setdefault(key, name) != name:
            same[name] = first[key]
    return {name: x for name, x in arrays.items() if name not in same}, same


def _shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    shapes = {
        f"{site.path}:{name}": x.shape
        for site in plan.sites
        for name, x in leaf_shapes(site)._asdict().items()
        if x is not None
    }
    return shapes | {f"{leaf.path}:value": leaf.shape for leaf in plan.full}


@read_whole
def read_document(path: str | Path, *, typed: bool = True) -> dict[str, Any]:
    """The JSON beside an adapter's factors: spec (a `Spec` if `typed`), fingerprint, arrays, versions, meta.

    Raises:
      AdapterError: no adapter there, or its JSON is damaged.
      SpecError: `typed`, and a method that nothing has registered.
    """
    path = place(path)
    document = _document(path)
    try:
        document["spec"] = Spec.from_dict(document["spec"]) if typed else document["spec"]
    except LoraxError:
        raise
    except Exception as e:
        raise damaged(path, _first_line(e)) from e
    return document


def read_meta(path: str | Path) -> dict[str, Any]:
    """What an adapter remembers of its training, whose methods may be registered later."""
    return read_document(path, typed=False)["meta"]  # type: ignore[no-any-return]


def _document(path: Path) -> dict[str, Any]:
    """The JSON of an adapter, its spec as it is written."""
    try:
        there = (path / "spec").is_dir()
    except OSError as e:  # a name that is too long
        raise AdapterError(f"{shown(str(path))} is not an adapter: {e.strerror}.") from None
    if not there:
        inside = sorted(x.name for x in (path / "adapters").iterdir()) if (path / "adapters").is_dir() else []
        hint = f"of a study, choose one: {path / 'adapters' / inside[0]}" if inside else "lk.save_adapter makes them"
        raise AdapterError(f"{str(path)!r} is not an adapter: it has no 'spec' inside.\n  {hint}")
    check_seal(path)
    try:
        document = read_json_item(path)
        if (path / "spec" / "metadata").is_file():  # orbax takes the last of two keys alike
            read_json(path / "spec" / "metadata")
        if isinstance(document, dict) and is_int(document.get("format")) and document["format"] not in READ:
            raise AdapterError(f"{str(path)!r} has format {document['format']}; this version reads 1 to {FORMAT}.")
        check_document(path, document)
    except LoraxError:
        raise
    except Exception as e:
        raise damaged(path, _first_line(e)) from e
    return document  # type: ignore[no-any-return]


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:160]


@read_whole
def load_adapter(path: str | Path, *, base: Params) -> Adapter:
    """Load an adapter for the base it was trained on.

    Args:
      path: directory written by `save_adapter`.
      base: the frozen params.

    Raises:
      AdapterError: nothing there, damaged or truncated files, another base, shapes that do not fit.
    """
    path = place(path)
    document = read_document(path)
    check_base(path, document, base)
    plan = make_plan(document["spec"], base, axes_of(path, document, document["spec"], base))
    check_arrays(path, document, _shapes(plan))
    stored, same = document["arrays"], document.get("same", {})
    target = {n: jax.ShapeDtypeStruct(tuple(x["shape"]), np.dtype(x["dtype"])) for n, x in stored.items()}
    try:
        arrays = read_arrays(path, target)
    except LoraxError:
        raise
    except Exception as e:
        raise damaged(path, _first_line(e)) from e
    arrays |= {name: arrays[other] for name, other in same.items()}
    factors: dict[str, Any] = {}
    for site in plan.sites:
        leaves = method_of(site.setting).leaves
        factors[site.path] = leaves(*(arrays.get(f"{site.path}:{name}") for name in leaves._fields))
    for leaf in plan.full:
        factors[leaf.path] = FullLeaf(arrays[f"{leaf.path}:value"])
    check_factors(plan, factors)
    return Adapter(plan, factors, document["meta"])


def check_base(path: Path, document: Mapping[str, Any], base: Params) -> None:
    """Raise `AdapterError` where the adapter is of another base; warn where only running statistics differ."""
    names = {*document["arrays"], *document.get("same", {})}
    full = {name.removesuffix(":value") for name in names if name.endswith(":value")}
    base_print, stored, moving = fingerprint(base, full), document.get("leaves"), statistics(base)
    if base_print != document["base"]:
        if stored is None and whole_fingerprint(base, full) == document["base"]:  # 0.1.0 counted all arrays
            return
        differing = {} if stored is None else differences(digests(base, full), stored)
        differing = {p: x for p, x in differing.items() if p not in moving}
        prints = f"fingerprint of its base {document['base'][:12]}, of this one {base_print[:12]}"
        raise AdapterError(
            f"the adapter at {str(path)!r} belongs to another base.\n"
            f"  {first_difference(differing) if differing else prints}\n"
            "  load the weights it was trained on"
        )
    if stored is not None and moving and (differing := differences(digests(base, full), stored)):
        warnings.warn(
            f"the adapter at {str(path)!r} was saved over other running statistics: {first_difference(differing)}.",
            stacklevel=4,
        )


def adapter_bytes(path: str | Path) -> int:
    """Bytes of every file of an adapter on disk."""
    return sum(f.stat().st_size for f in Path(path).rglob("*") if f.is_file())
