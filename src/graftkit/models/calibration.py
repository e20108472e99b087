"""Activation statistics of the tuned model: the covariances of the inputs of its linear modules.

For a linear module y = x Wᵀ the error E of a compressed weight costs tr(E H Eᵀ) with H = Σ x xᵀ
over the calibration tokens, H (in, in). A large model streams from disk, and the matrices go
to disk: neither is ever in memory whole.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor, nn

from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError, OutputError
from graftkit.model_files import SIDE_FILES
from graftkit.models.loading import load_or_stream, output_embeddings
from graftkit.models.text import (
    MICRO_BATCH_TOKENS,
    encode_rows,
    one_thread,
    pad_id,
    pass_batches,
    real_tokens,
    skips_logits,
    submodule,
    usable_tokenizer,
    vocabulary_size,
)
from graftkit.parallel import bfloat16_pays
from graftkit.progress import StepProgress, silent
from graftkit.rows import EncodedRow, Row, pad_batch

CALIBRATION_TOKENS = 16_384  # tokens measured: more than any input of a common layer has columns
HEAD, TOKENS = "head", "tokens"  # store keys: H of the output head's input; token counts (vocab,)


@dataclass(frozen=True)
class CalibrationSummary:
    """What was measured; it goes into the manifest of a pack."""

    rows: int
    """Rows used; a seeded choice when the file holds more than are needed."""
    tokens: int
    """Tokens measured, padding not counted."""
    rows_cut: int
    """Rows of which only the first MICRO_BATCH_TOKENS tokens were measured."""
    seed: int


class CovarianceStore:
    """Matrices in a folder, one file each; `get` reads one, and none stays in memory.

    Several keys may share one file. `calibration.json` is written last and names the job: a store
    without it is unfinished and counts as empty.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be created ({error.strerror}); calibration needs a folder to "
                "write its matrices to"
            ) from error
        marker = self._marker()
        self._files: dict[str, str] = marker["files"] if marker else {}

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def get(self, key: str) -> Tensor:
        """The matrix of one key. Raises: KeyError, OutputError when its file is damaged."""
        file = self.folder / self._files[key]
        try:
            return torch.from_numpy(np.load(file, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise OutputError(
                f"{file}: cannot be read ({error}); delete {self.folder} and run again"
            ) from error

    def put(self, key: str, value: Tensor) -> None:
        """Write the matrix of one key. Raises: OutputError when the disk refuses."""
        # A digest as the name: a module's name may hold characters that a path may not.
        name = blake3(key.encode()).hexdigest(length=16) + ".npy"
        self._write(name, lambda file: np.save(file, value.numpy(), allow_pickle=False))
        self._files[key] = name

    def alias(self, key: str, existing: str) -> None:
        """Let `key` stand for the same matrix as `existing`."""
        self._files[key] = self._files[existing]

    def clear(self) -> None:
        """Forget everything, the marker first."""
        self._files = {}
        for file in [self.folder / "calibration.json", *sorted(self.folder.glob("*.npy"))]:
            file.unlink(missing_ok=True)

    def finish(self, job: str, summary: Mapping[str, int]) -> None:
        """Mark the store as the complete result of `job`."""
        marker = {"job": job, "summary": dict(summary), "files": self._files}
        text = json.dumps(marker, indent=1).encode()
        self._write("calibration.json", lambda file: file.write(text))

    def finished(self, job: str) -> dict[str, int] | None:
        """The summary given to `finish`, or None where the store is not the result of `job`."""
        marker = self._marker()
        return marker["summary"] if marker and marker["job"] == job else None

    def _marker(self) -> dict[str, Any] | None:
        try:
            marker: dict[str, Any] = json.loads((self.folder / "calibration.json").read_bytes())
        except (OSError, ValueError):
            return None
        return marker

    def _write(self, name: str, write: Callable[[Any], object]) -> None:
        partial = self.folder / f"{name}.partial"
        try:
            with partial.open("wb") as file:
                write(file)
            os.replace(partial, self.folder / name)
        except OSError as error:
            raise OutputError(
                f"{partial}: cannot be written ({error.strerror}); free disk space or choose "
                "another folder"
            ) from error


def collect_covariances(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    modules: Sequence[str],
    store: CovarianceStore,
    seed: int,
    progress: StepProgress | None = None,
) -> CalibrationSummary:
    """Run the model of `checkpoint` on prompt + completion and fill `store`.

        H = Σ x xᵀ over real (non-padding) tokens, float32

    Keys: each linear module of `modules` with inputs (.., in): H (in, in). Modules that are fed the
    same tensor share one file. A module that no token reaches, such as an unused expert, has no
    key. `head`: H (hidden, hidden) of the output head's input. `tokens`: counts (vocab,) int64.
    A finished store of the same job is not filled again; an unfinished one is filled anew.

    Raises: CheckpointError when the tokenizer is missing or does not fit, a module is missing or
        an activation is not finite; RowsError for a row beyond the model's context; OutputError.
    """
    job = job_digest(checkpoint, rows, modules, [CALIBRATION_TOKENS, seed])
    finished = store.finished(job)
    if finished is not None:
        return CalibrationSummary(**finished)
    store.clear()
    report = progress or silent
    with prepared_for_rows(checkpoint, rows, CALIBRATION_TOKENS, seed, store) as prepared:
        model, encoded, pad = prepared
        collector = _CovarianceCollector(model, modules, store, checkpoint.name)
        batches = pass_batches(model, list(map(len, encoded)))
        for done, batch in enumerate(batches):
            report(done, len(batches))
            collector.run(*pad_batch([encoded[index].ids for index in batch], pad))
        store.put(TOKENS, _token_counts(encoded, model))
    summary = CalibrationSummary(
        rows=len(encoded),
        tokens=sum(map(len, encoded)),
        rows_cut=sum(row.was_cut for row in encoded),
        seed=seed,
    )
    store.finish(job, asdict(summary))
    report(len(batches), len(batches))
    return summary


@contextmanager
def prepared_for_rows(
    checkpoint: Checkpoint,
    rows: Sequence[Row],
    tokens_limit: int,
    seed: int,
    store: CovarianceStore,
) -> Iterator[tuple[Any, list[EncodedRow], int]]:
    """A model of one stack, `encode_rows` of its rows and the token that pads them; one thread.

    Weights that memory does not hold lie in the folder of `store` until the block ends.

    Raises: CheckpointError for an encoder-decoder model and where the tokenizer is missing or does
        not fit; RowsError for a row beyond the model's context.
    """
    tokenizer = usable_tokenizer(checkpoint)
    with one_thread(), TemporaryDirectory(dir=store.folder, prefix="offload-") as offload:
        model = load_or_stream(checkpoint, Path(offload))
        encoded = encode_rows(tokenizer, rows, tokens_limit, seed, model, checkpoint.name)
        if getattr(model.config, "is_encoder_decoder", False):
            raise CheckpointError(
                f"{checkpoint.name}: an encoder-decoder model; only models of one stack can be "
                "calibrated, so pack it without rows"
            )
        yield model, encoded, pad_id(tokenizer)


class _CovarianceCollector:
    """Forward pre-hooks that add the inputs of modules to a store, one forward pass at a time."""

    def __init__(self, model: Any, modules: Sequence[str], store: CovarianceStore, where: str):
        self.model, self.store, self.where = model, store, where
        self.mask = torch.empty(0, dtype=torch.bool)
        # For each key, the key that it shares a matrix with (mostly itself).
        self.shares: dict[str, str] = {}
        # The input seen last and the key it was stored under. Holding it keeps its address taken.
        self.last: tuple[Tensor, str] | None = None
        self.head = output_embeddings(model)
        self.head_keys = [HEAD]
        model.config.use_cache = False
        for name in modules:
            module = submodule(model, name, where)
            if module is self.head:
                self.head_keys.append(name)
            else:
                module.register_forward_pre_hook(self._hook([name]), with_kwargs=True)
        if self.head is not None:
            self.head.register_forward_pre_hook(self._hook(self.head_keys), with_kwargs=True)

    def run(self, ids: Tensor, mask: Tensor) -> None:
        """One forward pass; ids and mask are (rows, tokens)."""
        self.mask = mask.bool()
        inputs = {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            if skips_logits(self.model):
                # Without the output head there are no logits; at (tokens, vocab) they would be
                # by far the largest tensor of the pass.
                self._add(self.head_keys, self.model.base_model(**inputs)[0])
            else:
                output = self.model(**inputs)
                if self.head is None and "last_hidden_state" in output:
                    self._add(self.head_keys, output["last_hidden_state"])
        self.last = None

    def _hook(self, keys: Sequence[str]) -> Callable[..., None]:
        def before_forward(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._add(keys, args[0] if args else next(iter(kwargs.values())))

        return before_forward

    def _add(self, keys: Sequence[str], inputs: Tensor) -> None:
        """Add inputs (.., in) to the matrices of `keys`, or note that they are shared."""
        if inputs.numel() == 0:
            return
        for key in keys:
            shared = self.last is not None and _is_same(self.last[0], inputs)
            leader = self.last[1] if shared and self.last is not None else key
            if self.shares.setdefault(key, leader) != leader:
                raise CheckpointError(
                    f"{self.where}: {key} shares its input with {self.shares[key]} in one pass and "
                    "not in another; this model cannot be calibrated, so pack it without rows"
                )
            if leader != key:
                self.store.alias(key, leader)
            else:
                self._accumulate(key, inputs)
                self.last = (inputs, key)

    def _accumulate(self, key: str, inputs: Tensor) -> None:
        inputs = real_tokens(inputs.detach(), self.mask)
        values = inputs.float()
        with bfloat16_products(inputs.dtype):
            if key in self.store:
                total = self.store.get(key).addmm_(values.T, values)
            else:
                total = values.T @ values
        # A diagonal of squares: one NaN or infinity anywhere in the inputs shows in its sum.
        if not total.diagonal().sum().isfinite():
            raise CheckpointError(
                f"{self.where}: the input of {key} is not finite (NaN or infinity) on the "
                "calibration rows; check the weights of the layers before it"
            )
        self.store.put(key, total)


@contextmanager
def bfloat16_products(dtype: torch.dtype) -> Iterator[None]:
    """Inside, float32 products are made of bfloat16 factors, if the numbers came in that dtype.

    Nothing is lost: such factors are bfloat16 already, and sums stay in float32. Processors with
    instructions for bfloat16 take a fraction of the time; others ignore it.
    """
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16 and bfloat16_pays():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two live tensors are the same memory, unchanged: q/k/v are fed one tensor."""
    return one is other or (
        one.data_ptr() == other.data_ptr()
        and (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        and one._version == other._version
    )


def _token_counts(encoded: Sequence[EncodedRow], model: Any) -> Tensor:
    ids = torch.tensor([token for row in encoded for token in row.ids])
    return torch.bincount(ids, minlength=vocabulary_size(model))


def job_digest(
    checkpoint: Checkpoint, rows: Sequence[Row], modules: Sequence[str], settings: Sequence[int]
) -> str:
    """Digest of everything that decides a store; weights count by size and time of change."""
    files = sorted({info.file for info in checkpoint.tensors.values()})
    digest = blake3()
    for part in (
        [*settings, MICRO_BATCH_TOKENS, torch.__version__],
        [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        [blake3(checkpoint.side_file(name) or b"").hexdigest() for name in SIDE_FILES],
        list(modules),
        [row.content for row in rows],
    ):
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()
