"""Fine-tuning for continual.py: all weights or an adapter, with the same rows and steps."""

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from graftkit.checkpoint import Checkpoint
from graftkit.models import load_model
from graftkit.models.text import pad_id, scored_tokens, usable_tokenizer
from graftkit.models.views import CheckpointWriter
from graftkit.outputs import claimed
from graftkit.rows import Row, encode_row, pad_batch

RATE = 8e-4  # of full fine-tuning, as the nursery's fine-tunes were made
LORA_RATE = 4e-3  # as in transfer.py
LORA_RANK, LORA_ALPHA = 16, 32
WARMUP = 0.05  # share of the steps; cosine decay follows
CLIP_NORM = 1.0
WINDOW = 10  # batches whose rows are sorted by length together


def tune_weights(
    start: Path, rows: Sequence[Row], steps: int, batch: int, embedding_share: float, output: Path
) -> Path:
    """Fine-tune all weights of a checkpoint into a new folder.

    Args:
        embedding_share: the embedding's learning rate as a share of the others'.
    """
    checkpoint = Checkpoint.open(start)
    model: Any = load_model(checkpoint, torch.float32)
    embedding = model.get_input_embeddings().weight
    others = [weight for weight in model.parameters() if weight is not embedding]
    groups = [{"params": others}, {"params": [embedding], "lr": RATE * embedding_share}]
    _train(model, usable_tokenizer(checkpoint), rows, steps, batch, groups, RATE)
    CheckpointWriter(model, checkpoint).write(model.state_dict(), output)
    return output


def tune_adapter(
    target: Path, previous: Path | None, rows: Sequence[Row], steps: int, batch: int, output: Path
) -> Path:
    """Train a LoRA on every linear layer, a new one or on from a previous one; kept in bfloat16."""
    checkpoint = Checkpoint.open(target)
    model: Any = load_model(checkpoint, torch.float32)
    if previous is None:
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear")
        model = get_peft_model(model, config)
    else:
        model = PeftModel.from_pretrained(model, previous, is_trainable=True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [{"params": weights}]
    tokenizer = usable_tokenizer(checkpoint)
    _train(model.get_base_model(), tokenizer, rows, steps, batch, groups, LORA_RATE)
    for weight in weights:
        weight.data = weight.data.bfloat16()
    with claimed(output, ["adapter"], folder=True) as claim:
        claim.open_work()
        model.save_pretrained(claim.result)
    return output


def adapted_model(target: Path, adapter: Path) -> nn.Module:
    """The target with a trained adapter merged in, float32."""
    model: Any = PeftModel.from_pretrained(load_model(target, torch.float32), adapter)
    merged: nn.Module = model.merge_and_unload()
    return merged.eval()


def _train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    steps: int,
    batch: int,
    groups: list[dict[str, Any]],
    rate: float,
) -> None:
    """AdamW on the mean cross-entropy of the completions' tokens, in bfloat16 autocast."""
    adam = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    weights = [weight for group in adam.param_groups for weight in group["params"]]
    model.train()
    for _, chosen in zip(range(steps), _endless_batches(rows, batch), strict=False):
        _mean_loss(model, tokenizer, chosen).backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP_NORM)
        adam.step()
        schedule.step()
        adam.zero_grad(set_to_none=True)
    model.eval()


def _mean_loss(model: Any, tokenizer: Any, rows: Sequence[Row]) -> Tensor:
    encoded = [encode_row(tokenizer, row) for row in rows]
    ids, mask = pad_batch([row.ids for row in encoded], pad_id(tokenizer))
    scored = scored_tokens(model, encoded, mask)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        # Most positions belong to prompts and need no logits.
        logits = model.get_output_embeddings()(hidden[scored])
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][scored[:, :-1]])


def _endless_batches(rows: Sequence[Row], size: int) -> Iterator[list[Row]]:
    """Batches of different rows of similar length, in a new order for every pass; always the same.

    Without the lengths a third of the tokens would be padding.
    """
    generator = random.Random(0)
    order = list(rows)
    while True:
        generator.shuffle(order)
        for start in range(0, len(order), WINDOW * size):
            window = sorted(order[start : start + WINDOW * size], key=_length)
            batches = [window[i : i + size] for i in range(0, len(window) - size + 1, size)]
            generator.shuffle(batches)
            yield from batches


def _length(row: Row) -> int:
    return len(row.prompt) + len(row.completion)
