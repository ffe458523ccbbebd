"""Attention by the operator that takes a CPU least, which is another one for short texts than for long ones."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.graph import MICROSOFT, Graph

SHORT = 256
"""Tokens up to which ``Attention`` is faster than ``MultiHeadAttention``, whose flash path is made for long texts.

So it is with AVX512. With AVX2 it is up to 128, and at 256 a run takes 1.02 of the time (``docs/decisions.md``).
"""
OPSET = 23
"""The first with ``Attention``."""


def attend_by_length(graph: Graph) -> Graph:
    """A graph that gives the same for texts of any length, and takes less time for short ones.

    Attention with a bias or a mask stays as it is, and so does all of a graph with operators that newer opsets write
    otherwise. Which of the operators is taken depends on a text's own length alone, so its vector still does, too.
    """
    plain = [node for node in graph.nodes if node.op_type == "MultiHeadAttention" and len(node.input) == 3]
    written_otherwise = any(node.op_type.startswith("Reduce") for node in graph.nodes)
    if not plain or written_otherwise or all(entry.name != "input_ids" for entry in graph.inputs):
        return graph
    result = dataclasses.replace(graph, nodes=[], opsets={**graph.opsets, "": OPSET}, weights=dict(graph.weights))
    tokens = result.add("Shape", "input_ids", name="short.tokens", start=1, end=2)
    limit = result.weight("short.limit", np.array([SHORT], np.int64))
    result.add("LessOrEqual", tokens, limit, name="short")
    chosen, producers = {id(node) for node in plain}, graph.producers()
    for node in graph.nodes:
        width = _width(graph, producers, node.input[2]) if id(node) in chosen else 0
        if width:
            flat = result.weight(f"short.{width}", np.array([0, 0, width], np.int64))
            node = _either(node, flat)
        result.nodes.append(node)
    return result


def _width(graph: Graph, producers: Mapping[str, onnx.NodeProto], value: str) -> int:
    """Dimensions of what a linear gives, rows moved or not; 0 if it isn't from one."""
    while (node := producers.get(value)) and node.op_type in ("Reshape", "Gather"):
        value = node.input[0]
    if node is None or node.op_type not in ("MatMulIntegerToFloat", "Gemm") or node.input[1] not in graph.weights:
        return 0
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return int(graph.weights[node.input[1]]().shape[0 if transposed else 1])


def _either(node: onnx.NodeProto, flat: str) -> onnx.NodeProto:
    """An ``If`` between both operators; ``flat`` names the shape ``[0, 0, width]``."""
    (heads,) = (attribute.i for attribute in node.attribute if attribute.name == "num_heads")
    scale = {attribute.name: attribute.f for attribute in node.attribute if attribute.name == "scale"}
    (output,) = node.output
    short, long = (f"{output}.{length}" for length in ("short", "long"))
    query, key, value = node.input
    # A width that is known beforehand: ONNX Runtime otherwise infers 0 and warns in every run.
    shaped = helper.make_node("Reshape", [value, flat], [f"{short}.value"], f"{short}.value")
    inputs = [query, key, f"{short}.value"]
    attention = helper.make_node("Attention", inputs, [short], short, q_num_heads=heads, kv_num_heads=heads, **scale)
    flash = helper.make_node("MultiHeadAttention", node.input, [long], long, domain=MICROSOFT, num_heads=heads, **scale)
    branches = {
        f"{branch}_branch": helper.make_graph(
            nodes, branch, [], [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)]
        )
        for branch, nodes in (("then", [shaped, attention]), ("else", [flash]))
    }
    return helper.make_node("If", ["short"], [output], output, **branches)
