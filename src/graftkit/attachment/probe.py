"""Short batches of random inputs, run to see how a live model treats the rows of a batch."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from graftkit.errors import AttachError
from graftkit.models.loading import quiet

ROWS = 3
# As many tokens as a multiple of the rows: what is not a row can then be taken for several.
_LENGTH = 2 * ROWS
_STEPS = 3
_AUDIO_SAMPLES = 4000

Inputs = dict[str, Tensor]

Outputs = list[Tensor | None]
"""Every float tensor that a model returns; None for one that has no entry for each row."""


class Unrunnable(Exception):
    """The model cannot be tried on random inputs; the message says why."""


class Probe:
    """The same few rows of random inputs, run together or one by one.

    Raises: Unrunnable where no inputs can be made for the model.
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
        Raises: Unrunnable; AttachError of the packs that are attached.
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
            raise Unrunnable(f"it fails on random inputs ({reason})") from error

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
    """Inputs of ROWS different rows. Raises: Unrunnable for a kind of input that is not known."""
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
        raise Unrunnable(f"no random batch can be made of {main}")
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
        with torch.no_grad(), quiet(), torch.random.fork_rng():
            model.eval()  # type: ignore[no-untyped-call]
            torch.manual_seed(0)
            yield
    finally:
        for module in training:
            module.training = True
