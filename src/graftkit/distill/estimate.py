"""What a run will take, before it starts: counts, tokens, memory, disk and time.

The length of an answer is not known yet, so every answer counts with its maximum. Time is that of
the multiplications for so many tokens, at the speed of one matrix product that is measured here.
Shorter answers take less; small models and slow disks take more.
"""

import time
from pathlib import Path
from typing import Any

import torch

from graftkit.checkpoint import Checkpoint
from graftkit.config import Budget
from graftkit.distill.config import (
    AnswersSource,
    DistillConfig,
    EndpointSource,
    ModelSource,
    Source,
    TrainerSettings,
    resolve_model,
)
from graftkit.distill.records import Prompt
from graftkit.models.text import usable_tokenizer

BYTES_OF_TOKEN = 6  # of a sampled token in samples.jsonl, with its share of the JSON
TRAINED_BYTES = 16  # of a parameter: weight, gradient and two moments, float32
CHECKPOINT_BYTES = 12  # of a parameter: weight and two moments
CHECKPOINTS = 3  # two stay while the next is written
PROBE_SIZE = 1024  # rows and columns of the matrices whose product is timed


def estimate(
    config: DistillConfig, target: Checkpoint, prompts: tuple[Prompt, ...], config_folder: Path
) -> dict[str, Any]:
    """Estimate every stage from configurations and tokenizers; weights are not read.

    Returns: prompts, prompt_tokens, sources, stages and disk_bytes. Tokens and seconds are those of
        answers of maximal length; memory_bytes is without activations.
    """
    tokenizer = usable_tokenizer(target)
    lengths = [len(tokenizer.encode(prompt.text)) for prompt in prompts]
    sources = [
        _source(source, len(prompts), sum(lengths), config_folder) for source in config.sources
    ]
    longest = max(source.max_new_tokens for source in config.sources)
    share = config.selection.sft_share
    for_sft = len(prompts) if share == "all" or not config.dpo else round(share * len(prompts))
    for_pairs = len(prompts) if share == "all" else len(prompts) - for_sft
    row = sum(lengths) / max(1, len(prompts)) + longest
    stages: dict[str, Any] = {
        "sample": {
            "answers": sum(source["answers"] for source in sources),
            "tokens": sum(source["tokens"] for source in sources),
            "cost": sum(source["cost"] for source in sources),
            "memory_bytes": max(source["memory_bytes"] for source in sources),
            "seconds": sum(source["seconds"] for source in sources),
        },
        "sft": _training(config.sft, target, for_sft, row, passes=6, reference=0),
    }
    if config.dpo:
        # Two answers to each prompt, which the reference model reads too.
        stages["dpo"] = _training(config.dpo, target, for_pairs, 2 * row, passes=8, reference=4)
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(lengths),
        "sources": sources,
        "stages": stages,
        "disk_bytes": _disk(config, target, stages),
    }


def _source(
    source: Source, prompts: int, prompt_tokens: int, config_folder: Path
) -> dict[str, Any]:
    samples = source.samples
    answers = prompts * samples
    tokens = answers * source.max_new_tokens
    counts: dict[str, Any] = {
        **{"name": source.name, "answers": answers, "tokens": tokens},
        **{"cost": 0.0, "memory_bytes": 0, "seconds": 0.0},
    }
    if isinstance(source, AnswersSource):
        return {**counts, "tokens": 0}
    if isinstance(source, EndpointSource):
        price_in, price_out = source.price_per_million
        return {**counts, "cost": (prompt_tokens * samples * price_in + tokens * price_out) / 1e6}
    return {**counts, **_local(source, tokens + prompt_tokens * samples, config_folder)}


def _local(source: ModelSource, tokens: int, config_folder: Path) -> dict[str, Any]:
    model = Checkpoint.open(resolve_model(source.model, config_folder))
    on_gpu = torch.cuda.is_available()
    memory = model.nbytes if on_gpu else 4 * model.parameters
    seconds = 2 * model.parameters * tokens / _speed(torch.bfloat16 if on_gpu else torch.float32)
    return {"memory_bytes": memory, "seconds": seconds}


def _training(
    settings: TrainerSettings,
    target: Checkpoint,
    rows: int,
    tokens: float,
    passes: int,
    reference: int,
) -> dict[str, Any]:
    """SFT or DPO.

    passes: operations for each parameter and token. reference: bytes of the reference model for
        each parameter.
    """
    each = 4 if settings.lora else TRAINED_BYTES
    total = rows * min(tokens, 2.0 * settings.max_tokens) * settings.epochs
    precision = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    return {
        "rows": rows,
        "steps": max(1, round(rows * settings.epochs / settings.batch_size)),
        "tokens": round(total),
        "memory_bytes": (each + reference) * target.parameters,
        "seconds": passes * target.parameters * total / _speed(precision),
    }


def _disk(config: DistillConfig, target: Checkpoint, stages: dict[str, Any]) -> int:
    """Largest size of the folder in bytes."""
    models = 2 if config.dpo else 1
    checkpoints = CHECKPOINTS * CHECKPOINT_BYTES * target.parameters
    pack = Budget.parse(config.pack.budget or "5%").to_bytes(target.nbytes, target.parameters)
    samples = BYTES_OF_TOKEN * int(stages["sample"]["tokens"])
    return 2 * samples + models * target.nbytes + checkpoints + pack


_speeds: dict[torch.dtype, float] = {}


def _speed(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product on this machine."""
    if dtype not in _speeds:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        matrix = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype, device=device)
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            float((matrix @ matrix)[0, 0])
            best = min(best, time.perf_counter() - started)
        _speeds[dtype] = 2 * PROBE_SIZE**3 / best
    return _speeds[dtype]
