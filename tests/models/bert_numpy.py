"""BERT's forward pass in numpy float64, from the equations of arXiv 1810.04805 and 1706.03762.

Reads weights by their Hugging Face names and knows nothing of the package under test.
"""

import numpy as np
from scipy.special import erf


def gelu(x):
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def forward(weights, ids, mask, types, *, layers, heads, eps=1e-12):
    """Last hidden states (B, T, D) from integer ids, mask and types (B, T)."""
    w = {name: np.asarray(x, np.float64) for name, x in weights.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][types]
    x = norm(x + w["embeddings.position_embeddings.weight"][: ids.shape[1]], "embeddings.LayerNorm")
    for i in range(layers):
        at = f"encoder.layer.{i}"
        q, k, v = (linear(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value"))
        size = x.shape[-1] // heads
        mixed = np.zeros_like(x)
        for row in range(len(x)):
            keep = mask[row] != 0
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                weight = softmax(q[row, :, part] @ k[row, keep, part].T / np.sqrt(size))
                mixed[row, :, part] = weight @ v[row, keep, part]
        x = norm(x + linear(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        up = gelu(linear(x, f"{at}.intermediate.dense"))
        x = norm(x + linear(up, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x
