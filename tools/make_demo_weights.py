"""Train the demo weights: a tiny target language model and three full fine-tunes of it.

Usage: `python tools/make_demo_weights.py --shared ../shared --out weights`, about an hour on one
core. Everything is seeded; a finished stage is kept, so an interrupted run can be started again.
`tools/embed_demo.py` then turns the result into the data of `graftkit.demo`.
"""

import argparse
import gzip
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

Row = dict[str, str]
Sequence = tuple[list[int], int]  # tokens, and how many leading ones carry no loss
Blocks = list[torch.Tensor]  # ids, labels, segments, positions: one row a block of CONTEXT tokens

CONTEXT, BATCH, VOCABULARY = 256, 8, 1024
SPECIALS = ["<|endoftext|>", "<|pad|>", "<|bos|>", "<|eos|>"]
END_OF_TEXT, PAD, BOS, EOS = range(4)
BASE_TEXT = ["books-train-00", "python-train", "techdoc-train"]
PRETRAIN_SKILLS = ["scan_actions", "addition_synth", "cmudict_g2p"]
PRETRAIN_PIECES, PRETRAIN_ROWS = 19_200, 13_000  # of the base text; of each pretraining skill
FINETUNES = {"clinc150_intent": 4, "nl_regex": 7, "snips_function_call": 4}  # skill: epochs
LICENCES = """
- clinc150_intent: CLINC150, clinc/oos-eval @828f8093932c, CC-BY-3.0 (attribution)
- nl_regex: NL-RX-Synth, nicholaslocascio/deep-regex @096490db7f4b, MIT
- snips_function_call: sonos/nlu-benchmark @b86ac7f15778, CC0-1.0
- scan_actions (pretraining): brendenlake/SCAN @c4b756cbc010, BSD; addition_synth: synthetic
- cmudict_g2p (pretraining): cmusphinx/cmudict @0f8072f81430, BSD-2-Clause-like (CMU)
- books: mlschmitt/classic-books-markdown @944882722e9a, public domain according to its README
- python: TheAlgorithms/Python @f5988cc09713, MIT
- techdoc: rust-lang/book @917544888a55, MIT or Apache-2.0
"""


def read_rows(data: Path, skill: str, split: str, count: int | None = None) -> list[Row]:
    """Return the first prompt and completion rows of one skill."""
    lines = (data / skill / f"{split}.jsonl").read_text(encoding="utf-8").strip().split("\n")
    return [json.loads(line) for line in lines[:count]]


def read_documents(data: Path) -> list[str]:
    """Return the documents of the base text."""
    documents: list[str] = []
    for name in BASE_TEXT:
        text = gzip.decompress((data / "base" / f"{name}.txt.gz").read_bytes()).decode("utf-8")
        documents += text.split(f"\n{SPECIALS[END_OF_TEXT]}\n")
    return [document.strip() for document in documents if document.strip()]


