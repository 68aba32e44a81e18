"""Weights of an ONNX model in 8 bits, in either of two ways; files in, files out.

With activations: products of integers, a scale for each output; the fastest on batches. In blocks: a scale for each 64
inputs of an output, for ONNX Runtime's MatMulNBits, which rounds activations by blocks, too: as fast on a token at a
time, and closer. SmolLM2's perplexity on plays, 51.02 in fp32, becomes 53.89 with activations and 50.84 in blocks.

Low-rank factors need no more than blocks: the logits of a MiniLM whose kernels are halved differ by 0.019 (root mean
square; with activations by 0.089), and by 0.022 where the components of a product are made as large as each other
first, by scales or by a rotation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

BLOCK = 64
"""Inputs that share a scale."""
ZERO = 128
"""What stands for 0 in unsigned bytes."""
LARGEST = 64
"""Of the codes of matrices whose activations are quantised, too."""
ACCURACY = 4
"""Of MatMulNBits: products of integers. Level 1, of floats, takes ten times as long."""


def in_blocks(
    source: Path, file: Path, tables: Collection[tuple[tuple[int, ...], int]], *, products: bool = True
) -> None:
    """Write a model whose matrices, and tables that are looked up, have 8 bits and a scale for each block of inputs.

    Args:
      tables: `mark` of the parameters: other constants that are looked up (angles by place) stay as they are.
      products: whether matrices are; tables alone otherwise.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source)
    graph = model.graph
    stored = {x.name: x for x in graph.initializer if len(x.dims) == 2 and x.data_type == onnx.TensorProto.FLOAT}
    codes: dict[tuple[str, bool], tuple[str, str]] = {}

    def coded(name: str, transposed: bool) -> tuple[str, str]:
        """Names of the codes and scales of a matrix whose rows, or columns where it is transposed, are outputs."""
        if (name, transposed) not in codes:
            w = numpy_helper.to_array(stored[name])
            names = f"{name}_codes_{transposed}", f"{name}_scales_{transposed}"
            for new, array in zip(names, blocks_of(w.T if transposed else w), strict=True):
                graph.initializer.append(numpy_helper.from_array(array, new))
            codes[name, transposed] = names
        return codes[name, transposed]

    def quantised(node: Any) -> Iterator[Any]:
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        options: dict[str, Any]
        matrix = node.input[0] if node.op_type == "Gather" else node.input[1] if len(node.input) > 1 else ""
        if matrix not in stored:
            yield node
        elif node.op_type == "Gather":
            table = numpy_helper.to_array(stored[matrix])
            if settings.get("axis", 0) != 0 or table.shape[1] % BLOCK or mark(table) not in tables:
                yield node
                return
            flat = [f"{name}_rows" for name in coded(matrix, False)]
            shape = f"{matrix}_rows_shape"
            if all(x.name != shape for x in graph.initializer):
                graph.initializer.append(numpy_helper.from_array(np.array([len(table), -1]), shape))
                for name, new in zip(coded(matrix, False), flat, strict=True):
                    yield helper.make_node("Reshape", [name, shape], [new])
            options = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": 8}
            inputs = [flat[0], node.input[1], flat[1]]
            yield helper.make_node("GatherBlockQuantized", inputs, list(node.output), domain="com.microsoft", **options)
        elif products and (node.op_type == "MatMul" or (node.op_type == "Gemm" and _plain(settings))):
            transposed = not settings.get("transB", 0)
            n, k = list(stored[matrix].dims)[:: -1 if transposed else 1]
            bias = list(node.input[2:])
            out = [f"{node.output[0]}_product"] if bias else list(node.output)
            options = {"K": k, "N": n, "bits": 8, "block_size": BLOCK, "accuracy_level": ACCURACY}
            inputs = [node.input[0], *coded(matrix, transposed)]
            yield helper.make_node("MatMulNBits", inputs, out, domain="com.microsoft", **options)
            if bias:
                yield helper.make_node("Add", [out[0], bias[0]], list(node.output))
        else:
            yield node

    nodes = [new for node in list(graph.node) for new in quantised(node)]
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused(graph)
    if all(x.domain != "com.microsoft" for x in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, file)


def mark(x: Any) -> tuple[tuple[int, ...], int]:
    """What tells a parameter again among the constants of a model: its shape and a checksum of its bytes."""
    array = np.ascontiguousarray(x)
    return array.shape, crc32(array.tobytes())


def blocks_of(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8 (N, blocks, 64), scales fp32 (N * blocks)) of a matrix (N, K), K inputs of N outputs.

    A code q means (q - 128) scale; a last block that K does not fill ends in zeros.

    Example:
      >>> codes, scales = blocks_of(np.float32([[127.0, -1.0]]))
      >>> codes[0, 0, :3].tolist(), scales.tolist()
      ([255, 127, 128], [1.0])
    """
    n, k = w.shape
    whole = np.zeros((n, -(-k // BLOCK) * BLOCK), np.float32)
    whole[:, :k] = w
    whole = whole.reshape(n, -1, BLOCK)
    scales = np.abs(whole).max(-1) / np.float32(127)
    scales = np.where(scales == 0, np.float32(1), scales)
    codes = np.clip(np.rint(whole / scales[..., None]), -127, 127) + ZERO
    return codes.astype(np.uint8), scales.reshape(-1)


def _plain(settings: dict[str, Any]) -> bool:
    """Whether a Gemm is a product and a sum."""
    return settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1 and not settings.get("transA", 0)


def drop_unused(graph: Any) -> None:
    """Leave out stored arrays that no node reads."""
    used = {name for node in graph.node for name in node.input} | {x.name for x in graph.output}
    kept = [x for x in graph.initializer if x.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def with_activations(source: Path, file: Path, tables: Collection[tuple[tuple[int, ...], int]] = ()) -> None:
    """Write a model whose matrices have 8 bits and a scale for each output, and whose activations are quantised, too.

    Looked-up tables have one scale, or a scale for each 64 entries where one would not do. Matrices take 7 of the 8
    bits: CPUs without VNNI add two products of 8 bits in 16, which do not hold the largest (255 x 127 twice).

    Args:
      tables: as for `in_blocks`; others stay as they are.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kept = _spread_tables(source)
    quantize_dynamic(
        source, file, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True, nodes_to_exclude=kept
    )
    if kept and tables:
        in_blocks(file, file, tables, products=False)


def _spread_tables(file: Path) -> list[str]:
    """Names of the lookups whose table would lose more than a tenth of over 1 % of its rows under one int8 scale.

    The runtime quantises a table with one scale for all of it, so a single large entry rounds every other row to zero.
    Matrices have a scale for each output: rounding costs one at most 0.0045 sqrt(inputs) of its norm.
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
        lost = np.abs(rows).max() / LARGEST / np.sqrt(12) * np.sqrt(rows.shape[1])  # of evenly spread rounding errors
        if np.mean(lost > 0.1 * norms[norms > 0]) > 0.01:
            names.append(node.name)
    return names
