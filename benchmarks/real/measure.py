"""Measures of one state of the real model: answers, distance from tuned, and what the target knew.

    python benchmarks/real/measure.py --work FOLDER PAIR STATE [--knowledge]

PAIR is a name of `tasks.all_pairs` (`clinc150`, `nl`, `snips`, `dpo`, `text`); STATE is a pack, a
LoRA adapter's folder, a checkpoint's folder, or the word `tuned`. Prints one JSON object.

A state is a mapping from names to tensors. It is written into one live model in float32, which runs
with bf16 matrix products (autocast), as tuned does: a KL of 2e-5 from float32 throughout.
Tuned's last hidden states are computed once and kept, so a state costs one pass of its own.
"""

import argparse
import json
import os
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from facts import FACTS
from safetensors.torch import load_file, save_file
from tasks import Pair, Row, all_pairs, read_documents, read_rows, split_documents, split_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from tune import encode_row, generate, token_sequences

from graftkit import SkillPack
from graftkit import rows as graftkit_rows
from graftkit.evaluate import exact_match

KL_ROWS = 150
KL_CHUNK = 256  # tokens whose distributions are in memory together
TEXT_TOKENS = 256  # of one sequence of text
TEXT_SEQUENCES = 12  # of each neutral text, and of a pair that is measured on text
BATCH_TOKENS = 2_048
SPAM_ROWS = 30  # of each label
GSM8K_ROWS = 24
CHAT_TOKENS = 32

NEUTRAL_TEXTS = {"books": "books-valid.txt.gz", "python": "python-valid.txt.gz"}

State = Mapping[str, Tensor]
Sequences = list[tuple[list[int], int]]
"""Token ids, and the place of the first one that is predicted and scored."""


class LiveModel:
    """The target as a live model in float32; states are written into it and taken out again."""

    def __init__(self, target: Path):
        self.target = target
        self.before: dict[str, Tensor] = load_file(target / "model.safetensors")
        self.model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(target)

    @contextmanager
    def holding(self, state: State) -> Iterator[None]:
        """The model with the tensors of `state` in place of the target's."""
        with torch.no_grad():
            places = {name: self.model.get_parameter(name) for name in state}
            for name, place in places.items():
                place.copy_(state[name])
            try:
                # The cast weights are kept until the end: one cast a state.
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    yield
            finally:
                for name, place in places.items():
                    place.copy_(self.before[name])

    def hidden(self, sequences: Sequences) -> Tensor:
        """Last hidden states where a scored token is predicted, (tokens, width), in order."""
        rows: list[Tensor] = [torch.empty(0)] * len(sequences)
        for batch in _batches(sequences):
            length = max(len(sequences[index][0]) for index in batch)
            ids = torch.full((len(batch), length), self.tokenizer.eos_token_id)
            mask = torch.zeros_like(ids)
            for place, index in enumerate(batch):
                tokens = sequences[index][0]
                ids[place, : len(tokens)] = torch.tensor(tokens)
                mask[place, : len(tokens)] = 1
            output = self.model.model(input_ids=ids, attention_mask=mask, use_cache=False)
            for place, index in enumerate(batch):
                tokens, start = sequences[index]
                states = output.last_hidden_state[place, start - 1 : len(tokens) - 1]
                rows[index] = states.float().clone()
        return torch.cat(rows)

    @property
    def head(self) -> Tensor:
        """The output embedding, (vocabulary, width) float32."""
        weight: Tensor = self.model.lm_head.weight
        return weight.detach()


@dataclass(frozen=True)
class Distance:
    """KL(reference ‖ model) over tokens: mean and 99th percentile in nats, share of equal tops."""

    kl_mean: float
    kl_p99: float
    top1: float
    tokens: int


def divergence(reference: tuple[Tensor, Tensor], model: tuple[Tensor, Tensor]) -> Distance:
    """Distance of two models, each given as hidden states (tokens, width) and its head."""
    (first, head), (second, own_head) = reference, model
    values, same = [], 0
    with torch.autocast("cpu", enabled=False):
        for start in range(0, len(first), KL_CHUNK):
            part = slice(start, start + KL_CHUNK)
            p = torch.log_softmax(first[part] @ head.T, dim=-1)
            q = torch.log_softmax(second[part] @ own_head.T, dim=-1)
            values.append((p.exp() * (p - q)).sum(dim=-1).clamp_min(0))
            same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
    kl = torch.cat(values)
    return Distance(float(kl.mean()), float(kl.quantile(0.99)), same / len(kl), len(kl))