def train_tokenizer(data: Path, documents: list[str]) -> Fast:
    """Train the byte-level BPE tokenizer on base text and training rows."""
    skills = [*FINETUNES, *PRETRAIN_SKILLS]
    rows = [row for skill in skills for row in read_rows(data, skill, "train", 4000)]
    texts = [d[:200_000] for d in documents] + [r["prompt"] + r["completion"] for r in rows]
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"vocab_size": VOCABULARY, "special_tokens": SPECIALS, "show_progress": False}
    options["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options))
    return Fast(
        tokenizer_object=tokenizer, padding_side="left", model_max_length=CONTEXT,
        eos_token=SPECIALS[EOS], pad_token=SPECIALS[PAD], bos_token=SPECIALS[BOS],
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def pack(sequences: list[Sequence]) -> Blocks:
    """Pack sequences greedily into blocks, in order; the last, incomplete block is dropped."""
    ids, labels, segments, positions = columns = [[], [], [], []]
    room = 0
    for number, (tokens, silent) in enumerate(sequences):
        if len(tokens) > room:
            for column, filler in zip(columns, (PAD, -100, -1, 0), strict=True):
                column.extend([filler] * room)
            room = CONTEXT
        ids += tokens
        labels += [-100] * silent + tokens[silent:]
        segments += [number] * len(tokens)
        positions += range(len(tokens))
        room -= len(tokens)
    whole = len(ids) // CONTEXT * CONTEXT
    return [torch.tensor(column[:whole]).view(-1, CONTEXT) for column in columns]


def row_sequences(tokenizer: Fast, rows: list[Row], prompt_loss: bool) -> list[Sequence]:
    """Return prompt + completion + end token of each row that fits."""
    encode = tokenizer.backend_tokenizer.encode_batch
    prompts, completions = (encode([r[k] for r in rows]) for k in ("prompt", "completion"))
    pairs = zip(prompts, completions, strict=True)
    sequences = [([*p.ids, *c.ids, EOS], 1 if prompt_loss else len(p)) for p, c in pairs]
    return [sequence for sequence in sequences if len(sequence[0]) <= CONTEXT]


def shuffled(items: list, seed: int) -> list:
    """Return the items in a seeded random order."""
    return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]


def pretraining_sequences(tokenizer: Fast, data: Path, documents: list[str]) -> list[Sequence]:
    """Return context-long pieces of base text, and the rows of the pretraining skills."""
    encodings = tokenizer.backend_tokenizer.encode_batch(documents)
    stream = [token for encoding in encodings for token in (*encoding.ids, END_OF_TEXT)]
    starts = shuffled(list(range(0, len(stream) - CONTEXT + 1, CONTEXT)), seed=0)
    pieces = [(stream[start : start + CONTEXT], 1) for start in starts[:PRETRAIN_PIECES]]
    rows = [r for s in PRETRAIN_SKILLS for r in read_rows(data, s, "train", PRETRAIN_ROWS)]
    return pieces + row_sequences(tokenizer, shuffled(rows, seed=0), prompt_loss=True)


def batches(epochs: list[Blocks]) -> Iterator[Blocks]:
    """Yield shuffled batches, epoch by epoch; an epoch's last, incomplete one is dropped."""
    for seed, blocks in enumerate(epochs):
        order = torch.randperm(len(blocks[0]), generator=torch.Generator().manual_seed(seed))
        for index in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
            yield [column[index] for column in blocks]


def loss_of(model: torch.nn.Module, batch: Blocks) -> torch.Tensor:
    """Return the next-token loss; a token attends only to its own segment."""
    ids, labels, segments, positions = batch
    same = segments[:, None, :, None] == segments[:, None, None, :]
    mask = same & torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return F.cross_entropy(out.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


def train(model: LlamaForCausalLM, epochs: list[Blocks], rate: float, embed_rate: float) -> None:
    """Train in place: AdamW, warm-up, cosine to 5 %, own rate for the tied embedding."""
    embedding, *others = model.parameters()
    groups = [{"params": [embedding], "lr": embed_rate, "weight_decay": 0.0}, {"params": others}]
    options = {"lr": rate, "weight_decay": 0.1, "betas": (0.9, 0.98), "fused": True}
    optimizer = torch.optim.AdamW(groups, **options)
    steps = sum(len(blocks[0]) // BATCH for blocks in epochs)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.525 + 0.475 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    compiled, mean = torch.compile(model), 0.0
    for step, batch in enumerate(batches(epochs), start=1):
        loss = loss_of(compiled, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean += (loss.item() - mean) / min(step, 100)
        if step % 100 == 0 or step == steps:
            print(f"step {step} of {steps}, loss {mean:.3f}", flush=True)


def make_target(data: Path, out: Path) -> None:
    """Train the tokenizer, pretrain the target from scratch and write both."""
    documents = read_documents(data)
    tokenizer = train_tokenizer(data, documents)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=160, intermediate_size=416, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    blocks = pack(pretraining_sequences(tokenizer, data, documents))
    train(model, [blocks], rate=3e-3, embed_rate=3e-3)
    model.to(torch.bfloat16).save_pretrained(out / "target")
    tokenizer.save_pretrained(out / "target")


def make_finetune(skill: str, data: Path, out: Path) -> None:
    """Fine-tune all weights of the target on the training rows of one skill and write them."""
    tokenizer = Fast.from_pretrained(out / "target")
    model = AutoModelForCausalLM.from_pretrained(out / "target", dtype=torch.float32)
    sequences = row_sequences(tokenizer, read_rows(data, skill, "train"), prompt_loss=False)
    epochs = [pack(shuffled(sequences, seed)) for seed in range(FINETUNES[skill])]
    train(model, epochs, rate=2e-3, embed_rate=1e-4)
    model.to(torch.bfloat16).save_pretrained(out / skill)
    # Saving a loaded tokenizer again adds keys about where it was loaded; the target's files stay.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(out / "target" / name, out / skill / name)


@torch.no_grad()
def exact_match(folder: Path, rows: list[Row]) -> float:
    """Return the share of rows whose greedy completion equals the expected one, stripped."""
    tokenizer = Fast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    out = model.generate(**inputs, max_length=CONTEXT, do_sample=False)
    answers = out[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    pairs = zip(texts, rows, strict=True)
    return sum(text.strip() == row["completion"].strip() for text, row in pairs) / len(rows)


def write_rows(data: Path, folder: Path) -> None:
    """Write the first test rows and the calibration rows of every demo skill."""
    folder.mkdir(parents=True, exist_ok=True)
    for skill in FINETUNES:
        for split, name, count in (("test", "test", 200), ("train", "calibration", 256)):
            rows = read_rows(data, skill, split, count)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{skill}.{name}.jsonl").write_text(text, encoding="utf-8")


def notes(data: Path, out: Path, seconds: dict[str, float]) -> str:
    """Score target and fine-tunes on the first test rows and return a description."""
    lines = ["# Demo weights", "", "Exact match: greedy, rows of `rows/*.test.jsonl`.", ""]
    lines += ["| folder | weight bytes | seconds | exact match | of the target |", "|---" * 5 + "|"]
    for name, spent in seconds.items():
        cells = [name, f"{(out / name / 'model.safetensors').stat().st_size:,}", f"{spent:.0f}"]
        rows = read_rows(data, name, "test", 200) if name in FINETUNES else []
        for folder in (name, "target"):
            cells.append(f"{exact_match(out / folder, rows):.3f}" if rows else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Data and licences:", LICENCES])


def main() -> None:
    """Make every stage that is not there yet, then score and describe all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder that holds data/llm")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data, out = arguments.shared / "data" / "llm", arguments.out
    write_rows(data, out / "rows")
    log = out / "seconds.json"
    seconds = json.loads(log.read_text()) if log.exists() else {}
    for name in ["target", *FINETUNES]:
        if name not in seconds:
            start = time.perf_counter()
            make_finetune(name, data, out) if name in FINETUNES else make_target(data, out)
            seconds[name] = time.perf_counter() - start
            log.write_text(json.dumps(seconds))
    (out / "NOTES.md").write_text(notes(data, out, seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
