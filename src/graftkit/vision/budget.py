"""What a rootstock may cost at most: bytes of its file, milliseconds, or multiply-accumulates."""

import math
import re
from dataclasses import dataclass
from typing import Literal, Self

from graftkit.config import BYTE_UNITS
from graftkit.errors import BudgetError

Kind = Literal["bytes", "ms", "macs"]

_UNITS: dict[str, tuple[Kind, int]] = {
    **{unit: ("bytes", scale) for unit, scale in BYTE_UNITS.items()},
    "MS": ("ms", 1),
    "MAC": ("macs", 1),
    "KMAC": ("macs", 10**3),
    "MMAC": ("macs", 10**6),
    "GMAC": ("macs", 10**9),
}
_PATTERN = re.compile(
    r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?i?B|ms|[KMG]?MAC)\s*", re.IGNORECASE | re.ASCII
)


@dataclass(frozen=True)
class Budget:
    """The most that a rootstock may cost.

    Attributes:
        kind: "bytes" on disk of the float32 ONNX file, "ms" of its median latency on one image, or
            "macs", multiply-accumulates of one image.
        amount: in bytes, milliseconds or multiply-accumulates.
        text: as the user wrote it.
    """

    kind: Kind
    amount: float
    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `0.6MB`, `500KiB`, `2ms`, `20MMAC` or `1.5GMAC`; case does not matter.

        Raises: BudgetError when the text is none of these, or the amount is not above zero.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise BudgetError(
                f"budget {text!r} is not understood; write the bytes of the ONNX file (0.6MB, "
                "500KiB), the milliseconds of one image (2ms) or its multiply-accumulates "
                "(20MMAC, 1.5GMAC)"
            )
        kind, scale = _UNITS[match[2].upper()]
        amount = float(match[1]) * scale
        if not 0 < amount < math.inf:
            raise BudgetError(
                f"budget {text!r} is {'zero' if amount == 0 else 'infinite'}; "
                "write an amount above zero, such as 0.6MB, 2ms or 20MMAC"
            )
        return cls(kind, amount, text.strip())

    def show(self, amount: float) -> str:
        """An amount in the unit of this budget, rounded up, as `parse` reads it."""
        if self.kind == "ms":
            return f"{math.ceil(amount * 100) / 100:g}ms"
        unit, scale = ("KB", 1e3) if self.kind == "bytes" else ("MMAC", 1e6)
        return f"{math.ceil(amount / scale * 100) / 100:g}{unit}"
