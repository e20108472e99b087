"""A batch of three rows for a tiny model: the first kind of input that its forward pass takes."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tiny_architectures import HIDDEN, IMAGE, NotBuilt
from torch import Tensor
from transformers import PreTrainedModel

ROWS, LENGTH = 3, 7
Inputs = dict[str, Any]
# Recurrent states and caches are no answers.
_NO_ANSWERS = re.compile(r"past_key_values|cache|mems|loss|hidden_states|attentions|.*_grid.*")


def find_inputs(model: PreTrainedModel, given: Inputs | None = None) -> Inputs:
    """The first candidate that the model answers row by row. Raises: NotBuilt."""
    names = inspect.signature(model.forward).parameters
    reasons = []
    for candidate in [given] if given else _candidates(model, set(names)):
        try:
            candidate = _with_image_tokens(model, candidate)
            if not answers(model, candidate):
                raise ValueError("no output has a row for every row of the input")
            return candidate
        except Exception as error:
            reasons.append(f"{sorted(candidate)}: {type(error).__name__}: {error}")
    raise NotBuilt(f"no input fits; {reasons[0] if reasons else 'no inputs can be made'}")


def answers(model: PreTrainedModel, inputs: Inputs) -> dict[str, Tensor]:
    """Every float output with one row for each input row, by its path; the same draws each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**{key: _copy(value) for key, value in inputs.items()})
    tensors = {name: value.float() for name, value in _tensors("", output)}
    return {name: torch.nan_to_num(value, 0.0, 1e4, -1e4) for name, value in tensors.items()}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _tensors(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim and value.shape[0] == ROWS and value.numel():
            yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            if not _NO_ANSWERS.fullmatch(str(key)):
                yield from _tensors(f"{path}.{key}".strip("."), part)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _tensors(f"{path}.{index}".strip("."), part)


def _ids(length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (ROWS, length), generator=generator)


def _noise(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(4))


def _text(model: PreTrainedModel, names: set[str]) -> Inputs:
    ids = _ids(LENGTH, 5)
    inputs: Inputs = {"input_ids": ids}
    if "attention_mask" in names:
        inputs["attention_mask"] = torch.ones_like(ids)
    if "decoder_input_ids" in names and (
        model.config.is_encoder_decoder or "encoder_outputs" in names
    ):
        inputs["decoder_input_ids"] = _ids(5, 6)
    if "bbox" in names:
        corners = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH, 1)
        inputs["bbox"] = corners + torch.tensor([0, 1, 5, 7])
    return inputs


def _lookup(model: PreTrainedModel, *keys: str) -> Any:
    """The first of these settings in the configuration or one of its parts."""
    config = model.config
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
    for key in keys:
        for part in parts:
            value = getattr(part, key, None)
            if value is not None:
                return value
    return None


def _images(model: PreTrainedModel) -> Iterator[Tensor]:
    channels = _lookup(model, "num_channels", "in_channels", "in_chans")
    channels = channels if isinstance(channels, int) else 3
    size = _lookup(model, "image_size", "img_size")
    sizes = [size if isinstance(size, (list, tuple)) else (size, size)] if size else []
    for height, width in [*sizes, (IMAGE, IMAGE), (64, 64)]:
        if isinstance(height, int) and isinstance(width, int):
            yield _noise(channels, height, width)


def _audio(model: PreTrainedModel, names: set[str]) -> Iterator[Inputs]:
    decoder = {"decoder_input_ids": _ids(5, 6)} if "decoder_input_ids" in names else {}
    if "input_values" in names:
        for shape in ((2000,), (1, 2000), (2, 2000), (64, 32), (1, 64, 32)):
            yield {"input_values": _noise(*shape), **decoder}
        for mels in {_lookup(model, "num_mel_bins") or 32}:
            yield {"input_values": _noise(64, mels), **decoder}
    if "input_features" in names:
        mels = _lookup(model, "num_mel_bins", "feature_size", "input_dim", "input_channels") or 32
        frames = 2 * (_lookup(model, "max_source_positions") or 32)
        shapes: list[tuple[int, ...]] = [(mels, frames), (frames, mels), (64, mels), (mels, 64)]
        for shape in [*shapes, (1, 64, mels), (1, 128, mels)]:
            yield {"input_features": _noise(*shape), **decoder}
            if "attention_mask" in names:
                mask = torch.ones(ROWS, max(shape[-2:]), dtype=torch.long)
                yield {"input_features": _noise(*shape), "attention_mask": mask, **decoder}


