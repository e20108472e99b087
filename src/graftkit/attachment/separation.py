"""May rows of one batch use different packs on this model? A short batch of random inputs is tried.

They may only where every module with a pack sees the rows in order, each as often as the others,
and where no state goes from one row's pass to another's. Class names do not tell: experts repeat
tokens expert by expert, windows are cut out of images, recurrent layers write into tensors of their
caller. So rows of different packs run together and have to answer as each does alone, and every
module with a pack has to read the same for them.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from graftkit.attachment.modules import ModuleDeltas
from graftkit.attachment.rows import PackChoice, RoutedRows, Routing, choose_rows
from graftkit.errors import AttachError
from graftkit.models.loading import silence_transformers

ROWS = 3


# As many tokens as a multiple of the rows: what is not a row can then be taken for several.
_LENGTH = 2 * ROWS


_STEPS = 3


_AUDIO_SAMPLES = 4000


Inputs = dict[str, Tensor]


Outputs = list[Tensor | None]


"""Every float tensor that a model returns; None for one that has no entry for each row."""


class TrialError(Exception):
    """The model cannot be tried on random inputs; the message says why."""


class TrialBatch:
    """The same few rows of random inputs, run together or one by one.

    Raises: TrialError where no inputs can be made for the model.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        generator = torch.Generator().manual_seed(0)
        self._inputs = _random_inputs(model, generator)
        self._forced = _continuations(model, generator)

    def run(self, row: int | None = None) -> Outputs:
        """What the model returns, the batch along dimension 0.

        A model that generates text continues each row by a few fixed tokens, with its cache: these
        are the logits of every step.

        Args:
            row: of the one to run, None for all together.
        Raises: TrialError; AttachError of the packs that are attached.
        """
        places = slice(None) if row is None else slice(row, row + 1)
        inputs = {name: value[places] for name, value in self._inputs.items()}
        count = ROWS if row is None else 1
        try:
            with _undisturbed(self._model):
                if "input_ids" in inputs and self._model.can_generate():
                    return self._generate(inputs, self._forced[places])
                return _rows_of(self._model(**inputs), count)
        except AttachError:
            raise
        # Foreign code runs here, on inputs that it may not be made for.
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise TrialError(f"it fails on random inputs ({reason})") from error

    def _generate(self, inputs: Inputs, forced: Tensor) -> Outputs:
        """The logits of every step, while the tokens of `forced` (rows, steps) are generated."""
        steps = _ForcedTokens(forced.to(self._model.device))
        options = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=_STEPS,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
        prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        self._model.generate(  # type: ignore[operator]
            **prompt, generation_config=options, logits_processor=LogitsProcessorList([steps])
        )
        return [*steps.logits]


class _ForcedTokens(LogitsProcessor):
    """Keeps the logits of every step, and leaves `generate` one token for each row."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) that are 0 for the forced token and -∞ for all others."""
        token = self.tokens[:, len(self.logits)].unsqueeze(1)
        # What a model's own settings suppress is -∞ in every run.
        self.logits.append(scores.nan_to_num(neginf=0.0))
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def distances(one: Outputs, other: Outputs) -> list[Tensor]:
    """RMS over the last dimension of the difference, for every pair of tensors of one shape."""
    if len(one) != len(other):
        return []
    return [
        (a.float() - b.float()).square().mean(-1).sqrt().flatten()
        for a, b in zip(one, other, strict=True)
        if a is not None and b is not None and a.shape == b.shape
    ]


