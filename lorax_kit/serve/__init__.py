"""Trained functions outside of the project: params as tensors, programs as StableHLO, models of ONNX Runtime.

`save_tensors` keeps params of any kind as they are; `save_stablehlo`, `save_onnx` and `save_litert` keep
`fn(params, *inputs)` with its params inside, to be run by jax alone, by ONNX Runtime alone, or by LiteRT alone. Each
writes one file, whole or not at all. `lorax_kit.generate.programs` makes such functions of a model that writes.
"""

from lorax_kit.errors import ExportError
from lorax_kit.serve.litert import load_litert, save_litert
from lorax_kit.serve.onnx import load_onnx, save_onnx
from lorax_kit.serve.stablehlo import load_stablehlo, save_stablehlo
from lorax_kit.serve.tensors import load_tensors, save_tensors

__all__ = [
    "ExportError",
    "load_litert",
    "load_onnx",
    "load_stablehlo",
    "load_tensors",
    "save_litert",
    "save_onnx",
    "save_stablehlo",
    "save_tensors",
]
