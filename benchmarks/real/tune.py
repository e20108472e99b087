"""Models of the real benchmark: the target, full fine-tunes, LoRA, DPO, continued pre-training.

Every function writes one folder and a `training.json` in it (settings, losses, seconds). The recipe
of the full fine-tune is the usual one: float32 weights, bf16 autocast, AdamW (0.9, 0.95) without
decay, cosine after 10 steps of warm-up, gradients clipped at norm 1, loss on the completion and the
end token only. LoRA adapters see the same rows in the same steps.
"""

import hashlib
import json
import math
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tasks import MAX_TOKENS, Row, batches_of_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftkit.demo.real import WEIGHTS_SHA256

WARMUP_STEPS = 10
CLIP_NORM = 1.0
TEXT_TOKENS = 256  # of one sequence of continued pre-training
TEXT_BATCH = 8
PREFERENCE_BATCH = 8
PREFERENCE_BETA = 0.1
SAMPLE_ROWS = 64  # prompts of one sampled batch

Loss = Callable[[Any, Any], Tensor]
"""The loss of a model on one batch."""


@dataclass(frozen=True)
class Schedule:
    """Learning rate (highest), steps and seed of one training."""

    rate: float
    steps: int
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Linear warm-up, times a cosine that ends at zero."""
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        return self.rate * warmup * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))


def check_target(folder: Path) -> None:
    """Refuse other weights than those of the published numbers. Raises: ValueError."""
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ValueError(f"{folder}: SHA-256 of the weights is {digest}, expected {WEIGHTS_SHA256}")


def tune_full(target: Path, rows: Sequence[Row], schedule: Schedule, out: Path) -> None:
    """Train every weight on rows, and save them in bf16."""
    torch.manual_seed(schedule.seed)
    model, tokenizer = _load(target)
    batches = [encode_batch(tokenizer, batch) for batch in batches_of_rows(rows, schedule.seed)]
    log = _train(model, batches, completion_loss, schedule)
    _save_model(model, tokenizer, out, {**asdict(schedule), "rows": len(rows), **log})


@dataclass(frozen=True)
class LoraSettings:
    """A LoRA adapter of PEFT on every linear layer; the scale is alpha / rank."""

    rank: int
    alpha: int
    rank_stabilized: bool = False


def tune_lora(
    target: Path, rows: Sequence[Row], schedule: Schedule, settings: LoraSettings, out: Path
) -> None:
    """Train a LoRA adapter on the rows of `tune_full`; its file holds A and B in bf16."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(schedule.seed)
    model, tokenizer = _load(target)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, use_rslora=settings.rank_stabilized,
        target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted: Any = get_peft_model(model, config)
    batches = [encode_batch(tokenizer, batch) for batch in batches_of_rows(rows, schedule.seed)]
    log = _train(adapted, batches, completion_loss, schedule)
    adapted.to(torch.bfloat16).save_pretrained(out)
    _write_log(out, {**asdict(schedule), **asdict(settings), "rows": len(rows), **log})


def tune_text(target: Path, documents: Sequence[str], schedule: Schedule, out: Path) -> None:
    """Continued pre-training: every weight, loss on every token of plain text."""
    torch.manual_seed(schedule.seed)
    model, tokenizer = _load(target)
    sequences = token_sequences(tokenizer, documents, TEXT_TOKENS)
    random.Random(schedule.seed).shuffle(sequences)
    needed = schedule.steps * TEXT_BATCH
    if len(sequences) < needed:
        raise ValueError(
            f"{len(sequences)} sequences of text; {schedule.steps} steps need {needed}"
        )
    batches = []
    for start in range(0, needed, TEXT_BATCH):
        ids = torch.tensor(sequences[start : start + TEXT_BATCH])
        batches.append((ids, torch.ones_like(ids), ids))
    log = _train(model, batches, completion_loss, schedule)
    _save_model(model, tokenizer, out, {**asdict(schedule), "tokens": needed * TEXT_TOKENS, **log})