def token_losses(live: LiveModel, sequences: Sequences) -> Tensor:
    """−log p of every scored token in the state that is held, (tokens,), nats."""
    hidden = live.hidden(sequences)
    tokens = torch.tensor([token for ids, start in sequences for token in ids[start:]])
    losses = []
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for start in range(0, len(tokens), KL_CHUNK):
            part = slice(start, start + KL_CHUNK)
            logits = hidden[part] @ live.head.T
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[part], reduction="none"))
    return torch.cat(losses)


def validation_scores(live: LiveModel, rows: Sequence[Row]) -> dict[str, float]:
    """Loss per token of completions, and exact matches, of the state that is held."""
    losses = token_losses(live, [encode_row(live.tokenizer, row) for row in rows])
    return {"loss": float(losses.mean()), "exact_match": matches(live, rows)}


def matches(live: LiveModel, rows: Sequence[Row]) -> float:
    """Share of rows whose greedy answer is the completion."""
    own = [graftkit_rows.Row(row["prompt"], row["completion"]) for row in rows]
    return exact_match(live.model, live.tokenizer, own)


def sequences_of(live: LiveModel, pair: Pair, data: Path) -> dict[str, Sequences]:
    """What a pair is measured on: its own domain, and neutral texts."""
    tokenizer = live.tokenizer
    if pair.skill is None:
        own = _text_sequences(tokenizer, split_documents(data)[1])
    else:
        rows = split_rows(data, pair.skill).test[:KL_ROWS]
        own = [encode_row(tokenizer, row) for row in rows]
    neutral = {
        name: _text_sequences(tokenizer, read_documents(data / "base" / file))
        for name, file in NEUTRAL_TEXTS.items()
    }
    return {"own": own, **neutral}


def write_reference(live: LiveModel, pair: Pair, tuned: Path, data: Path, out: Path) -> None:
    """Tuned's hidden states on everything that a pair is measured on."""
    with live.holding(load_file(tuned / "model.safetensors")):
        hidden = {name: live.hidden(s) for name, s in sequences_of(live, pair, data).items()}
    save_file(hidden, out)


def measure(
    live: LiveModel, pair: Pair, tuned: Path, reference: Path, state: State, data: Path
) -> dict[str, Any]:
    """Exact matches (loss for a pair of text), and KL(tuned ‖ state) in and out of the domain."""
    expected = load_file(reference)
    head = load_file(tuned / "model.safetensors")["model.embed_tokens.weight"].float()
    result: dict[str, Any] = {}
    with live.holding(state):
        for name, sequences in sequences_of(live, pair, data).items():
            distance = divergence((expected[name], head), (live.hidden(sequences), live.head))
            result[name] = vars(distance)
            if name == "own" and pair.skill is None:
                result["loss"] = float(token_losses(live, sequences).mean())
        if pair.skill is not None:
            result["exact_match"] = matches(live, split_rows(data, pair.skill).test)
    return result


def write_chat_answers(live: LiveModel, out: Path) -> None:
    """The target's own answers to FACTS as rows; states are compared with it on them."""
    prompts = [_chat_prompt(live.tokenizer, question) for question, _ in FACTS]
    with live.holding({}):
        answers = generate(live.model, live.tokenizer, prompts, tokens=CHAT_TOKENS, whole=False)
        rows = [{"prompt": p, "completion": a or ""} for p, a in zip(prompts, answers, strict=True)]
        hidden = live.hidden(_chat_sequences(live, rows))
    save_file({"hidden": hidden}, out, metadata={"rows": json.dumps(rows)})


def knowledge(live: LiveModel, chat: Path, state: State, data: Path) -> dict[str, float]:
    """What the target knew before: chat answers, spam messages, and solutions of gsm8k.

    Returns:
        chat_right: share of FACTS answered. chat_kl: KL(target ‖ state) per token of the target's
        own answers. spam_auc: of log p(" spam") − log p(" ham"), without examples. gsm8k_loss: nats
        per token of the given solutions.
    """
    from safetensors import safe_open

    with safe_open(chat, "pt") as file:
        rows, expected = json.loads(file.metadata()["rows"]), file.get_tensor("hidden")
    head = live.before["model.embed_tokens.weight"].float()
    with live.holding(state):
        hidden = live.hidden(_chat_sequences(live, rows))
        distance = divergence((expected, head), (hidden, live.head))
        prompts = [row["prompt"] for row in rows]
        answers = generate(live.model, live.tokenizer, prompts, tokens=CHAT_TOKENS, whole=False)
        right = [_is_right(a or "", words) for a, (_, words) in zip(answers, FACTS, strict=True)]
        solutions = read_rows(data / "gsm8k" / "test.jsonl")[:GSM8K_ROWS]
        losses = token_losses(live, [encode_row(live.tokenizer, row) for row in solutions])
        return {
            "chat_right": sum(right) / len(right),
            "chat_kl": distance.kl_mean,
            "spam_auc": _spam_auc(live, read_rows(data / "sms_spam" / "test.jsonl")),
            "gsm8k_loss": float(losses.mean()),
        }


