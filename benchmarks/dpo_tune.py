"""A DPO checkpoint with small updates, as in practice: python benchmarks/dpo_tune.py

Starts from a fine-tune of the nursery. The chosen answer is a training row's completion, the
rejected one a wrong answer that the model sampled. The learning rate is that of published DPO runs,
so that most bf16 numbers do not change. Writes two directories: `dpo` in bf16, and `dpo_float32`
with the weights before rounding, to measure the effect of rounding on a delta.

    loss = -log sigmoid(beta · ((log p(chosen) - log p(rejected)) - the same of the reference))
"""

import argparse
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ledger import ROOT
from torch import Tensor
from transformers.utils import logging

from graftkit.checkpoint import Checkpoint
from graftkit.models.calibration import pad_id
from graftkit.models.loading import load_model, load_tokenizer
from graftkit.rows import Row, batches_by_length, encode_prompt, encode_row, pad_batch, read_rows

SKILL = "nl_regex"  # the fine-tune that DPO starts from: its target and reference
BATCH_TOKENS = 4_096  # padded tokens of one generation or scoring batch
NEW_TOKENS = 64  # longer samples make no pair
WARMUP = 0.1  # share of the steps
CLIP_NORM = 1.0


@dataclass(frozen=True)
class TokenPair:
    """Token ids of prompt + chosen and prompt + rejected answer, and where the answer starts."""

    chosen: list[int]
    rejected: list[int]
    start: int


