"""A function with its params inside as an ONNX model, in fp32 or int8, which ONNX Runtime runs on servers and phones.

This file and `int8` are the only ones that use jax2onnx, onnx and onnxruntime (the `export` extra). The converter is
given the traced program: from a Flax module it would make larger operations, but loses the sizes that vary.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from lorax_kit.core.paths import Params, flatten, is_array
from lorax_kit.errors import ExportError
from lorax_kit.extras import need
from lorax_kit.files.staging import refuse_existing, staged
from lorax_kit.serve.int8 import in_blocks, mark, with_activations
from lorax_kit.serve.program import first_line, program

SHARED = 4096
"""Bytes from which on an array is stored apart from the program."""

MOST_BYTES = 2**31 - 2**20
"""Of parameters in one ONNX file, a protobuf message of less than 2 GiB, with room for the program."""


def check_installed() -> None:
    """Raise `ExportError` unless the converter and the runtime are there."""
    need("export", "jax2onnx", "onnx", "onnxruntime", raises=ExportError)


def save_onnx(
    file: str | Path,
    fn: Callable[..., Any],
    params: Params,
    inputs: Mapping[str, Any],
    *,
    outputs: Sequence[str] = ("output",),
    int8: bool = False,
    blocks: bool = False,
    overwrite: bool = False,
) -> None:
    """Write `fn(params, *inputs.values())` as an ONNX model that ONNX Runtime has loaded once.

    Args:
      file: to create; it appears whole or not at all.
      fn, params, inputs: as `lorax_kit.serve.program.program` takes them: sizes of the inputs may be symbolic.
      outputs: a name for each array that `fn` returns.
      int8: matrices in 8 bits with a scale for each of their outputs, looked-up tables with one, or with one for each
        64 entries where those differ too much; activations are quantised as they come.
      blocks: of int8, a scale for each 64 inputs instead, and of tables, too: closer, as fast for one token at a time,
        and slower for batches.
      overwrite: replace an existing file; otherwise it is an error.

    Raises:
      AdapterError: the file exists.
      ExportError: the extra is not installed; params of 2 GiB; what `program` raises; an operation that the converter
        or the runtime lacks; names that are not one for each output.

    Example:
      inputs = jax.export.symbolic_args_specs({"x": x}, "batch, 4")
      save_onnx("model.onnx", lambda p, x: x @ p["w"], params, inputs, outputs=("y",))
      onnxruntime.InferenceSession("model.onnx").run(["y"], {"x": np.ones((7, 4), np.float32)})
    """
    path = Path(file).absolute()
    refuse_existing(path, overwrite, None, "file")
    check_installed()
    held = sum(prod(x.shape) * x.dtype.itemsize for x in flatten(params)[0].values() if is_array(x))
    if held > MOST_BYTES:
        raise ExportError(
            f"the params hold {held / 2**30:.1f} GiB, and the converter writes files of less than 2 GiB.\n"
            "  export as StableHLO, or the params alone as safetensors"
        )
    traced = program(fn, params, inputs)
    if len(outputs) != traced.outputs or len(set(outputs)) != len(outputs):
        raise ExportError(f"the function returns {traced.outputs} arrays, and `outputs` names {list(outputs)}.")
    with _quiet():
        import onnx
        from jax2onnx import to_onnx

        try:
            # The program is typed already; strict promotion would stop the converter's own arithmetic.
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                model = to_onnx(
                    lambda *arrays: tuple(traced.run(*arrays)),
                    list(traced.inputs.values()),
                    input_names=list(traced.inputs),
                    output_names=list(outputs),
                )
        except Exception as e:
            raise _unsupported(e, traced.operations) from e
        _plain_products(model)
        _tied_products(model)
        with TemporaryDirectory() as folder, staged(path, overwrite) as new:
            raw, folded = Path(folder) / "raw.onnx", Path(folder) / "folded.onnx"
            onnx.save(model, raw)
            try:
                _fold(raw, folded)
                if int8:
                    floats = [x for x in flatten(params)[0].values() if getattr(x, "dtype", None) == np.float32]
                    tables = {mark(x) for x in floats if x.ndim == 2}
                    (in_blocks if blocks else with_activations)(folded, new, tables)
                else:
                    new.write_bytes(folded.read_bytes())
                load_onnx(new)
            except ExportError:
                raise
            except Exception as e:  # pybind's and protobuf's own kinds
                raise ExportError(f"ONNX Runtime cannot run the function: {first_line(e)}.") from e


def load_onnx(file: str | Path) -> Callable[..., list[np.ndarray]]:
    """`run(*arrays)` of an ONNX model in ONNX Runtime on the CPU: its outputs as a list.

    `run` raises `ExportError` for inputs that the model does not take.

    Raises:
      FileNotFoundError: no such file.
      ExportError: the extra is not installed; a file that the runtime cannot run.
    """
    check_installed()
    import onnxruntime

    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise ExportError(f"ONNX Runtime cannot run {str(file)!r}: {first_line(e)}.") from e
    names = [x.name for x in session.get_inputs()]

    def run(*arrays: Any) -> list[np.ndarray]:
        if len(arrays) != len(names):
            raise ExportError(f"{str(file)!r} takes {', '.join(names)}; {len(arrays)} arrays were given.")
        try:
            return session.run(None, dict(zip(names, map(np.asarray, arrays), strict=True)))
        except Exception as e:  # pybind's own kinds
            raise ExportError(f"{str(file)!r} cannot be run on these inputs: {first_line(e)}.") from e

    return run


def share_weights(files: Sequence[Path], out: Path) -> None:
    """Move the large arrays of several ONNX models to one file beside them, equal ones once."""
    import onnx
    from onnx.external_data_helper import set_external_data

    places: dict[bytes, int] = {}
    with out.open("wb") as stored:
        for file in files:
            model = onnx.load(file)
            for array in model.graph.initializer:
                content = array.raw_data
                if len(content) < SHARED:
                    continue
                key = sha256(content).digest()
                if key not in places:
                    stored.write(bytes(-stored.tell() % 64))
                    places[key] = stored.tell()
                    stored.write(content)
                set_external_data(array, out.name, offset=places[key], length=len(content))
                array.ClearField("raw_data")
            onnx.save(model, file)


def _unsupported(error: Exception, operations: frozenset[str]) -> ExportError:
    """The converter names an operation it lacks within its message, or fails while it translates one."""
    named = [word for word in re.findall(r"\w+", str(error)) if word in operations]
    what = f"the function uses {named[0]!r}, which it lacks" if named else "it cannot translate the function"
    return ExportError(
        f"the ONNX converter failed: {what} ({first_line(error)}).\n"
        "  export as StableHLO, or leave the operation out of the function that you export"
    )


def _plain_products(model: Any) -> None:
    """Products with a matrix as MatMul: the int8 quantiser leaves Einsum, and Gemm with beta 0, as they are."""
    for node in model.graph.node:
        settings = {a.name: a for a in node.attribute}
        if node.op_type == "Einsum":
            x, _, rest = settings["equation"].s.decode().partition(",")
            y, _, out = rest.partition("->")
            plain = len(y) == 2 and x[-1:] == y[0] and out == x[:-1] + y[1] and y[1] not in x
        elif node.op_type == "Gemm":
            values = {name: a.f if name in ("alpha", "beta") else a.i for name, a in settings.items()}
            plain = values.pop("beta", 1.0) == 0 and values.pop("alpha", 1.0) == 1 and not any(values.values())
        else:
            continue
        if plain:
            del node.input[2:], node.attribute[:]
            node.op_type = "MatMul"


def _tied_products(model: Any) -> None:
    """Products with the rows of a stored matrix as Gemm, which reads it as it lies: Einsum transposes it each time.

    So a table of words is stored once where a model looks words up in it and scores them by it.
    """
    from onnx import helper, numpy_helper

    graph, nodes = model.graph, []
    stored = {x.name: list(x.dims) for x in graph.initializer}
    for node in graph.node:
        equation = next((a.s.decode() for a in node.attribute if a.name == "equation"), "")
        x, _, rest = equation.partition(",")
        y, _, out = rest.partition("->")
        if not equation or len(y) != 2 or node.input[1] not in stored or x[-1:] != y[1] or out != x[:-1] + y[0]:
            nodes.append(node)
            continue
        rows, columns = stored[node.input[1]]
        name = node.output[0]
        for given, value in (("flat", [-1, columns]), ("rows", [rows])):
            graph.initializer.append(numpy_helper.from_array(np.array(value), f"{name}_{given}"))
        nodes += [
            helper.make_node("Shape", [node.input[0]], [f"{name}_before"], end=-1),
            helper.make_node("Concat", [f"{name}_before", f"{name}_rows"], [f"{name}_shape"], axis=0),
            helper.make_node("Reshape", [node.input[0], f"{name}_flat"], [f"{name}_x"]),
            helper.make_node("Gemm", [f"{name}_x", node.input[1]], [f"{name}_y"], transB=1),
            helper.make_node("Reshape", [f"{name}_y", f"{name}_shape"], [name]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def _fold(source: Path, file: Path) -> None:
    """Evaluate what depends on params alone, by the runtime's own standard rewrites; transposed factors among it."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(file)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    model = onnx.load(file)
    # The runtime lists every set of operations it knows, and another runtime would ask for them.
    used = {node.domain for node in model.graph.node} | {f.domain for f in model.functions} | {""}
    kept = [x for x in model.opset_import if x.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    onnx.save(model, file)


@contextmanager
def _quiet() -> Iterator[None]:
    """The converter warns of every plugin that another JAX would need, the quantiser of steps that were done before."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
