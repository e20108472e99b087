"""Batched sampling from a causal language model on this machine.

`generate` of transformers runs the model and its cache. One `Sampler` per batch chooses the tokens,
because the log-likelihood needs the logits before top-p and temperature, and because transformers
sorts the whole vocabulary for top-p, which on a CPU costs more than a small model.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from graftkit.checkpoint import Checkpoint
from graftkit.distill.config import ModelSource, resolve_model
from graftkit.distill.records import Prompt, SourceAnswer
from graftkit.distill.sources import Replies, Reply, Unit, derive_seed, refused
from graftkit.errors import CheckpointError, SourceError
from graftkit.models.loading import empty_model, load_model, silence_transformers
from graftkit.models.text import context_length, pad_id, usable_tokenizer, vocabulary_size
from graftkit.rows import batches_by_length, pad_batch

_Options: Any = GenerationConfig  # its constructor has no types
NUCLEUS = 64  # likeliest tokens that are tried first for top-p; a sharp model needs no more


class LocalModel:
    """Answers of a Hugging Face model. Weights are loaded with the first batch.

    The model computes in the dtype on disk on a GPU, in float32 on a CPU. At temperature 0 there is
    one sample for each prompt.

    Args:
        config_folder: folder of the configuration, to which its paths are relative.
    Raises: CheckpointError for a model that is no causal language model, lacks a tokenizer or, with
        settings.chat, a chat template.
    """

    def __init__(self, settings: ModelSource, seed: int, config_folder: Path):
        self.settings, self.seed = settings, seed
        self._checkpoint = Checkpoint.open(resolve_model(settings.model, config_folder))
        self.identity = f"{self._checkpoint.revision} {self._checkpoint.nbytes}"
        self.tokenizer = usable_tokenizer(self._checkpoint)
        shape: Any = empty_model(self._checkpoint)
        if not shape.can_generate() or shape.config.is_encoder_decoder:
            raise CheckpointError(
                f"{settings.model}: {type(shape).__name__} does not continue a text; expected a "
                "causal language model"
            )
        if settings.chat and not self.tokenizer.chat_template:
            raise CheckpointError(
                f"source {settings.name}: chat is on, but the tokenizer of {settings.model} has no "
                "chat template; use an instruct model, or turn chat off"
            )
        self._context, self._vocabulary = context_length(shape), vocabulary_size(shape)
        self._samples = settings.samples if settings.temperature > 0 else 1

    def units(self, prompts: Sequence[Prompt]) -> list[Unit]:
        """Batches of similar length; a prompt whose answer the context limits is a batch alone."""
        lengths = [len(self._encode(prompt)) for prompt in prompts]
        whole = [
            i for i, length in enumerate(lengths) if length and self._room(length) == self._most
        ]
        costs = [(lengths[i] + self._most) * self._samples for i in whole]
        batches = [
            [whole[i] for i in batch]
            for batch in batches_by_length(costs, self.settings.batch_tokens)
        ]
        batches += [[i] for i in sorted({*range(len(prompts))} - {*whole})]
        samples = tuple(range(self._samples))
        return [Unit(tuple(prompts[i] for i in batch), samples) for batch in batches]

    def answer(self, units: Mapping[int, Unit]) -> Replies:
        """One batch after the other; each has a random stream of its own."""
        for number, unit in units.items():
            yield number, self._reply(number, unit)

    def _reply(self, number: int, unit: Unit) -> Reply:
        name = self.settings.name
        encoded = [self._encode(prompt) for prompt in unit.prompts]
        fault = self._fault(encoded[0])
        if fault is not None:
            answers = [
                refused(p, name, sample, fault) for p in unit.prompts for sample in unit.samples
            ]
            return Reply(tuple(answers))
        sampler = self._generate(encoded, derive_seed(self.seed, name, number))
        texts = self.tokenizer.batch_decode(
            sampler.drawn(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        drawn = [(prompt, sample) for prompt in unit.prompts for sample in unit.samples]
        answers = [
            SourceAnswer(
                prompt.id,
                prompt.text,
                name,
                sample,
                texts[row].strip(),
                tokens=int(sampler.tokens[row]),
                finish="length" if sampler.live[row] else "stop",
                log_likelihood=round(float(sampler.log_likelihood[row] / sampler.tokens[row]), 6),
            )
            for row, (prompt, sample) in enumerate(drawn)
        ]
        read = sum(map(len, encoded)) * len(unit.samples)
        return Reply(tuple(answers), read, int(sampler.tokens.sum()))

    @property
    def _most(self) -> int:
        return self.settings.max_new_tokens

    def _room(self, length: int) -> int:
        """Largest number of tokens of an answer to a prompt of `length` tokens."""
        return self._most if self._context is None else min(self._most, self._context - length)

    def _fault(self, ids: list[int]) -> str | None:
        """Why nothing can be generated for a prompt; None if it can."""
        if not ids:
            return "the prompt has no tokens"
        if self._room(len(ids)) < 1:
            return f"the prompt fills the context of {self._context} tokens"
        return None

    def _encode(self, prompt: Prompt) -> list[int]:
        """Tokens of the prompt. Raises: CheckpointError for a template or tokenizer that fails."""
        if not self.settings.chat:
            ids = self.tokenizer.encode(prompt.text)
        else:
            turn = [{"role": "user", "content": prompt.text}]
            try:
                ids = self.tokenizer.apply_chat_template(
                    turn, add_generation_prompt=True, return_dict=False
                )
            except TemplateError as error:
                raise CheckpointError(
                    f"{self.settings.model}: the chat template fails ({error}); correct it, or "
                    "turn chat off"
                ) from error
        if max(ids, default=0) >= self._vocabulary:
            raise CheckpointError(
                f"{self.settings.model}: the tokenizer gives token {max(ids)}, but the model has "
                f"{self._vocabulary} embeddings; use the tokenizer that belongs to this model"
            )
        return list(ids)

    @cached_property
    def _loaded(self) -> tuple[Any, list[int]]:
        """The model, and the tokens that end its answers."""
        cuda = torch.cuda.is_available()
        model: Any = load_model(self._checkpoint, "auto" if cuda else torch.float32)
        own = model.generation_config.eos_token_id
        stops = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id} - {None}
        # Without the model's own sampling settings, which `generate` would add to ours.
        model.generation_config = _Options()
        return model.to("cuda" if cuda else "cpu"), sorted(stops)

    def _read(self, model: Any, ids: Tensor, mask: Tensor) -> Any:
        """The key-value cache of the prompts, repeated for every sample.

        None where that saves nothing, or the model's cache cannot be repeated.
        """
        if self._samples == 1 or ids.shape[1] == 0:
            return None
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=_Options(
                max_new_tokens=1, do_sample=False, return_dict_in_generate=True
            ),
        )
        cache = output.past_key_values
        kinds = {type(layer) for layer in getattr(cache, "layers", ())}
        # Exactly these: layers with a recurrent state inherit the method, but repeat only a part.
        if not kinds or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            return None
        cache.batch_repeat_interleave(self._samples)
        return cache

    def _generate(self, encoded: Sequence[list[int]], seed: int) -> "Sampler":
        model, stops = self._loaded
        ids, mask = (
            each.to(model.device) for each in pad_batch(encoded, pad_id(self.tokenizer), left=True)
        )
        options = {"eos_token_id": stops or None, "pad_token_id": pad_id(self.tokenizer)}
        room = self._room(max(map(len, encoded)))
        try:
            with torch.no_grad(), silence_transformers():
                cache = self._read(model, ids[:, :-1], mask[:, :-1])
                ids, mask = (each.repeat_interleave(self._samples, dim=0) for each in (ids, mask))
                sampler = Sampler(self.settings, stops, mask, seed)
                model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    generation_config=_Options(max_new_tokens=room, do_sample=False, **options),
                    logits_processor=[sampler],
                )
        except torch.OutOfMemoryError as error:
            at_once, limit = len(encoded) * self._samples, self.settings.batch_tokens
            raise SourceError(
                f"source {self.settings.name}: {at_once} answers at once do not fit the memory of "
                f"the GPU; lower batch_tokens = {limit} and run again"
            ) from error
        return sampler


class Sampler(LogitsProcessor):
    """Samples the next token of every row that has not ended, and adds up log-probabilities.

    `generate` is greedy, and the sampler returns logits in which the sampled token is the largest.

    Attributes: (rows,) each
        live: whether the row has not ended.
        tokens: number of sampled tokens, with the end.
        log_likelihood: their summed log-probability, nats, without temperature, top-p and penalty.
    """

    def __init__(self, settings: ModelSource, stops: Sequence[int], mask: Tensor, seed: int):
        self.settings, self.mask = settings, mask.bool()
        self.stops = torch.tensor(stops, dtype=torch.int64, device=mask.device)
        self.live = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        self.tokens = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
        self.log_likelihood = torch.zeros(len(mask), dtype=torch.float64, device=mask.device)
        # On the CPU, so that every device draws by the same numbers.
        self._generator = torch.Generator().manual_seed(seed)
        self._steps: list[Tensor] = []
        self._width = NUCLEUS

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Ids (rows, tokens), logits (rows, vocabulary) -> logits with the sampled token on top."""
        uniform = torch.rand(len(scores), generator=self._generator, dtype=torch.float64)
        live = self.live.nonzero().squeeze(1)
        logits = scores[live].float()
        total = logits.logsumexp(dim=-1)
        if not total.isfinite().all():
            raise CheckpointError(
                "the source's logits are not finite; check its weights, or use another dtype"
            )
        token = self._draw(
            self._penalized(logits, input_ids[live], self.mask[live]),
            uniform.to(scores.device)[live],
        )
        step = torch.full_like(self.tokens, -1)
        step[live] = token
        self._steps.append(step)
        self.tokens[live] += 1
        self.log_likelihood[live] += logits.gather(1, token[:, None]).squeeze(1) - total
        self.live[live] = torch.isin(token, self.stops, invert=True)
        scores[live, token] = torch.inf
        return scores

    def drawn(self) -> list[list[int]]:
        """Sampled tokens of each row, without the end."""
        rows = torch.stack(self._steps, dim=1)
        kept = (rows >= 0) & torch.isin(rows, self.stops, invert=True)
        return [row[keep].tolist() for row, keep in zip(rows, kept, strict=True)]

    def _penalized(self, logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits with those of earlier tokens reduced (CTRL, arXiv 1909.05858, section 4.1)."""
        penalty = self.settings.repetition_penalty
        if penalty == 1:
            return logits
        real = torch.ones_like(ids, dtype=torch.bool)
        real[:, : mask.shape[1]] = mask
        occurred = torch.zeros_like(logits, dtype=torch.bool)
        occurred[real.nonzero()[:, 0], ids[real]] = True
        smaller = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(occurred, smaller, logits)

    def _draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """One token per row, by a uniform number from 0 to 1; the likeliest at temperature 0."""
        if self.settings.temperature == 0:
            return logits.argmax(dim=-1)
        scaled = logits / self.settings.temperature
        if self.settings.top_p == 1:
            weights, tokens = scaled.double().softmax(dim=-1), None
        else:
            weights, tokens = self._nucleus(scaled)
        edges = weights.cumsum(dim=-1)
        place = (edges <= uniform[:, None] * edges[:, -1:]).sum(dim=-1)
        place = place.clamp_max(edges.shape[1] - 1)
        return place if tokens is None else tokens.gather(1, place[:, None]).squeeze(1)

    def _nucleus(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and ids, (rows, width), of the fewest tokens whose sum reaches top_p."""
        top_p, total = self.settings.top_p, scaled.logsumexp(dim=-1, keepdim=True).double()
        while True:
            width = min(self._width, scaled.shape[1])
            best, tokens = scaled.topk(width)
            weights = (best.double() - total).exp()
            before = weights.cumsum(dim=-1) - weights
            if width == scaled.shape[1] or bool((before[:, -1] + weights[:, -1] >= top_p).all()):
                return weights * (before < top_p), tokens
            self._width *= 8
