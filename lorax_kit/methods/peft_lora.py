"""How PEFT keeps LoRA and DoRA: lora_A (r, in) is `a`, lora_B (out, r) is `b` transposed; s = alpha/r or alpha/sqrt(r).

Of an embedding they are lora_embedding_A (r, vocab) and lora_embedding_B (dim, r); of a convolution (r, channels,
*window) and (out, r, 1, ...). Experts share a lora_A (experts * r, in), one after the other, and a lora_B (out, r *
experts), rank by rank. DoRA adds lora_magnitude_vector (out,).

Two starts move the base when PEFT makes the module, and again when it loads one: "pissa" and "olora" take s A0^T B0 off
the weight. Here the base stays, and W' = W + s (A^T B - A0^T B0), as a start of ours has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lorax_kit.errors import AdapterError
from lorax_kit.peft_form import FromPeft, PeftForm, TorchModule
from lorax_kit.starts import STARTS

A, B, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
A_TABLE, B_TABLE, MAGNITUDE = "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"
VELORA = "lora_velora_embed"  # of the backward pass alone
KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
MOVE_THE_BASE = ("pissa", "olora")
_OTHER = "without it the adapter would compute something else"
REFUSED = {
    "kasa_config": "KaSA cuts the base's small singular values off",
    "monteclora_config": "it samples around the factors",
    "use_bdlora": "its factors are made of blocks",
    "arrow_config": "it routes each token to an adapter",
    "alora_invocation_tokens": "it adapts the tokens after an invocation only",
    "layer_replication": "it repeats layers of the base, with an adapter for each copy",
}


def _ends(m: TorchModule) -> tuple[str, str]:
    return (A_TABLE, B_TABLE) if m.layer == "Embedding" else (A, B)


def _ones(m: TorchModule) -> tuple[int, ...]:
    return (1,) * (len(m.inputs) - 1)


def _shapes(m: TorchModule, tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    rank, (a, b) = m.config["r"], _ends(m)
    out = {a: (rank, *m.inputs), b: (m.outputs, rank, *_ones(m))}
    if m.config["use_dora"]:
        out[MAGNITUDE] = (1, m.outputs, *_ones(m)) if _ones(m) else (m.outputs,)
    if m.config["lora_bias"]:
        out[BIAS] = (m.outputs,)
    if m.config["velora_config"]:
        out[VELORA] = (1,)
    return out


def _read(m: TorchModule, tensors: Mapping[str, Any]) -> FromPeft:
    c, (name_a, name_b) = m.config, _ends(m)
    a = tensors[name_a].reshape(c["r"], -1)
    b = tensors[name_b].reshape(m.outputs, -1).T
    setting = {
        "rank": c["r"],
        "alpha": c["lora_alpha"],
        "rslora": bool(c["use_rslora"]),
        "dropout": c["lora_dropout"] or 0.0,
    }
    leaves: dict[str, Any] = {"a": a, "b": b}
    scale = c["lora_alpha"] / (c["r"] ** 0.5 if c["use_rslora"] else c["r"])
    start = c["init_lora_weights"]
    if start in MOVE_THE_BASE:
        a0, b0 = _start(m, start, scale)
        if start in STARTS:
            setting["start"] = start
            leaves = {"a": a - a0, "b": b - b0, "a0": a0, "b0": b0}
        else:
            leaves = {"a": np.concatenate([a, a0]), "b": np.concatenate([b, -b0])}
            setting |= _more_rows(setting, 2)
    elif not any(start is x or (isinstance(x, str) and start == x) for x in KEEP_THE_BASE):
        raise AdapterError(
            f"adapter_config.json has init_lora_weights {start!r}, which also changed the base.\n"
            "  convert it in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if c["use_dora"]:
        leaves["magnitude"] = tensors[MAGNITUDE].reshape(-1)
    shift = scale * tensors[BIAS].astype(np.float64) if c["lora_bias"] else None
    return FromPeft(setting, leaves, bias_shift=shift)


def _start(m: TorchModule, start: str, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A0 and B0 as PEFT makes them from W (K, N); only their product matters, so signs may differ."""
    w, rank = m.weight(), m.config["r"]
    if start == "olora":
        q, r = np.linalg.qr(w.T)
        return r[:rank], q[:, :rank].T
    u, s, v = np.linalg.svd(w, full_matrices=False)
    root = np.sqrt(s[:rank, None] / scale)
    return root * u[:, :rank].T, root * v[:rank]


