"""One Linear under the real PEFT, in float64, with random leaves: what the formulas are held against."""

import warnings

import numpy as np
import torch
from peft import get_peft_model

X = "layer"
_NAMES = ("lora_", "vera_lambda", "hada_", "lokr_", "miss_", "delora_A", "delora_B", "delora_lambda", "hra_", "ia3_")


class Layer:
    """A module of PEFT around Linear(in, out).

    Attributes:
      w, bias: of the base, (in, out) and (out,), before anything.
      tensors: PEFT's parameters and buffers by name without the adapter's.
      merged_w, merged_bias: after `merge`.
      x, y: inputs (7, in) and what `forward` gave, unmerged.
      module: PEFT's module, merged.
      trained: how many parameters PEFT trains here.
    """

    def __init__(self, config, size_in, size_out, *, base=None, seed=0):
        torch.manual_seed(seed)
        model = torch.nn.ModuleDict({X: torch.nn.Linear(size_in, size_out) if base is None else base}).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p))
        self.w, self.bias = self._weights(model[X])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        # On a base that is not float32 PEFT by accident also trains AdaLoRA's divisor `ranknum`, which it never saves.
        trained = [p for name, p in adapted.named_parameters() if p.requires_grad and "ranknum" not in name]
        self.trained = sum(p.numel() for p in trained)
        self.module = module = adapted.double().eval().base_model.model[X]
        with torch.no_grad():
            for name, p in module.named_parameters():
                if "magnitude" in name:
                    p.mul_(1 + 0.3 * torch.rand_like(p))
                elif name.startswith(_NAMES):
                    p.copy_(torch.randn_like(p))
            x = torch.randn(7, size_in, dtype=torch.float64)
            self.x, self.y = x.numpy(), module(x).numpy()
        held = [*module.named_parameters(), *module.named_buffers()]
        self.tensors = {name.replace(".default", ""): p.detach().numpy().copy() for name, p in held}
        module.merge()
        self.merged_w, self.merged_bias = self._weights(module.get_base_layer())

    @staticmethod
    def _weights(linear):
        w = linear.weight.detach().numpy().copy()
        return w if linear.__class__.__name__ == "Conv1D" else w.T, linear.bias.detach().numpy().copy()

    def check(self, w, bias=None, *, atol=1e-12):
        """The effective weight and bias are PEFT's, both merged and in its forward pass."""
        bias = self.bias if bias is None else bias
        scale = np.abs(self.merged_w).max()
        np.testing.assert_allclose(w / scale, self.merged_w / scale, rtol=0, atol=atol)
        np.testing.assert_allclose(bias, self.merged_bias, rtol=1e-12)
        size = np.abs(self.y).max()
        np.testing.assert_allclose((self.x @ w + bias) / size, self.y / size, rtol=0, atol=atol)
        assert np.abs(self.y - self.x @ self.w - self.bias).max() > 1e-2