def _candidates(model: PreTrainedModel, names: set[str]) -> Iterator[Inputs]:
    """Kinds of input in the order in which they are tried: several kinds together come first."""
    text = _text(model, names) if "input_ids" in names else {}
    audio = list(_audio(model, names))
    images: list[Inputs] = []
    if "pixel_values" in names:
        grids = "image_grid_thw" in names
        images = _grids(model) if grids else [{"pixel_values": image} for image in _images(model)]
    yield from _with_images(images, text, names)
    if text:
        for sound in audio:
            tokens = {k: v for k, v in sound.items() if k.startswith("input_")}
            yield {**text, **tokens}
        yield text
        yield {key: value for key, value in text.items() if key != "attention_mask"}
    for image in images:
        yield image
        pixels = image["pixel_values"]
        yield {"pixel_values": pixels[:, None].expand(-1, 4, *pixels.shape[1:]).clone()}
    yield from audio
    yield from _others(model, names)


def _with_images(images: list[Inputs], text: Inputs, names: set[str]) -> Iterator[Inputs]:
    for image in images:
        if text:
            yield {**text, **image}
            if image["pixel_values"].ndim == 4:
                yield {**text, "pixel_values": image["pixel_values"][:, None]}
        if "decoder_input_ids" in names:
            yield {**image, "decoder_input_ids": _ids(5, 6)}


def _others(model: PreTrainedModel, names: set[str]) -> Iterator[Inputs]:
    """Videos, series, and what a few classes take."""
    if "pixel_values_videos" in names:
        for frames in (2, 4, 16):
            yield {"pixel_values_videos": _noise(frames, 3, IMAGE, IMAGE)}
    if "past_values" in names:
        yield from _series(model, names)
    if "inputs" in names:
        yield {"inputs": _ids(16, 5)}
        yield {"inputs": _noise(3, IMAGE, IMAGE)}
    if "hidden_states" in names:
        yield {"hidden_states": _noise(LENGTH, _lookup(model, "hidden_size", "d_model") or HIDDEN)}
    if "audio_codes" in names:
        yield {"audio_codes": _ids(8, 5)[:, None].expand(-1, 4, -1)}


def _grids(model: PreTrainedModel) -> list[Inputs]:
    """Images cut into patches, as Qwen2-VL's processor makes them: 4 x 4 patches for each row."""
    patch = _lookup(model, "patch_size") or 8
    patch = patch if isinstance(patch, int) else patch[0]
    grid = torch.tensor([[1, 4, 4]] * ROWS)
    inputs: list[Inputs] = []
    for times in {_lookup(model, "temporal_patch_size") or 1, 1}:
        pixels = _noise(16, 3 * times * patch * patch).flatten(0, 1)
        inputs.append({"pixel_values": pixels, "image_grid_thw": grid})
    return inputs


def _series(model: PreTrainedModel, names: set[str]) -> Iterator[Inputs]:
    config = model.config
    context = _lookup(model, "context_length", "seq_length") or 32
    lags = max(_lookup(model, "lags_sequence") or [0])
    length, ahead = context + lags, _lookup(model, "prediction_length") or 8
    channels = _lookup(model, "num_input_channels") or 1
    mixed: Inputs = {"past_values": _noise(length)}
    if "past_time_features" in names:
        features = getattr(config, "num_time_features", 0)
        mixed["past_time_features"] = _noise(length, features)
        mixed["past_observed_mask"] = torch.ones(ROWS, length)
        mixed["future_values"] = _noise(ahead)
        mixed["future_time_features"] = _noise(ahead, features)
    yield mixed
    yield {"past_values": _noise(length, channels)}
    yield {"past_values": _noise(length), "freq": torch.zeros(ROWS, 1, dtype=torch.long)}
    yield {"past_values": list(_noise(length))}


_COUNTS: Callable[[str], list[str]] = re.compile(r"(?:features|feat\w*)\D{0,25}?(\d+)").findall


def _with_image_tokens(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """The inputs with as many placeholders of images or sounds as the model says it needs."""
    extra = [k for k in inputs if k in ("pixel_values", "input_features", "input_values")]
    if "input_ids" not in inputs or not extra:
        return inputs
    word = "image" if extra == ["pixel_values"] else "audio"
    token = _lookup(model, f"{word}_token_id", f"{word}_token_index")
    if not isinstance(token, int):
        return inputs
    message = ""
    for count in (1, 0, 2):
        trial = _placed(inputs, token, count)
        try:
            with torch.no_grad():
                model(**{key: _copy(value) for key, value in trial.items()})
            return trial
        except Exception as error:
            message = message or str(error)
    # The message counts features, or their elements.
    for size in (1, HIDDEN):
        count, rest = divmod(int((_COUNTS(message) or ["0"])[-1]), ROWS * size)
        if 0 < count <= 128 and not rest:
            return _placed(inputs, token, count)
    return inputs


def _placed(inputs: Inputs, token: int, count: int) -> Inputs:
    ids = inputs["input_ids"]
    places = torch.full((ROWS, count), token)
    ids = torch.cat([ids[:, :2], places, ids[:, 2:]], 1)
    placed = {**inputs, "input_ids": ids}
    if "attention_mask" in placed:
        placed["attention_mask"] = torch.ones_like(ids)
    if "bbox" in placed:
        return inputs
    return placed