def _more_rows(setting: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Rank and alpha of `times` as many rows under the same scale."""
    alpha = setting["alpha"] * (times**0.5 if setting["rslora"] else times)
    return {"rank": setting["rank"] * times, "alpha": alpha}


def _rows(leaves: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the update, as in `methods.lora`."""
    a, b, a0, b0 = (leaves.get(name) for name in ("a", "b", "a0", "b0"))
    if a0 is None:
        return a, b  # type: ignore[return-value]
    return np.concatenate([a, a0 + a]), np.concatenate([b0, b])


def _write(m: TorchModule, setting: Any, leaves: Mapping[str, Any]) -> dict[str, Any]:
    (a, b), (name_a, name_b) = _rows(leaves), _ends(m)
    out = {name_a: a.reshape(len(a), *m.inputs), name_b: b.T.reshape(m.outputs, len(b), *_ones(m))}
    if setting.kind == "dora":
        out[MAGNITUDE] = leaves["magnitude"].reshape((1, m.outputs, *_ones(m)) if _ones(m) else (m.outputs,))
    return out


def _config(m: TorchModule, setting: Any, leaves: Mapping[str, Any]) -> dict[str, Any]:
    rows = {"rank": setting.rank, "alpha": setting.effective_alpha, "rslora": setting.rslora}
    if leaves.get("a0") is not None:
        rows |= _more_rows(rows, 2)
    return {
        "r": rows["rank"],
        "lora_alpha": rows["alpha"],
        "use_rslora": setting.rslora,
        "use_dora": setting.kind == "dora",
        "lora_dropout": setting.dropout,
        "init_lora_weights": True,
    }


def _apart(tensors: Mapping[str, Any], experts: int) -> list[dict[str, Any]]:
    a, b = tensors[A], tensors[B]
    a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(len(b), -1, experts)
    return [{A: a[e], B: b[:, :, e]} for e in range(experts)]


def _together(tensors: list[dict[str, Any]]) -> dict[str, Any]:
    a = np.concatenate([t[A] for t in tensors])
    b = np.stack([t[B] for t in tensors], axis=-1)
    return {A: a, B: b.reshape(len(b), -1)}


def form(dora: bool) -> PeftForm:
    """The form of LoRA, or of DoRA."""
    axes = {"a": "ri", "b": "ro", "a0": "ri", "b0": "ro"}
    return PeftForm(
        peft_type="LORA",
        when={"use_dora": dora},
        axes=axes | {"magnitude": "o"} if dora else axes,
        layers=frozenset({"Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d"})
        | (frozenset() if dora else {"Parameter"}),
        keys={
            **{"r": 8, "lora_alpha": 8, "use_rslora": False, "use_dora": False, "lora_dropout": 0.0},
            **{"lora_bias": False, "init_lora_weights": True, "velora_config": None},
        },
        patterns={"r": "rank_pattern", "lora_alpha": "alpha_pattern"},
        training=frozenset(
            {"velora_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_qalora"}
        ),
        refused=REFUSED,
        bias="lora_only",
        ties="never" if dora else "asked",
        endings=(A, B, BIAS, A_TABLE, B_TABLE, MAGNITUDE, VELORA),
        older={f"{MAGNITUDE}.weight": MAGNITUDE},
        product=True,
        apart=None if dora else _apart,
        together=None if dora else _together,
        shapes=_shapes,
        read=_read,
        write=_write,
        config=_config,
    )
