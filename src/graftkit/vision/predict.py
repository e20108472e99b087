"""Classify images with a rootstock, in onnxruntime, Pillow and NumPy; torch is never imported.

A foreign ONNX file is checked before onnxruntime reads it, and its memory is limited: a file of a
kilobyte can describe tensors of gigabytes. A declared tensor must not be larger than its bytes in
the file; results of operators come out of a limited arena; and nothing is computed while the file
is opened. Field numbers are those of onnx.proto.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from graftkit.errors import ConfigError, ImagesError, RootstockError
from graftkit.vision.images.files import (
    ImageFolder,
    Skipped,
    decode_image,
    is_image_name,
    read_file,
)

try:
    import onnxruntime
except ImportError as error:
    raise ConfigError(
        "a rootstock runs in onnxruntime, which is missing; pip install 'graftkit[vision]'"
    ) from error

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


BATCH = 32
"""Images that are classified at once."""
SIDE_OF_WHOLE_BATCHES, LONGEST_SIDE = 512, 2048
"""Pixels of a side: images up to the first are batched by BATCH; none is larger than the second."""


Signature = tuple[str, str, tuple[int | str | None, ...]]
"""Name, type and shape of an input or output."""


@dataclass(frozen=True)
class Prediction:
    """The class of one image.

    Attributes:
        name: of the file.
        label: the most likely class.
        confidence: its probability, from the softmax of the logits.
        scores: probabilities of all classes.
    """

    name: str
    label: str
    confidence: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one image: the network's percentiles and least, and the median of reading."""

    p50_ms: float
    p95_ms: float
    min_ms: float
    preprocessing_ms: float


