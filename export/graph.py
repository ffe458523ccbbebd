"""An ONNX graph under construction: nodes as protobufs, weights as loaders that are read one at a time."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
OPSETS = {"": 17, MICROSOFT: 1}
"""Opset 17 is the first with LayerNormalization; nothing newer is needed, so older ONNX Runtimes load the graph too."""

PROTOBUF_LIMIT = 2_000_000_000
"""Bytes of weights that go into one file; a protobuf message can't hold 2 GiB."""
PAGE = 4096

Loader = Callable[[], np.ndarray]


@dataclass
class Graph:
    """Nodes in topological order, and the weights they name.

    Attributes:
        inputs: Input values.
        outputs: Output values.
        nodes: Operators, each after those it reads from.
        weights: Initializers by name; calling one reads it, so that a model need never be whole in memory.
        opsets: Version of each operator domain.
    """

    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Loader] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=lambda: dict(OPSETS))

    def add(
        self,
        op: str,
        *inputs: str,
        name: str = "",
        domain: str = "",
        further: Sequence[str] = (),
        **attributes: Any,  # noqa: ANN401
    ) -> str:
        """Append an operator, and return the name of its output; ``further`` ones are called ``{output}.{further}``."""
        output = name or f"{op.lower()}_{len(self.nodes)}"
        outputs = [output, *(f"{output}.{other}" for other in further)]
        self.nodes.append(helper.make_node(op, list(inputs), outputs, output, domain=domain, **attributes))
        return output

    def weight(self, name: str, value: np.ndarray | Loader) -> str:
        """Add an initializer, and return its name."""
        self.weights[name] = value if callable(value) else lambda: value
        return name

    def integers(self, value: int | list[int]) -> str:
        """Add an int64 constant, a scalar or a list, and return its name, which is how it is written."""
        return self.weight(str(value), np.array(value, np.int64))

    def save(self, path: Path) -> Path | None:
        """Write the graph, holding one weight at a time.

        A protobuf message may be written in pieces that a reader merges (protobuf encoding, "Last One Wins"), so the
        weights are appended as models that hold nothing but one initializer. Past protobuf's limit of 2 GB they go to a
        file of their own (ONNX external data), which a session maps into memory.

        Returns:
            The file of the weights, if there is one.
        """
        data = path.with_name(f"{path.name}.data")
        large = sum(load().nbytes for load in self.weights.values()) > PROTOBUF_LIMIT
        graph = helper.make_graph(self.nodes, "encoder", self.inputs, self.outputs)
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="bge-onnx")
        with path.open("wb") as stream, data.open("wb") if large else contextlib.nullcontext() as apart:
            stream.write(model.SerializeToString())
            for name, load in self.weights.items():
                stream.write(_initializer(name, np.asarray(load(), order="C"), apart))
        return data if large else None

    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that gives each value."""
        return {value: node for node in self.nodes for value in node.output}

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read each value."""
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for value in read_by(node):
                readers.setdefault(value, []).append(node)
        return readers


def read_by(node: onnx.NodeProto) -> Iterator[str]:
    """The values that a node reads, and those that the nodes of its branches read."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from read_by(inner)


def _initializer(name: str, array: np.ndarray, apart: BinaryIO | None) -> bytes:
    """A model of one initializer; a large one goes to the start of a page of the other file, if there is one."""
    if apart is None or array.nbytes < PAGE:
        tensor = numpy_helper.from_array(array, name)
    else:
        apart.seek(-(-apart.tell() // PAGE) * PAGE)
        tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": Path(apart.name).name, "offset": str(apart.tell()), "length": str(array.nbytes)}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in place.items())
        apart.write(array.reshape(-1).view(np.uint8).data)  # tofile's error doesn't tell a full disk
    return onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor])).SerializeToString()


def load_graph(path: Path) -> Graph:
    """Read an ONNX file whole; a weight's other names (``Identity``, where layers share it) become its own."""
    model = onnx.load(path)
    weights = dict(_loaders(model.graph.initializer))
    nodes, alias = [], {}
    for node in model.graph.node:
        if node.op_type == "Identity" and node.input[0] in weights:
            alias[node.output[0]] = node.input[0]
            continue
        for i, value in enumerate(node.input):
            node.input[i] = alias.get(value, value)
        nodes.append(node)
    return Graph(
        inputs=list(model.graph.input),
        outputs=list(model.graph.output),
        nodes=nodes,
        weights=weights,
        opsets={entry.domain: entry.version for entry in model.opset_import},
    )


def _loaders(tensors: list[onnx.TensorProto]) -> Iterator[tuple[str, Loader]]:
    for tensor in tensors:
        yield tensor.name, functools.partial(numpy_helper.to_array, tensor)


def float_value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    """A float32 input or output."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def int_value(name: str, *shape: int | str, kind: int = TensorProto.INT64) -> onnx.ValueInfoProto:
    """An input or output of integers, int64 by default."""
    return helper.make_tensor_value_info(name, kind, shape)
