"""`load_peft`: a PEFT folder as an adapter of a base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lorax_kit.arrays.dtypes import wide
from lorax_kit.checkpoint.adapter import Adapter
from lorax_kit.core.leaves import FullLeaf, check_factors
from lorax_kit.core.paths import Params, flatten, is_array
from lorax_kit.core.plan import Plan, make_plan
from lorax_kit.core.site import Axes
from lorax_kit.core.specs.patterns import literal
from lorax_kit.core.specs.setting import Full, check_float_dtype
from lorax_kit.core.specs.spec import AnySetting, Spec
from lorax_kit.errors import AdapterError, LoraxError
from lorax_kit.files.reading import read_whole
from lorax_kit.peft.folder.config import Config
from lorax_kit.peft.folder.files import config_notes, read_weights, sort_out
from lorax_kit.peft.modules import Reader
from lorax_kit.peft.names import Names
from lorax_kit.peft.sites import leaves_of, setting_of
from lorax_kit.peft.whole import full_leaves


@read_whole
def load_peft(
    path: str | Path,
    *,
    base: Params,
    names: Mapping[str, Any],
    plan: Plan | None = None,
    dtype: str | None = "float32",
    reduce_ranks: bool = False,
) -> Adapter:
    """Read a PEFT folder as an adapter of `base`.

    PEFT adapts modules, this package parameters: where one parameter serves two modules (a tied embedding), the folder
    must move both alike, or is refused. The format knows its base by name only, so shapes are all that is compared.

    Args:
      path: folder written by PEFT's `save_pretrained` or by `save_peft`.
      base: the frozen params.
      names: path of a parameter -> its name in the torch model, such as `lorax_kit.models.torch_names(config)`.
        A name with `{}` stands for all layers of a stacked parameter, "c_attn.weight[0:64]" for some outputs of a fused
        one, and a tuple of names for a tied one.
      plan: any plan of the same parameters (`lk.resolve`), to say which axes of them are contracted. Without it
        kernels are (*in, *out), and a matrix of another name is taken the way its tensors fit.
      dtype: of what is trained, whatever the file has; None: as stored, gains in at least float32.
      reduce_ranks: refactor LoRA's of a rank above min(in, out) to that rank, which holds the same update.

    Returns:
      An `Adapter`: one rule for each parameter in its spec, the content of adapter_config.json as its meta; there
      under "notes", a list of lines, what the folder has that changes nothing here.

    Raises:
      AdapterError: no folder or damaged files; a method, setting, target or tensor that has no counterpart; tensors
        missing, or of another shape than config and base say; a parameter that serves two modules of which PEFT
        moved one.

    Example:
      adapter = lk.load_peft("folder", base=base, names=lorax_kit.models.torch_names(config))
      merged = lk.merge(base, adapter.factors, adapter.plan)
    """
    path = Path(path).absolute()
    if dtype is not None:
        check_float_dtype(dtype, "dtype")
    config = Config(path)
    named = {p: x for p, x in flatten(base)[0].items() if is_array(x)}
    torch = Names(names, named, plan)
    tensors = sort_out(read_weights(path), config.form, config.beside)
    config.notes += config_notes(path)
    reader = Reader(config, torch, named, plan)
    try:
        pieces = reader.read(tensors)
        rules: dict[str, AnySetting] = {}
        axes: dict[str, tuple[Axes, str]] = {}
        for p, piece in pieces.items():
            rules[literal(p)] = setting_of(piece, dtype, named[p], reduce_ranks)
            axes[p] = piece.way.axes, reader.use(p, piece.way)
        full = full_leaves(config, tensors.rest, torch, named, reader, dtype)
        for p, value in full.items():
            own = wide(named[p].dtype) if jnp.finfo(named[p].dtype).bits < 32 else named[p].dtype
            rules[literal(p)] = Full(dtype=None if value.dtype == own else str(value.dtype))
        rules = {rule: rules[rule] for p in named if (rule := literal(p)) in rules}
        if not rules:
            raise AdapterError(f"{str(path)!r} holds no tensors that adapt anything.")
        made = make_plan(Spec(rules), base, axes)
        factors: dict[str, Any] = {site.path: leaves_of(site, pieces[site.path]) for site in made.sites}
        factors |= {p: FullLeaf(jnp.asarray(value)) for p, value in full.items()}
        check_factors(made, factors)
    except AdapterError:
        raise
    except LoraxError as e:
        raise AdapterError(f"the adapter at {str(path)!r} does not fit: {e}") from None
    meta = dict(config.data)
    return Adapter(made, factors, meta | {"notes": config.notes} if config.notes else meta)
