"""Every row of the frontier behind one face, and the digest that its measurements are kept by."""

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from baselines import protocol
from baselines.problem import Pair, Problem

HERE = Path(__file__).parent
_COMMON = ("protocol", "problem", "embedding")
_ALONE = ("mergekit", "lossless")  # these modules take nothing from the others that decides a byte


class Packer(Protocol):
    """One way to make a file and to read it back."""

    name: str
    seeded: bool
    """Whether the draw of calibration rows matters enough to repeat it."""
    own: bool
    """Whether it is graftkit's, so that it must be measured again at every commit."""

    def pack(self, problem: Problem, file: Path, budget_bytes: int | None) -> Any:
        """Write the file; returns what was chosen. Raises: UnreachableError."""
        ...

    def unpack(self, pair: Pair, file: Path) -> dict[str, Tensor]:
        """The packed model's tensors, from the target and the file alone."""
        ...


class Coded:
    """A method of protocol.py as a packer."""

    own = False

    def __init__(self, method: Any, seeded: bool):
        self.method, self.seeded, self.name = method, seeded, method.name

    def pack(self, problem: Problem, file: Path, budget_bytes: int | None) -> Any:
        """As protocol.encode."""
        return protocol.encode(self.method, problem, file, budget_bytes)

    def unpack(self, pair: Pair, file: Path) -> dict[str, Tensor]:
        """As protocol.decode."""
        return protocol.decode(self.method, pair.side, file)


LOSSY = (
    *("svd", "pruning", "deltacome-fixed", "prinmix", "bitdelta", "mergekit-lora"),
    *("graftllm, rows", "graftllm+embedding", "deltacome-published"),
)
LOSSLESS = ("XOR + zstd", "ZipNN", "lossless")
PACKAGES = ("deltatensors", "weightscope", "z4ai")
"""Packages that only the real benchmark runs; the first of them loses something."""

OWN = (
    *("auto, rows", "auto", "auto, servable"),
    *("auto, 4096 rows", "auto, 1600 steps", "auto, 4096 rows, 1600 steps"),
)
_MODULES = {
    "svd": ("truncated",),
    "pruning": ("pruning",),
    "deltacome-fixed": ("ladder", "factors"),
    "deltacome-published": ("ladder", "factors"),
    "prinmix": ("prinmix",),
    "bitdelta": ("bitdelta",),
    "mergekit-lora": ("mergekit",),
    "XOR + zstd": ("lossless",),
    "ZipNN": ("lossless",),
}


def packer(name: str, out: Path) -> Packer:
    """The packer of a name; `out` holds mergekit's environment."""
    makers: dict[str, Callable[[], Packer]] = {
        "svd": lambda: Coded(_method("truncated", "TruncatedSvd"), False),
        "pruning": lambda: Coded(_method("pruning", "Pruning"), False),
        "deltacome-fixed": lambda: Coded(_method("ladder", "DeltaCome", False), True),
        "deltacome-published": lambda: Coded(_method("ladder", "DeltaCome", True), True),
        "prinmix": lambda: Coded(_method("prinmix", "PrinMix"), True),
        "bitdelta": lambda: Coded(_method("bitdelta", "BitDelta"), True),
        "mergekit-lora": lambda: _method("mergekit", "MergekitLora", out / "mergekit-venv"),
        "graftllm, rows": lambda: _own(name, "graftllm", rows=True),
        "graftllm+embedding": lambda: _method("graftkit_packs", "GraftllmEmbedding"),
        "auto, rows": lambda: _own(name, "auto", rows=True),
        "auto": lambda: _own(name, "auto"),
        "auto, servable": lambda: _own(name, "auto", servable=True),
        "auto, 4096 rows": lambda: _own(name, "auto", rows=True, many=True),
        "auto, 1600 steps": lambda: _own(name, "auto", rows=True, steps=1600),
        "auto, 4096 rows, 1600 steps": lambda: _own(name, "auto", rows=True, many=True, steps=1600),
        "lossless": lambda: _own(name, "lossless"),
        "XOR + zstd": lambda: _method("lossless", "XorZstd"),
        "ZipNN": lambda: _method("lossless", "ZipNN"),
        "deltatensors": lambda: _method("packages", "DeltaTensors"),
        "weightscope": lambda: _method("packages", "WeightScope"),
        "z4ai": lambda: _method("packages", "Z4ai"),
    }
    return makers[name]()


def digest(name: str) -> str | None:
    """What decides a baseline's file: its sources. None for graftkit's own rows."""
    if name not in _MODULES:
        return None
    result = blake2b(digest_size=6)
    own = _MODULES[name]
    for module in own if own[0] in _ALONE else (*_COMMON, *own):
        result.update((HERE / f"{module}.py").read_bytes())
    return result.hexdigest()


def _own(*arguments: Any, **options: Any) -> Any:
    return _method("graftkit_packs", "GraftkitPack", *arguments, **options)


def _method(module: str, maker: str, *arguments: Any, **options: Any) -> Any:
    """Imported when it is asked for: each has needs of its own."""
    from importlib import import_module

    return getattr(import_module(f"baselines.{module}"), maker)(*arguments, **options)