def lora_state(live: LiveModel, folder: Path) -> dict[str, Tensor]:
    """W + scale · B A of every adapted matrix, float32: what an unmerged adapter computes."""
    config = json.loads((folder / "adapter_config.json").read_text())
    power = 0.5 if config["use_rslora"] else 1.0
    scale = config["lora_alpha"] / config["r"] ** power
    adapter = load_file(folder / "adapter_model.safetensors")
    state = {}
    for name, left in adapter.items():
        if name.endswith(".lora_B.weight"):
            right = adapter[name.replace(".lora_B.", ".lora_A.")].float()
            weight = name.removeprefix("base_model.model.").replace(".lora_B.weight", ".weight")
            state[weight] = live.before[weight].float() + scale * (left.float() @ right)
    return state


def read_state(live: LiveModel, file: Path) -> dict[str, Tensor]:
    """The state of a pack, of a LoRA adapter's folder or of a checkpoint's."""
    if (file / "adapter_config.json").is_file():
        return lora_state(live, file)
    if file.is_dir():
        return load_file(file / "model.safetensors")
    pack = SkillPack.load(file)
    return {name: pack.decode(name, tensor) for name, tensor in live.before.items()}


def _batches(sequences: Sequences) -> Iterator[list[int]]:
    """Indices of sequences of like length, at most BATCH_TOKENS padded tokens together."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index][0]))
    batch: list[int] = []
    for index in order:
        if batch and len(sequences[index][0]) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _text_sequences(tokenizer: Any, documents: Sequence[str]) -> Sequences:
    """The beginnings of documents in turn, until there are TEXT_SEQUENCES; every token counts."""
    pieces = [token_sequences(tokenizer, [text], TEXT_TOKENS) for text in documents]
    picked = [p[i] for i in range(TEXT_SEQUENCES) for p in pieces if i < len(p)]
    return [(ids, 1) for ids in picked[:TEXT_SEQUENCES]]


def _chat_prompt(tokenizer: Any, question: str) -> str:
    turns = [{"role": "user", "content": question}]
    prompt: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return prompt


def _is_right(answer: str, words: str) -> bool:
    return any(word in answer.lower() for word in words.split("|"))


def _chat_sequences(live: LiveModel, rows: Sequence[Row]) -> Sequences:
    encoded = [encode_row(live.tokenizer, row) for row in rows]
    return [(ids[:-1], start) for ids, start in encoded]  # answers may be cut: no end token


def _spam_auc(live: LiveModel, rows: Sequence[Row]) -> float:
    """Share of pairs of a spam and a ham message that are in the right order."""
    words = ("spam", "ham")
    labels = [live.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in words]
    scores = []
    for label in words:
        chosen = [row for row in rows if row["completion"].strip() == label][:SPAM_ROWS]
        encoded = [encode_row(live.tokenizer, row) for row in chosen]
        hidden = live.hidden([(ids[: start + 1], start) for ids, start in encoded])
        with torch.autocast("cpu", enabled=False):
            logits = hidden @ live.head[labels].T
        scores.append(logits[:, 0] - logits[:, 1])
    spam, ham = scores
    order = spam[:, None] - ham[None, :]
    return float(((order > 0).float() + 0.5 * (order == 0)).mean())


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).parents[2]
    shared = Path(os.environ.get("GRAFTKIT_SHARED", root.parent / "shared"))
    parser.add_argument("--work", type=Path, default=root / "benchmarks" / "out" / "real")
    parser.add_argument("--shared", type=Path, default=shared, help="folder of the data")
    parser.add_argument("--knowledge", action="store_true", help="also what the target knew")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("pair", choices=[pair.name for pair in all_pairs()])
    parser.add_argument("state")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    work, data = options.work, options.shared / "data" / "llm"
    pair = next(pair for pair in all_pairs() if pair.name == options.pair)
    live = LiveModel(work / pair.target)
    tuned = work / pair.tuned
    file = tuned if options.state == "tuned" else Path(options.state)
    state = read_state(live, file)
    reference = work / f"reference-{pair.name}.safetensors"
    result = measure(live, pair, tuned, reference, state, data)
    if options.knowledge:
        result |= knowledge(live, work / "chat-answers.safetensors", state, data)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
