"""Attention by the operator that takes a CPU least, which is another one for short texts than for long ones."""

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.graph import MICROSOFT, Graph

SHORT = 100
"""Tokens up to which ``Attention`` is faster than ``MultiHeadAttention``, whose flash path is made for long texts."""
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
    chosen = {id(node) for node in plain}
    result.nodes += [_either(node) if id(node) in chosen else node for node in graph.nodes]
    return result


def _either(node: onnx.NodeProto) -> onnx.NodeProto:
    """An ``If`` between both operators."""
    (heads,) = (attribute.i for attribute in node.attribute if attribute.name == "num_heads")
    scale = {attribute.name: attribute.f for attribute in node.attribute if attribute.name == "scale"}
    (output,) = node.output
    short, long = (f"{output}.{length}" for length in ("short", "long"))
    attention = helper.make_node(
        "Attention", node.input, [short], short, q_num_heads=heads, kv_num_heads=heads, **scale
    )
    flash = helper.make_node("MultiHeadAttention", node.input, [long], long, domain=MICROSOFT, num_heads=heads, **scale)
    branches = {
        f"{branch}_branch": helper.make_graph(
            [operator], branch, [], [helper.make_tensor_value_info(operator.output[0], TensorProto.FLOAT, None)]
        )
        for branch, operator in (("then", attention), ("else", flash))
    }
    return helper.make_node("If", ["short"], [output], output, **branches)
