"""Check a foreign ONNX file before onnxruntime reads it, and limit the memory that it may use.

A file of a kilobyte can describe tensors of gigabytes. A declared tensor must not be larger than
its bytes in the file; results of operators come out of a limited arena; and nothing is computed
while the file is opened. Field numbers are those of onnx.proto.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import onnxruntime

FILE_LIMIT_BYTES = 2**28
MEMORY_LIMIT_BYTES = 2**31
"""Of all values of one inference."""
FIELD_LIMIT = 2_000_000
"""Fields of a file; a rootstock has some thousands."""

_GRAPH, _METADATA, _FUNCTIONS = 7, 14, 25  # of a model
_NODE, _INITIALIZER, _SPARSE_INITIALIZER = 1, 5, 15  # of a graph
_ATTRIBUTE = 5  # of a node
_TENSOR, _TENSORS, _REFUSED_VALUES = 5, 10, (6, 11, 22, 23)  # of an attribute: graphs, sparse
_DIMS, _STRINGS, _EXTERNAL_DATA, _DATA_LOCATION = 1, 6, 13, 14  # of a tensor
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf
_SMALLEST_BYTES = 0.5  # of an element, int4


def check_model(content: bytes) -> None:
    """Check that a model declares no more than its bytes hold, and that its metadata is text.

    Raises: ValueError; its message is the reason alone.
    """
    reader = _MessageReader()
    for number, value in reader.fields(memoryview(content)):
        if number == _FUNCTIONS:
            raise ValueError("functions of its own, which no rootstock has")
        if number == _METADATA:
            _check_text(reader, value)
        if number == _GRAPH:
            _check_graph(reader, value)


def session_options(threads: int | None) -> Any:
    """Options of a session whose values come out of a limited arena."""
    _register_arena()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # Our own error says what is wrong.
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


def open_session(content: bytes, threads: int | None) -> Any:
    """A session of a checked model. Raises: errors of onnxruntime, which have no common base."""
    # Constant folding computes while the file is opened, in unlimited memory.
    return onnxruntime.InferenceSession(
        content,
        session_options(threads),
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"],
    )


@cache
def _register_arena() -> None:
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu",
        onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
        0,
        onnxruntime.OrtMemType.DEFAULT,
    )
    limits: Mapping[str, int] = {
        "max_mem": MEMORY_LIMIT_BYTES,
        "arena_extend_strategy": -1,
        "initial_chunk_size_bytes": -1,
        "max_dead_bytes_per_chunk": -1,
    }
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(limits))


def _check_graph(reader: "_MessageReader", graph: Any) -> None:
    for number, value in reader.fields(graph):
        if number == _SPARSE_INITIALIZER:
            raise ValueError("sparse tensors, which no rootstock has")
        if number == _INITIALIZER:
            _check_tensor(reader, value)
        if number == _NODE:
            for kind, attribute in reader.fields(value):
                if kind == _ATTRIBUTE:
                    _check_attribute(reader, attribute)


def _check_attribute(reader: "_MessageReader", attribute: Any) -> None:
    for number, value in reader.fields(attribute):
        if number in _REFUSED_VALUES:
            raise ValueError("graphs or sparse tensors inside nodes, which no rootstock has")
        if number in (_TENSOR, _TENSORS):
            _check_tensor(reader, value)


def _check_tensor(reader: "_MessageReader", tensor: Any) -> None:
    elements, size = 1, 0
    for number, value in reader.fields(tensor):
        if number in (_EXTERNAL_DATA, _DATA_LOCATION) and value:
            raise ValueError("weights in other files, which no rootstock has")
        if number == _DIMS:
            for length in [value] if isinstance(value, int) else reader.varints(value):
                elements *= length
        elif isinstance(value, memoryview):
            size += len(value)
        elif number != 2:  # its type
            size += 8
    if elements * _SMALLEST_BYTES > size + 1:
        raise ValueError(f"a tensor of {elements:,} elements in {size:,} bytes")


def _check_text(reader: "_MessageReader", entry: Any) -> None:
    for _, value in reader.fields(entry):
        if isinstance(value, memoryview):
            try:
                str(value, "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"metadata that is not UTF-8 ({error.reason})") from error


class _MessageReader:
    """Reads fields of protobuf messages, at most FIELD_LIMIT of one file."""

    def __init__(self) -> None:
        self._count = 0

    def fields(self, message: Any) -> Iterator[tuple[int, Any]]:
        """Number and value of each field: an int, or bytes. Raises: ValueError."""
        if not isinstance(message, memoryview):
            raise ValueError("a number in place of a message")
        place = 0
        while place < len(message):
            self._count += 1
            if self._count > FIELD_LIMIT:
                raise ValueError(f"more than {FIELD_LIMIT:,} fields")
            tag, place = _varint(message, place)
            number, wire = tag >> 3, tag & 7
            if wire == _VARINT:
                value, place = _varint(message, place)
                yield number, value
                continue
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire)
            if wire == _BYTES:
                length, place = _varint(message, place)
            if length is None or place + length > len(message):
                raise ValueError("truncated, or no ONNX")
            yield number, message[place : place + length]
            place += length

    def varints(self, packed: memoryview) -> Iterator[int]:
        """Numbers in one field. Raises: ValueError."""
        place = 0
        while place < len(packed):
            value, place = _varint(packed, place)
            yield value


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message) and shift < 70:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
    raise ValueError("truncated, or no ONNX")