def _random_inputs(model: PreTrainedModel, generator: torch.Generator) -> Inputs:
    """Inputs of ROWS different rows. Raises: TrialError for a kind of input that is not known."""
    main = model.main_input_name
    config = getattr(model.config, "vision_config", model.config)
    inputs: Inputs
    if main == "input_ids":
        ids = torch.randint(_vocabulary(model), (ROWS, _LENGTH), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids.flip(0)
        if _has_two_towers(model):
            inputs["pixel_values"] = _random_images(config, generator)
    elif main == "pixel_values" and hasattr(config, "image_size"):
        inputs = {main: _random_images(config, generator)}
    elif main == "input_values":
        inputs = {main: torch.randn((ROWS, _AUDIO_SAMPLES), generator=generator)}
    else:
        raise TrialError(f"no random batch can be made of {main}")
    floats = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {
        name: value.to(model.device, floats if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _has_two_towers(model: PreTrainedModel) -> bool:
    """Whether a model reads texts and images apart from each other, as CLIP does."""
    config = model.config
    in_one_sequence = any(hasattr(config, f"image_token_{name}") for name in ("id", "index"))
    has_images = hasattr(getattr(config, "vision_config", None), "image_size")
    reads_both = "pixel_values" in inspect.signature(model.forward).parameters
    return reads_both and has_images and not in_one_sequence


def _random_images(config: Any, generator: torch.Generator) -> Tensor:
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (ROWS, getattr(config, "num_channels", 3), height, width)
    return torch.randn(shape, generator=generator)


def _continuations(model: PreTrainedModel, generator: torch.Generator) -> Tensor:
    """Tokens (ROWS, _STEPS), none of which ends a text."""
    config = getattr(model, "generation_config", None)
    ends = torch.tensor(
        [] if config is None or config.eos_token_id is None else config.eos_token_id
    )
    tokens = torch.arange(_vocabulary(model))
    tokens = tokens[~torch.isin(tokens, ends)]
    return tokens[torch.randint(len(tokens), (ROWS, _STEPS), generator=generator)]


def _vocabulary(model: PreTrainedModel) -> int:
    return int(getattr(model.config.get_text_config(), "vocab_size", 0) or 2)


def _rows_of(output: Any, rows: int) -> Outputs:
    """The float tensors anywhere in an output that have `rows` entries along dimension 0."""
    if isinstance(output, Tensor):
        fits = output.is_floating_point() and output.dim() > 1 and output.shape[0] == rows
        return [output.detach().clone() if fits else None]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for value in output for tensor in _rows_of(value, rows)]
    return []


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients, dropout, notices, or a trace in the global random state."""
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad(), silence_transformers(), torch.random.fork_rng():
            model.eval()  # type: ignore[no-untyped-call]
            torch.manual_seed(0)
            yield
    finally:
        for module in training:
            module.training = True


# Weights of a pack to try, until its effect stands out from rounding.
_WEIGHTS = (1.0, 16.0, 256.0)


# The least effect, as a share of what the target answers, and the largest error as a share of the
# effect: by whether the model computes in float32.
_LEAST_EFFECT = {True: 1e-3, False: 0.2}


_LARGEST_ERROR = {True: 0.02, False: 0.5}


# How far a row's inputs may differ between the batch and the row alone, relative to their RMS:
# inside a module that runs again they are the target's at first. Another row's differ by over 1.
_LARGEST_DRIFT = 0.3


Reads = dict[str, list[Tensor | None]]


class RowSeparation:
    """What was tried on one model with packs beside it.

    Attributes:
        keeps_rows: by the name of a module, whether it sees the rows in order; modules that no
            probe reached are not there.
    """

    def __init__(self, model: PreTrainedModel, routing: Routing):
        self._model = model
        self._routing = routing
        self._exact = model.dtype in (torch.float32, torch.float64)
        self._tried: set[str] = set()
        self.keeps_rows: dict[str, bool] = {}

    def check(self, paths: Mapping[str, ModuleDeltas], rows: RoutedRows) -> None:
        """Try what was not tried before of the modules that the packs of these rows change.

        Raises: AttachError where the rows would not answer as each does alone, or where that
            cannot be tried.
        """
        used = {name: path for name, path in paths.items() if path.serves(rows.packs)}
        while new := used.keys() - self._tried:
            pack, names = _best_pack(rows.packs, used, new)
            try:
                with self._routing.lock:
                    self._try(pack)
            except TrialError as error:
                raise AttachError(
                    f"it is unknown whether {type(self._model).__name__} keeps the rows of a batch "
                    f"apart, for {error}; run the rows of each pack in a batch of their own"
                ) from error
            self._tried |= names
        for name in used:
            used[name].keeps_rows = self.keeps_rows.get(name)
            if used[name].keeps_rows is False:
                used[name].check()

    def _try(self, pack: int) -> None:
        """Rows with and without a pack, together and alone. Raises: AttachError, TrialError."""
        probe = TrialBatch(self._model)
        bare = [self._run(probe, [None], row) for row in range(ROWS)]
        weight, first = self._telling_weight(probe, pack, bare[0][0])
        choices: list[PackChoice] = [{pack: weight}, None, {pack: -weight / 2}]
        alone = [first, bare[1], self._run(probe, choices[2:], 2)]
        together, reads = self._run(probe, choices, None)
        for name in reads:
            apart = [calls.get(name, []) for _, calls in alone]
            self.keeps_rows[name] = _keeps_rows(reads[name], apart)
        effects = [_largest(distances(bare[r][0], alone[r][0]), self._exact) for r in (0, 2)]
        for row, (outputs, _) in enumerate(alone):
            own = [None if tensor is None else tensor[row : row + 1] for tensor in together]
            error = _largest(distances(own, outputs), self._exact)
            if not error <= _LARGEST_ERROR[self._exact] * max(effects) + 1e-6:
                raise AttachError(
                    f"{type(self._model).__name__} does not keep the rows of a batch apart: row "
                    f"{row} of a tried batch answered otherwise than alone; run the rows of each "
                    "pack in a batch of their own"
                )

    def _telling_weight(
        self, probe: TrialBatch, pack: int, target: Outputs
    ) -> tuple[float, tuple[Outputs, Reads]]:
        """A weight at which a pack changes the answers to row 0 by more than rounding does, and
        that row with it."""
        values = [tensor.float().flatten() for tensor in target if tensor is not None]
        scale = float(torch.cat(values).std()) if values else 0.0
        best = _WEIGHTS[0], self._run(probe, [{pack: _WEIGHTS[0]}], 0)
        for weight in _WEIGHTS:
            run = best[1] if weight == best[0] else self._run(probe, [{pack: weight}], 0)
            effect = _largest(distances(run[0], target), self._exact)
            if not effect < float("inf"):
                break
            best = weight, run
            if effect >= _LEAST_EFFECT[self._exact] * scale:
                break
        return best

    def _run(
        self, probe: TrialBatch, choices: Sequence[PackChoice], row: int | None
    ) -> tuple[Outputs, Reads]:
        """What the model answers, and what its modules with packs read."""
        packs = {pack for choice in choices if isinstance(choice, Mapping) for pack in choice}
        rows = choose_rows(packs, choices)
        reads: Reads = {}

        def record(name: str, inputs: Tensor | None) -> None:
            # A module that runs again for some of the rows is not read again.
            if self._routing.rows is rows:
                reads.setdefault(name, []).append(None if inputs is None else inputs.clone())

        before, self._routing.recorder = self._routing.recorder, record
        try:
            with self._routing.using(rows):
                return probe.run(row), reads
        finally:
            self._routing.recorder = before


def _best_pack(
    packs: Iterable[int], paths: Mapping[str, ModuleDeltas], new: set[str]
) -> tuple[int, set[str]]:
    """The pack that changes most of some modules, and the modules that it changes."""
    names = {pack: {name for name, path in paths.items() if path.serves([pack])} for pack in packs}
    best = max(names, key=lambda pack: (len(names[pack] & new), -pack))
    return best, names[best]


def _keeps_rows(
    together: Sequence[Tensor | None], alone: Sequence[Sequence[Tensor | None]]
) -> bool:
    """Whether every call reads of each row what the row alone reads, in order."""
    if any(len(calls) != len(together) for calls in alone):
        return False
    for call, batch in enumerate(together):
        for row, calls in enumerate(alone):
            own = calls[call]
            if batch is None or own is None:
                return False
            # An input of one entry, such as positions, stands for all rows.
            part = batch if batch.shape[0] == 1 else _part(batch, row, own.shape[0])
            if part.shape != own.shape or not _is_near(part, own):
                return False
    return True


def _part(batch: Tensor, row: int, entries: int) -> Tensor:
    fits = batch.shape[0] == ROWS * entries
    return batch[row * entries : (row + 1) * entries] if fits else batch[:0]


def _is_near(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = other.float().square().mean().sqrt()
    difference = (one.float() - other.float()).square().mean(-1).sqrt().flatten()
    return float(difference.median()) <= _LARGEST_DRIFT * float(scale) + 1e-6


def _largest(parts: Sequence[Tensor], exact: bool) -> float:
    """The largest distance; in half precision, where single tokens take other experts, the median.

    NaN where there is nothing to compare.
    """
    if not parts:
        return float("nan")
    values = torch.cat(list(parts))
    return float(values.max() if exact else values.median())