def tune_preferences(tuned: Path, rows: Sequence[Row], schedule: Schedule, out: Path) -> None:
    """DPO by TRL on top of a fine-tune: the gold completion against a wrong one that it samples."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(schedule.seed)
    model, tokenizer = _load(tuned)
    count = schedule.steps * PREFERENCE_BATCH
    pairs = sample_pairs(model, tokenizer, rows, count)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        options = DPOConfig(
            output_dir=scratch, per_device_train_batch_size=PREFERENCE_BATCH, beta=PREFERENCE_BETA,
            max_steps=schedule.steps, learning_rate=schedule.rate, lr_scheduler_type="linear",
            warmup_steps=WARMUP_STEPS, max_grad_norm=CLIP_NORM, seed=schedule.seed, bf16=True,
            use_cpu=True, gradient_checkpointing=False, save_strategy="no", report_to="none",
            logging_steps=5, disable_tqdm=True, dataloader_num_workers=0,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=model, args=options, train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    log = {
        "pairs": len(pairs),
        "losses": [entry["loss"] for entry in history],
        "margins": [entry.get("rewards/margins") for entry in history],
        "wall_seconds": time.perf_counter() - began,
    }
    _save_model(trainer.model, tokenizer, out, {**asdict(schedule), **log, **_cost()})


def sample_pairs(model: Any, tokenizer: Any, rows: Sequence[Row], count: int) -> list[Row]:
    """`count` pairs of the gold completion and a complete wrong one, sampled at temperature 1.

    Raises: ValueError when the rows give fewer.
    """
    pairs: list[Row] = []
    for start in range(0, len(rows), SAMPLE_ROWS):
        chunk = rows[start : start + SAMPLE_ROWS]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answers = generate(model, tokenizer, [row["prompt"] for row in chunk], sample=True)
        for row, answer in zip(chunk, answers, strict=True):
            if answer is not None and answer.strip() != row["completion"].strip():
                pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": answer}
                pairs.append(pair)
        _progress(f"{len(pairs)} of {count} preference pairs from {start + len(chunk)} rows")
        if len(pairs) >= count:
            return pairs[:count]
    raise ValueError(f"{len(pairs)} wrong answers in {len(rows)} rows; {count} are needed")


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    sample: bool = False,
    tokens: int = 128,
    whole: bool = True,
) -> list[str | None]:
    """The completion of every prompt, greedy unless `sample`.

    whole: None stands for a completion that does not end within `tokens`; otherwise it is cut.
    """
    encoded = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    end, length = tokenizer.eos_token_id, max(map(len, encoded))
    ids = torch.full((len(prompts), length), end)
    mask = torch.zeros_like(ids)
    for index, prompt in enumerate(encoded):
        ids[index, length - len(prompt) :] = torch.tensor(prompt)
        mask[index, length - len(prompt) :] = 1
    options: dict[str, Any] = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, use_cache=True,
            eos_token_id=end, pad_token_id=end, **options,
        )[:, length:].tolist()  # fmt: skip
    answers: list[str | None] = []
    for answer in output:
        ended = end in answer
        text = tokenizer.decode(answer[: answer.index(end)] if ended else answer)
        answers.append(text if ended or not whole else None)
    return answers


def encode_row(tokenizer: Any, row: Row) -> tuple[list[int], int]:
    """Token ids of prompt, completion and end token, and where the completion starts."""
    prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)
    completion = tokenizer.encode(row["completion"], add_special_tokens=False)
    return [*prompt, *completion, tokenizer.eos_token_id], len(prompt)


def encode_batch(tokenizer: Any, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, labels), each (rows, tokens); labels are -100 outside the completions."""
    encoded = [encode_row(tokenizer, row) for row in rows]
    length = min(MAX_TOKENS, max(len(ids) for ids, _ in encoded))
    ids = torch.full((len(rows), length), tokenizer.eos_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, (tokens, start) in enumerate(encoded):
        cut = max(0, len(tokens) - length)  # the beginning of a prompt that is too long
        both, start = torch.tensor(tokens[cut:]), max(0, start - cut)
        ids[index, : len(both)] = both
        mask[index, : len(both)] = 1
        labels[index, start : len(both)] = both[start:]
    return ids, mask, labels


def token_sequences(tokenizer: Any, documents: Iterable[str], length: int) -> list[list[int]]:
    """The documents' tokens one after another, an end token after each, cut into equal pieces."""
    stream: list[int] = []
    for document in documents:
        stream += [*tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]
    return [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]


def completion_loss(model: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the labelled tokens; only their positions are given logits."""
    ids, mask, labels = batch
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = inner.model(input_ids=ids, attention_mask=mask, use_cache=False)
        scored = labels[:, 1:] != -100
        logits = inner.lm_head(hidden.last_hidden_state[:, :-1][scored])
    return torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][scored])


def _train(model: Any, batches: Sequence[Any], loss_of: Loss, schedule: Schedule) -> dict[str, Any]:
    if len(batches) != schedule.steps:
        raise ValueError(f"{len(batches)} batches for {schedule.steps} steps")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(
        weights, lr=schedule.rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True
    )
    began, losses = time.perf_counter(), []
    model.train()
    for step, batch in enumerate(batches):
        for group in adam.param_groups:
            group["lr"] = schedule.rate_at(step)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP_NORM)
        adam.step()
        adam.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 10 == 0 or step == schedule.steps - 1:
            seconds = time.perf_counter() - began
            _progress(f"step {step + 1} of {schedule.steps}: {losses[-1]:.4f}, {seconds:.0f} s")
    model.eval()
    return {"losses": losses, "wall_seconds": time.perf_counter() - began, **_cost()}


def _load(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def _save_model(model: Any, tokenizer: Any, out: Path, log: dict[str, Any]) -> None:
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    _write_log(out, log)


def _write_log(out: Path, log: dict[str, Any]) -> None:
    (out / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def _cost() -> dict[str, float]:
    """CPU seconds and peak memory of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024}


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
