"""A function with its params inside as an ONNX model, in fp32 or int8, which ONNX Runtime runs on servers and phones.

The only file that uses jax2onnx, onnx and onnxruntime (the `export` extra). The converter is given the traced program:
from a Flax module it would make larger operations, but loses the sizes that vary.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from lorax_kit.checkpoint.staging import refuse_existing, staged
from lorax_kit.core.paths import Params
from lorax_kit.errors import ExportError
from lorax_kit.serve.program import first_line, program


def check_installed() -> None:
    """Raise `ExportError` unless the converter and the runtime are there."""
    if missing := [name for name in ("jax2onnx", "onnx", "onnxruntime") if find_spec(name) is None]:
        raise ExportError(f"{missing[0]} is not installed.\n  install the extra: pip install 'lorax_kit[export]'")


def save_onnx(
    file: str | Path,
    fn: Callable[..., Any],
    params: Params,
    inputs: Mapping[str, Any],
    *,
    outputs: Sequence[str] = ("output",),
    int8: bool = False,
    overwrite: bool = False,
) -> None:
    """Write `fn(params, *inputs.values())` as an ONNX model that ONNX Runtime has loaded once.

    Args:
      file: to create; it appears whole or not at all.
      fn, params, inputs: as `lorax_kit.serve.program.program` takes them: sizes of the inputs may be symbolic.
      outputs: a name for each array that `fn` returns.
      int8: matrices in 8 bits with a scale for each of their outputs, looked-up tables with one, but in fp32 those
        whose entries differ too much for one; activations are quantised as they come.
      overwrite: replace an existing file; otherwise it is an error.

    Raises:
      AdapterError: the file exists.
      ExportError: the extra is not installed; what `program` raises; an operation that the converter or the runtime
        lacks; names that are not one for each output.

    Example:
      inputs = jax.export.symbolic_args_specs({"x": x}, "batch, 4")
      save_onnx("model.onnx", lambda p, x: x @ p["w"], params, inputs, outputs=("y",))
      onnxruntime.InferenceSession("model.onnx").run(["y"], {"x": np.ones((7, 4), np.float32)})
    """
    path = Path(file).absolute()
    refuse_existing(path, overwrite, None, "file")
    check_installed()
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
        with TemporaryDirectory() as folder, staged(path, overwrite) as new:
            raw, folded = Path(folder) / "raw.onnx", Path(folder) / "folded.onnx"
            onnx.save(model, raw)
            try:
                _fold(raw, folded)
                if int8:
                    _quantise(folded, new)
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


def _quantise(source: Path, file: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kept = _spread_tables(source)
    quantize_dynamic(source, file, weight_type=QuantType.QInt8, per_channel=True, nodes_to_exclude=kept)


def _spread_tables(file: Path) -> list[str]:
    """Names of the lookups whose table would lose more than a tenth of over 1 % of its rows under one int8 scale.

    The runtime quantises a table with one scale for all of it, so a single large entry rounds every other row to zero.
    Matrices have a scale for each output: rounding costs one at most 0.0023 sqrt(inputs) of its norm.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    tables = {x.name: x for x in graph.initializer}
    names = []
    for node in graph.node:
        if node.op_type != "Gather" or node.input[0] not in tables:
            continue
        table = numpy_helper.to_array(tables[node.input[0]])
        if table.dtype.kind != "f" or table.ndim < 2 or table.size == 0:
            continue
        rows = table.reshape(len(table), -1).astype(np.float32)
        norms = np.linalg.norm(rows, axis=1)
        lost = np.abs(rows).max() / 127 / np.sqrt(12) * np.sqrt(rows.shape[1])  # of evenly spread rounding errors
        if np.mean(lost > 0.1 * norms[norms > 0]) > 0.01:
            names.append(node.name)
    return names


@contextmanager
def _quiet() -> Iterator[None]:
    """The converter warns of every plugin that another JAX would need, the quantiser of steps that were done before."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
