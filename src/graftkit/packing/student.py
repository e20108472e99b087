"""The packed model during code training: factors are real numbers, rounded in every pass.

    δ̂ = round(left) diag(component) round(right) diag(steps)

Gradients pass the rounding unchanged (straight-through estimator, arXiv 1308.3432).
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from graftkit.checkpoint import Checkpoint
from graftkit.compress.allocate import bits_per_unit
from graftkit.compress.coded import CodedFactors, store_factors
from graftkit.compress.entropy import LARGEST_CODE
from graftkit.models.loading import input_embeddings, output_embeddings
from graftkit.models.text import submodule

_FREE_CODES, _CODES_PER_VALUE = 2**25, 0.35
_SPREAD = 0.25
"""Largest distance of a code from its integer at the start: then codes do not all move at once."""
_EXCESS = 64  # bytes by which the estimate of a delta's bytes exceeds them at times
_ZONES = [0.5 + 0.01 * step for step in range(46)]  # least |value| of a code that is not 0


def most_codes(checkpoint: Checkpoint) -> int:
    """Most codes that are trained; with more of them, only the scales of components are.

    A trained code takes 16 bytes of memory. Packing may use 24 bytes for each weight of the largest
    tensor, and the two models and their activations need most of that.
    """
    largest = max(info.numel for info in checkpoint.tensors.values())
    return _FREE_CODES + int(_CODES_PER_VALUE * largest)


class Student:
    """The live packed model; hooks add the deltas that are trained.

    Args:
        model: the packed model without the deltas of `factors`, frozen.
        factors: by the name of a Linear, a Conv1D or an Embedding in the model. The delta of a
            tied embedding is added to the output head too. Factors of rank 0 are left out.
        packed: the checkpoint of `model`.
    Raises: CheckpointError for a missing module.
    """

    def __init__(self, model: Any, factors: Mapping[str, CodedFactors], packed: Checkpoint):
        self.model = model
        codes = sum(f.left.numel() + f.right.numel() for f in factors.values())
        trains_codes = codes <= most_codes(packed)
        generator = torch.Generator().manual_seed(0)
        self.latents = {
            name: _Latent(f, trains_codes, generator)
            for name, f in factors.items()
            if len(f.component)
        }
        for name, latent in self.latents.items():
            module = submodule(model, name, packed.name)
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(latent.add_rows)
                if _serves_as_head(model, module):
                    model.get_output_embeddings().register_forward_hook(latent.add_product)
            else:
                module.register_forward_hook(latent.add_product)

    @property
    def codes(self) -> list[Tensor]:
        """The trained codes before rounding; empty if there are too many to train."""
        return [part for latent in self.latents.values() for part in latent.codes]

    @property
    def scales(self) -> list[Tensor]:
        """Logarithms of the factors that scale components."""
        return [latent.component for latent in self.latents.values()]

    def add_rate(self, nats_per_bit: float) -> None:
        """Add the gradient of the bits that the codes take to their gradients."""
        for latent in self.codes:
            values = latent.detach()
            rate = bits_per_unit(_rounded(values)) * values.sign() * nats_per_bit
            latent.grad = rate if latent.grad is None else latent.grad + rate

    def nbytes(self, zone: float = 0.5) -> int:
        """Bytes of all payloads, found without coding: that or a few bytes more."""
        return sum(latent.coded(zone).stored().estimate() for latent in self.latents.values())

    def entropy_bytes(self, zone: float = 0.5) -> float:
        """Bytes of the codes by the entropy of each factor: an estimate that takes no coding."""
        parts = [part for latent in self.latents.values() for part in (latent.left, latent.right)]
        return sum(_entropy_bits(part, zone) for part in parts) / 8

    def fit(self, room: int) -> dict[str, bytes] | None:
        """Round the codes, with the smallest dead zone whose payloads fit `room` bytes.

        The search starts where the entropies say that they fit.

        Returns: payloads as the file holds them, by module; None where no dead zone is large
            enough. Then nothing is rounded.
        """
        nbytes, most = cache(self.nbytes), room + _EXCESS * len(self.latents)
        scale = nbytes(_ZONES[0]) / max(1.0, self.entropy_bytes())
        place = bisect_left(_ZONES, True, key=lambda zone: scale * self.entropy_bytes(zone) <= room)
        place = min(place, len(_ZONES) - 1)
        while place and nbytes(_ZONES[place - 1]) <= most:
            place -= 1
        for zone in _ZONES[place:]:
            if nbytes(zone) > most:
                continue
            payloads = {n: store_factors(part.coded(zone)) for n, part in self.latents.items()}
            if sum(map(len, payloads.values())) <= room:
                for latent in self.latents.values():
                    latent.settle(zone)
                return payloads
        return None


class _Latent:
    """One trained delta."""

    def __init__(self, start: CodedFactors, trains_codes: bool, generator: torch.Generator):
        self.left, self.right = start.left.float().contiguous(), start.right.float()
        # Codes in integers would take a quarter more memory.
        nothing = torch.empty(0, dtype=torch.int32)
        self.start, self.steps = replace(start, left=nothing, right=nothing), start.steps
        self.component = torch.zeros(len(start.component)).requires_grad_()
        self.codes: Sequence[Tensor] = (self.left, self.right) if trains_codes else ()
        for latent in self.codes:
            latent += _SPREAD * (2 * torch.rand(latent.shape, generator=generator) - 1)
            latent.requires_grad_()

    def coded(self, zone: float) -> CodedFactors:
        left, right = (_rounded(part.detach(), zone).int() for part in (self.left, self.right))
        component = self.start.component * self.component.detach().exp()
        return replace(self.start, left=left, right=right, component=component)

    def settle(self, zone: float) -> None:
        with torch.no_grad():
            for latent in (self.left, self.right):
                latent.copy_(_rounded(latent, zone))

    def add_product(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Hook of a linear layer: y + (x rightᵀ) leftᵀ."""
        product: Tensor = _RoundedProduct.apply(args[0], *self._parts())  # type: ignore[no-untyped-call]
        return output + product

    def add_rows(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Hook of an embedding: y + rows of left right."""
        left, right, scales, steps = self._parts()
        rows = _straight_through(nn.functional.embedding(args[0], left)) * scales
        return output + (rows @ (_straight_through(right) * steps)).to(output.dtype)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes before rounding, scales of components (r,) and steps of columns (in,)."""
        scales = self.start.component * self.component.exp()
        return self.left, self.right, scales, self.steps


class _RoundedProduct(torch.autograd.Function):
    """(x rightᵀ) leftᵀ with factors of rounded codes; one pass over the codes each way.

    x (.., in), left (out, r), right (r, in), scales (r,) of components, steps (in,) of columns.
    The gradients of left and right are those of their rounded values.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, left: Tensor, right: Tensor, scales: Tensor, steps: Tensor
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        left, right = (
            _rounded(part).mul_(unit).to(x.dtype) for part, unit in ((left, scales), (right, steps))
        )
        inner = flat @ right.T
        ctx.save_for_backward(flat, inner, left, right, scales, steps)
        return (inner @ left.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, inner, left, right, scales, steps = ctx.saved_tensors
        of_output = gradients[0].reshape(-1, left.shape[0])
        of_inner = of_output @ left
        needs = ctx.needs_input_grad
        of_x = (of_inner @ right).view(*gradients[0].shape[:-1], -1) if needs[0] else None
        of_left = (of_output.T @ inner).float().mul_(scales) if needs[1] else None
        of_right = (of_inner.T @ flat).float().mul_(steps) if needs[2] else None
        # Σ_o ∂left_ok left_ok / scale_k, summed over tokens in place of outputs.
        of_scales = (of_inner * inner).sum(dim=0, dtype=torch.float32) / scales
        return of_x, of_left, of_right, of_scales, None


def _serves_as_head(model: Any, module: nn.Module) -> bool:
    """Whether this is the tied input embedding, and not one of positions."""
    tied = model.config.get_text_config().tie_word_embeddings
    has_head = output_embeddings(model) is not None
    return bool(tied and has_head and module is input_embeddings(model))


def _rounded(values: Tensor, zone: float = 0.5) -> Tensor:
    """The nearest valid codes; 0 where |value| is below `zone`."""
    codes = values.round().clamp_(-LARGEST_CODE, LARGEST_CODE)
    return codes if zone <= 0.5 else codes.masked_fill_(values.abs() < zone, 0.0)


def _entropy_bits(values: Tensor, zone: float) -> float:
    """Bits of the rounded codes at the entropy of their histogram."""
    codes = _rounded(values.detach(), zone).int().flatten()
    counts = torch.bincount(codes - codes.min()).double()
    return -float(torch.xlogy(counts, counts / len(codes)).sum()) / math.log(2)


def _straight_through(values: Tensor) -> Tensor:
    """Rounded in the forward pass, the identity in the backward pass."""
    return values + (_rounded(values.detach()) - values.detach())
