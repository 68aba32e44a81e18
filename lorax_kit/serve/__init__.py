"""Trained functions outside of the project: params as tensors, programs as StableHLO, models of ONNX Runtime.

`save_tensors` keeps params of any kind as they are; `save_stablehlo` and `save_onnx` keep `fn(params, *inputs)` with
its params inside, to be run by jax alone, or by ONNX Runtime alone. Each writes one file, whole or not at all.
"""

from lorax_kit.errors import ExportError
from lorax_kit.serve.onnx import load_onnx, save_onnx
from lorax_kit.serve.stablehlo import load_stablehlo, save_stablehlo
from lorax_kit.serve.tensors import load_tensors, save_tensors

__all__ = [
    "ExportError",
    "load_onnx",
    "load_stablehlo",
    "load_tensors",
    "save_onnx",
    "save_stablehlo",
    "save_tensors",
]
