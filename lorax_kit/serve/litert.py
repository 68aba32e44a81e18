"""A function with its params inside as a LiteRT model (.tflite), of fixed sizes, which runs on phones.

The only file that uses tensorflow and ai-edge-litert (the `litert` extra). The way there is jax2tf, a graph of
TensorFlow that holds StableHLO, and its converter. Inputs are named x0, x1, ... in their order, outputs as given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorax_kit.core.paths import Params
from lorax_kit.errors import ExportError
from lorax_kit.extras import need
from lorax_kit.files.staging import refuse_existing, staged
from lorax_kit.serve.program import first_line, program


def check_installed() -> None:
    """Raise `ExportError` unless the converter and the runtime are there."""
    need("litert", "tensorflow", "ai_edge_litert", raises=ExportError)


def save_litert(
    file: str | Path,
    fn: Callable[..., Any],
    params: Params,
    inputs: Mapping[str, Any],
    *,
    outputs: Sequence[str] = ("output",),
    overwrite: bool = False,
) -> None:
    """Write `fn(params, *inputs.values())` as a LiteRT model with one signature, whose names are those given.

    Args:
      file: to create; it appears whole or not at all.
      fn, params, inputs: as `lorax_kit.serve.program.program` takes them; sizes are numbers.
      outputs: a name for each array that `fn` returns.
      overwrite: replace an existing file; otherwise it is an error.

    Raises:
      AdapterError: the file exists.
      ExportError: the extra is not installed; a size that is no number; what `program` raises; an operation that the
        converter lacks; names that are not one for each output.
    """
    path = Path(file).absolute()
    refuse_existing(path, overwrite, None, "file")
    check_installed()
    for name, x in inputs.items():
        if not all(isinstance(size, int) for size in x.shape):
            raise ExportError(f"the input {name!r} is {list(map(str, x.shape))}; LiteRT needs sizes that are numbers.")
    traced = program(fn, params, inputs)
    if len(outputs) != traced.outputs or len(set(outputs)) != len(outputs):
        raise ExportError(f"the function returns {traced.outputs} arrays, and `outputs` names {list(outputs)}.")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf
    from jax.experimental import jax2tf

    names = [f"x{i}" for i in range(len(traced.inputs))]  # a signature's names are Python's
    given = [tf.TensorSpec(x.shape, x.dtype, name=name) for name, x in zip(names, traced.inputs.values(), strict=True)]
    leaves, treedef = jax.tree.flatten(params)

    def run(leaves: Any, *arrays: Any) -> dict[str, Any]:
        values = jax.tree.leaves(fn(jax.tree.unflatten(treedef, leaves), *arrays))
        return dict(zip(outputs, values, strict=True))

    try:
        module = tf.Module()
        # As variables, which the converter freezes: constants within the StableHLO of a large model take it minutes.
        module.weights = [tf.Variable(np.asarray(x), trainable=False) for x in leaves]
        converted_run = jax2tf.convert(run, with_gradient=False)
        module.run = tf.function(lambda *x: converted_run(module.weights, *x), autograph=False, jit_compile=True)
        concrete = module.run.get_concrete_function(*given)
        converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], module)
        converted = converter.convert()
    except Exception as e:
        raise ExportError(f"the LiteRT converter failed: {first_line(e)}.\n  export as ONNX or StableHLO") from e
    with staged(path, overwrite) as new:
        new.write_bytes(converted)


def load_litert(file: str | Path, outputs: Sequence[str] = ("output",)) -> Callable[..., list[np.ndarray]]:
    """`run(*arrays)` of a LiteRT model on the CPU: its outputs as a list, in the order of their names.

    Raises:
      FileNotFoundError: no such file.
      ExportError: the extra is not installed; a file that the runtime cannot run.
    """
    check_installed()
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}.")
    from ai_edge_litert.interpreter import Interpreter

    try:
        signature = Interpreter(str(file), num_threads=os.cpu_count()).get_signature_runner()
    except Exception as e:
        raise ExportError(f"LiteRT cannot run {str(file)!r}: {first_line(e)}.") from e

    def run(*arrays: Any) -> list[np.ndarray]:
        try:
            values = signature(**{f"x{i}": np.asarray(x) for i, x in enumerate(arrays)})
        except Exception as e:
            raise ExportError(f"{str(file)!r} cannot be run on these inputs: {first_line(e)}.") from e
        return [values[name] for name in outputs]

    return run
