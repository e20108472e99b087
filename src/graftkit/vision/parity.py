"""What int8 changes, and what inference holds in memory; both on the files, in onnxruntime."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graftkit.errors import RootstockError
from graftkit.vision.predict import Predictor


@dataclass(frozen=True)
class Parity:
    """Two files of one network on the same images.

    Attributes:
        accuracy_fp32, accuracy_int8: share of the images that each names rightly.
        agreement: share on which both name the same class.
        max_difference: largest difference of a logit.
        relative_error: ‖logits_int8 − logits_fp32‖ / ‖logits_fp32‖, Frobenius.
    """

    accuracy_fp32: float
    accuracy_int8: float
    agreement: float
    max_difference: float
    relative_error: float


def parity(fp32: Path, int8: Path, pixels: np.ndarray, labels: np.ndarray) -> Parity:
    """Compare two rootstocks on images.

    Args:
        pixels: uint8 (n, 3, size, size). labels: int64 (n,), indices of the classes.
    Raises: RootstockError for a file that is none.
    """
    expected, found = (Predictor.open(file).logits(pixels) for file in (fp32, int8))
    first, second = expected.argmax(1), found.argmax(1)
    return Parity(
        float((first == labels).mean()),
        float((second == labels).mean()),
        float((first == second).mean()),
        float(np.abs(found - expected).max()),
        float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
    )


_INFERENCE = """
import sys
from pathlib import Path
import numpy as np
from graftkit.parallel import peak_rss_bytes
from graftkit.vision.predict import Predictor
predictor = Predictor.open(Path(sys.argv[1]), threads=1)
predictor.logits(np.zeros((1, 3, predictor.size, predictor.size), np.uint8))
print(peak_rss_bytes())
"""


def inference_rss_bytes(path: Path) -> int:
    """Most memory of a new process that opens a rootstock and classifies one image, on one thread.

    It holds Python, NumPy and onnxruntime, some 60 MB, and no torch.
    Raises: RootstockError when the file cannot be used.
    """
    done = subprocess.run(
        [sys.executable, "-c", _INFERENCE, str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RootstockError(f"{path}: cannot be run in a process of its own ({reason})")
    return int(done.stdout)