class Predictor:
    """A rootstock.onnx, opened; `open` makes it.

    Attributes:
        classes: in the order of the logits. size: pixels of a side. bytes: of the file.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        classes: tuple[str, ...],
        size: int,
        path: Path,
    ):
        self._session = session
        self._path = path
        self.classes = classes
        self.size = size
        self.bytes = path.stat().st_size

    @classmethod
    def open(cls, path: str | Path, threads: int | None = None) -> "Predictor":
        """Read a file that graftkit exported, float32 or int8.

        Args:
            threads: of one inference; by default onnxruntime takes one for each core.

        Raises: RootstockError when the file is missing, no ONNX, not a rootstock, or would need
            more memory than a rootstock.
        """
        path = Path(path)
        if not path.is_file():
            raise RootstockError(f"{path}: no such file; name a rootstock.onnx")
        content = _read_model(path)
        try:
            session = open_session(content, threads)
            metadata = session.get_modelmeta().custom_metadata_map
            inputs, outputs = session.get_inputs(), session.get_outputs()
            signatures = [[_signature(value) for value in side] for side in (inputs, outputs)]
        except Exception as error:  # onnxruntime's errors have no base of their own.
            raise RootstockError(
                f"{path}: not an ONNX file that onnxruntime can read; it may be truncated "
                f"({_first_line(error)})"
            ) from error
        classes, size = _read_metadata(path, metadata)
        _check_shapes(path, signatures, len(classes), size)
        return cls(session, classes, size, path)

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Float32 (n, classes) of uint8 pixels (n, 3, size, size).

        Raises: RootstockError when the network cannot run, or gives numbers that are not finite.
        """
        # Large images are batched by fewer, so that memory stays bounded.
        batch = max(1, min(BATCH, BATCH * SIDE_OF_WHOLE_BATCHES**2 // self.size**2))
        parts = [
            self._run(pixels[start : start + batch].astype(np.float32))
            for start in range(0, len(pixels), batch)
        ]
        return np.concatenate(parts) if parts else np.empty((0, len(self.classes)), np.float32)

    def predict(self, files: Sequence[str | Path]) -> list[Prediction | Skipped]:
        """One result for each file, in order; Skipped for one that cannot be read as an image."""
        results: list[Prediction | Skipped] = []
        paths = [Path(file) for file in files]
        for start in range(0, len(paths), BATCH):
            results += self._predict_batch(paths[start : start + BATCH])
        return results

    def measure_latency(self, file: Path, runs: int = 100) -> Latency:
        """Time one image, over and over, after a warm-up. Raises: ImagesError if it is broken."""
        try:
            reading = _milliseconds(lambda: self._decode(file), runs // 5)
            image = self._decode(file)[None].astype(np.float32)
        except ImagesError as error:
            raise ImagesError(f"{file}: {error}") from error
        times = _milliseconds(lambda: self._run(image), runs)
        p50, p95 = np.percentile(times, (50, 95))
        return Latency(float(p50), float(p95), float(times.min()), float(np.median(reading)))

    def _predict_batch(self, files: Sequence[Path]) -> list[Prediction | Skipped]:
        decoded = [self._decode_or_skip(file) for file in files]
        images = [pixels for pixels in decoded if isinstance(pixels, np.ndarray)]
        probabilities = iter(softmax(self.logits(np.stack(images))) if images else ())
        return [
            self._prediction(file, next(probabilities)) if isinstance(image, np.ndarray) else image
            for file, image in zip(files, decoded, strict=True)
        ]

    def _prediction(self, file: Path, scores: np.ndarray) -> Prediction:
        best = int(scores.argmax())
        named = {name: float(score) for name, score in zip(self.classes, scores, strict=True)}
        return Prediction(str(file), self.classes[best], float(scores[best]), named)

    def _decode(self, file: Path) -> np.ndarray:
        return decode_image(read_file(file), self.size)

    def _decode_or_skip(self, file: Path) -> np.ndarray | Skipped:
        try:
            return self._decode(file)
        except ImagesError as error:
            return Skipped(str(file), str(error))

    def _run(self, images: np.ndarray) -> np.ndarray:
        try:
            logits: np.ndarray = self._session.run(["logits"], {"image": images})[0]
        except Exception as error:  # onnxruntime's errors have no base of their own.
            raise RootstockError(f"{self._path}: cannot run ({_first_line(error)})") from error
        expected = (len(images), len(self.classes))
        if logits.shape != expected or not np.isfinite(logits).all():
            raise RootstockError(
                f"{self._path}: its logits have the shape {logits.shape} or are not finite; "
                f"expected finite numbers of the shape {expected}: export it again"
            )
        return logits


def find_images(places: Sequence[Path]) -> list[Path]:
    """Files as they are, and for each folder the images under it, sorted."""
    images: list[Path] = []
    for place in places:
        if place.is_dir():
            images += [place / name for name in ImageFolder(place).names() if is_image_name(name)]
        else:
            images.append(place)
    return images


class Arrivals:
    """Images that appear in a folder, or change, once they are complete.

    A file is complete when its size and time stay the same between two polls, so that half-written
    files are not read. Files that are in the folder at first are left out.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._last = self._stamps()
        self._reported = dict(self._last)

    def poll(self) -> list[Path]:
        """Files that have become complete since the last poll, sorted."""
        now = self._stamps()
        fresh = [
            file
            for file, stamp in now.items()
            if stamp != self._reported.get(file) and stamp == self._last.get(file) and stamp[0] > 0
        ]
        self._reported = {file: stamp for file, stamp in self._reported.items() if file in now}
        self._reported |= {file: now[file] for file in fresh}
        self._last = now
        return fresh

    def _stamps(self) -> dict[Path, tuple[int, int]]:
        """Size and time of every image."""
        stamps = {}
        for file in find_images([self._folder]):
            try:
                status = file.stat()
            except OSError:  # Removed since it was listed.
                continue
            stamps[file] = (status.st_size, status.st_mtime_ns)
        return stamps


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, exp(z_i) / Σ_j exp(z_j), along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


def _read_metadata(path: Path, metadata: dict[str, str]) -> tuple[tuple[str, ...], int]:
    if metadata.get("graftkit_format") != "rootstock":
        raise RootstockError(
            f"{path}: an ONNX file, but no rootstock; make one with graftkit vision graft"
        )
    try:
        classes, size = json.loads(metadata["classes"]), int(metadata["size"])
    except (KeyError, ValueError, RecursionError) as error:
        raise RootstockError(f"{path}: its classes or its size are missing or damaged") from error
    if not 0 < size <= LONGEST_SIDE:
        raise RootstockError(
            f"{path}: reads images of {metadata['size'][:20]} pixels a side; expected 1 to "
            f"{LONGEST_SIDE}"
        )
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or len(set(classes)) < max(2, len(classes)):
        raise RootstockError(f"{path}: its classes are not a list of two or more different names")
    return tuple(classes), size


def _read_model(path: Path) -> bytes:
    """The bytes of a file, checked for onnxruntime. Raises: RootstockError."""
    try:
        if (size := path.stat().st_size) > FILE_LIMIT_BYTES:
            raise RootstockError(
                f"{path}: {size:,} bytes, more than {FILE_LIMIT_BYTES:,}; expected a rootstock.onnx"
            )
        content = path.read_bytes()
    except OSError as error:
        raise RootstockError(f"{path}: cannot be read ({error.strerror}); check it") from error
    try:
        check_model(content)
    except ValueError as error:
        raise RootstockError(
            f"{path}: not a rootstock, or damaged: {error}; export it again, or fetch it again"
        ) from error
    return content


def _check_shapes(path: Path, signatures: list[list[Signature]], classes: int, size: int) -> None:
    inputs, outputs = signatures
    actual = [(name, kind, *shape[1:]) for name, kind, shape in (*inputs, *outputs)]
    expected = [
        ("image", "tensor(float)", 3, size, size),
        ("logits", "tensor(float)", classes),
    ]
    if actual != expected or isinstance(inputs[0][2][0], int):
        raise RootstockError(
            f"{path}: reads and writes {_shown(inputs)} -> {_shown(outputs)}; expected "
            f"image (batch, 3, {size}, {size}) -> logits (batch, {classes}), both float32"
        )


def _signature(value: Any) -> Signature:
    return value.name, value.type, tuple(value.shape)


def _shown(signatures: list[Signature]) -> str:
    return ", ".join(f"{name} {kind} {[*shape]}" for name, kind, shape in signatures)


def _milliseconds(work: Callable[[], object], runs: int) -> np.ndarray:
    """Of each of `runs` calls, after a tenth as many to warm up."""
    times = np.empty(runs)
    for index in range(-(runs // 10 + 1), runs):
        started = time.perf_counter()
        work()
        if index >= 0:
            times[index] = (time.perf_counter() - started) * 1000
    return times


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
