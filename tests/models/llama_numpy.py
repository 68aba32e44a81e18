"""LLaMA's forward pass in numpy float64, from the equations of arXiv 2302.13971, 1910.07467, 2104.09864, 2305.13245.

Reads weights by their Hugging Face names and knows nothing of the package under test. Rotations are products of
complex numbers; every head and every place is a loop of its own.
"""

import numpy as np


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotated(head, theta):
    """(T, K), entries i and i + K/2 as the real and imaginary part of a number turned by t theta^(-2i/K)."""
    tokens, size = head.shape
    half = size // 2
    speed = theta ** (-2 * np.arange(half) / size)
    turned = (head[:, :half] + 1j * head[:, half:]) * np.exp(1j * np.arange(tokens)[:, None] * speed)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attended(q, k, v, mask):
    """(T, K): each place reads the places up to itself that the mask allows; zero where there are none."""
    out = np.zeros_like(q)
    for t in range(len(q)):
        keep = np.flatnonzero(mask[: t + 1])
        if len(keep):
            e = k[keep] @ q[t] / np.sqrt(q.shape[-1])
            e = np.exp(e - e.max())
            out[t] = e / e.sum() @ v[keep]
    return out


def forward(weights, ids, mask, *, layers, heads, shared, theta, eps):
    """Logits (B, T, V) from integer ids and mask (B, T); the head is the embedding unless there is an lm_head."""
    w = {name: np.asarray(x, np.float64) for name, x in weights.items()}
    words = w["model.embed_tokens.weight"]
    out = []
    for row, seen in zip(ids, mask, strict=True):
        x = words[row]
        size = x.shape[-1] // heads
        for i in range(layers):
            at = f"model.layers.{i}"
            y = rms_norm(x, w[f"{at}.input_layernorm.weight"], eps)
            q, k, v = (y @ w[f"{at}.self_attn.{name}_proj.weight"].T for name in "qkv")
            mixed = []
            for h in range(heads):
                own, group = (slice(n * size, (n + 1) * size) for n in (h, h // (heads // shared)))
                mixed.append(attended(rotated(q[:, own], theta), rotated(k[:, group], theta), v[:, group], seen))
            x = x + np.concatenate(mixed, -1) @ w[f"{at}.self_attn.o_proj.weight"].T
            y = rms_norm(x, w[f"{at}.post_attention_layernorm.weight"], eps)
            gate, up = (y @ w[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T
        x = rms_norm(x, w["model.norm.weight"], eps)
        out.append(x @ w.get("lm_head.weight", words).T)
    return np.stack(out)