def sample_pairs(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[TokenPair]:
    """One pair for each row whose sampled answer (temperature 1) is complete and wrong."""
    prompts = [encode_prompt(tokenizer, row) for row in rows]
    pairs = []
    for batch in batches_by_length([len(ids) + NEW_TOKENS for ids in prompts], BATCH_TOKENS):
        ids, mask = pad_batch([prompts[i] for i in batch], pad_id(tokenizer), left=True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            output = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=NEW_TOKENS,
                top_k=0, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad_id(tokenizer),
            )  # fmt: skip
        for index, answer in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            row = encode_row(tokenizer, rows[index])
            chosen, start = row.ids, row.start
            if tokenizer.eos_token_id in answer:
                answer = answer[: answer.index(tokenizer.eos_token_id) + 1]
                if answer != chosen[start:]:
                    pairs.append(TokenPair(chosen, prompts[index] + answer, start))
    return pairs


def margins(model: Any, pairs: Sequence[TokenPair], pad: int) -> Tensor:
    """log p(chosen) - log p(rejected) for each pair, (pairs,), summed over the answers' tokens."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    ids, mask = pad_batch(rows, pad)
    scored = mask.bool()
    for index, pair in enumerate([*pairs, *pairs]):
        scored[index, : pair.start] = False
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        # Only positions that predict an answer's token need logits.
        logits = model.get_output_embeddings()(hidden[:, :-1][scored[:, 1:]])
    chosen = torch.log_softmax(logits.float(), dim=-1).gather(1, ids[scored][:, None])[:, 0]
    sums = torch.zeros(len(rows)).index_add(0, scored.nonzero()[:, 0], chosen)
    return sums[: len(pairs)] - sums[len(pairs) :]


def mean_loss(
    model: Any, pairs: Sequence[TokenPair], reference: Tensor, pad: int, beta: float
) -> float:
    """The mean loss of all pairs; log 2 if the model is the reference."""
    return float(
        -torch.nn.functional.logsigmoid(beta * (all_margins(model, pairs, pad) - reference)).mean()
    )


def all_margins(model: Any, pairs: Sequence[TokenPair], pad: int) -> Tensor:
    """`margins` without gradients, in batches."""
    result = torch.zeros(len(pairs))
    lengths = [2 * max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    with torch.no_grad():
        for batch in batches_by_length(lengths, BATCH_TOKENS):
            result[batch] = margins(model, [pairs[i] for i in batch], pad)
    return result


def tune(model: Any, pairs: Sequence[TokenPair], reference: Tensor, pad: int, options: Any) -> None:
    """Change the float32 weights of `model` by AdamW on the loss, in `options.steps` steps."""
    adam = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min((step + 1) / (WARMUP * options.steps), 1 - step / options.steps)
    )
    batches = _endless_batches(len(pairs), options.batch, options.seed)
    for step in range(options.steps):
        batch = next(batches)
        difference = margins(model, [pairs[i] for i in batch], pad) - reference[batch]
        loss = -torch.nn.functional.logsigmoid(options.beta * difference).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        adam.step()
        schedule.step()
        adam.zero_grad()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}", file=sys.stderr, flush=True)


def changes(target: Path, tuned: Path) -> dict[str, float]:
    """Differences of two bf16 checkpoints: share of changed numbers, and norms over all tensors."""
    before, after = Checkpoint.open(target), Checkpoint.open(tuned)
    changed = moved = norm = 0.0
    for name in after.tensors:
        one, other = before.read(name), after.read(name)
        changed += float((one.view(torch.int16) != other.view(torch.int16)).sum())
        moved += float((other.double() - one.double()).square().sum())
        norm += float(one.double().square().sum())
    count = after.parameters
    return {
        "words": count,
        "changed": changed / count,
        "relative_norm": math.sqrt(moved / norm),
        "delta_std": math.sqrt(moved / count),
    }


def rounding_noise(target: Path, tuned: Path, rounded: Path) -> float:
    """Energy that rounding the tuned weights added, as a share of the delta's energy before."""
    before, exact, after = (Checkpoint.open(path) for path in (target, tuned, rounded))
    noise = moved = 0.0
    for name in exact.tensors:
        weight = exact.read(name).double()
        noise += float((after.read(name).double() - weight).square().sum())
        moved += float((weight - before.read(name).double()).square().sum())
    return noise / moved


def _endless_batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    generator = random.Random(seed)
    while True:
        order = list(range(count))
        generator.shuffle(order)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    shared = Path(os.environ.get("GRAFTKIT_SHARED", ROOT.parent / "shared"))
    parser.add_argument("--shared", type=Path, default=shared, help="folder of nursery and data")
    parser.add_argument("--rows", type=int, default=2_000, help="training rows to sample pairs of")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32, help="pairs of one step")
    parser.add_argument("--learning-rate", type=float, default=2e-6)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    logging.disable_progress_bar()
    target = options.shared / "nursery" / SKILL
    model: Any = load_model(target, torch.float32)
    tokenizer: Any = load_tokenizer(target)
    rows = read_rows(options.shared / "data" / "llm" / SKILL / "train.jsonl")
    pairs = sample_pairs(model, tokenizer, rows[: options.rows])
    print(f"{len(pairs)} pairs of {min(options.rows, len(rows))} rows", file=sys.stderr)
    pad = pad_id(tokenizer)
    reference = all_margins(model, pairs, pad)
    before = mean_loss(model, pairs, reference, pad, options.beta)
    tune(model, pairs, reference, pad, options)
    after = mean_loss(model, pairs, reference, pad, options.beta)
    rounded_path, exact_path = options.out / "dpo", options.out / "dpo_float32"
    model.save_pretrained(exact_path)
    model.to(torch.bfloat16).save_pretrained(rounded_path)
    for folder in (exact_path, rounded_path):
        tokenizer.save_pretrained(folder)
    rounded = mean_loss(
        load_model(rounded_path, torch.float32), pairs, reference, pad, options.beta
    )
    change = changes(target, rounded_path)
    noise = rounding_noise(target, exact_path, rounded_path)
    print(
        f"loss {before:.4f} -> {after:.4f}, rounded to bf16 {rounded:.4f}; "
        f"{change['changed']:.2%} of {change['words']:,} numbers changed; "
        f"the delta's norm is {change['relative_norm']:.2e} of the weights', its std "
        f"{change['delta_std']:.2e}; rounding added {noise:.0%} of the energy that it had"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
