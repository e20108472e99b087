"""A source of another architecture and another vocabulary than the target, and words for both."""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from graftkit.rows import Row

SPECIAL = ["<pad>", "<eos>"]
TEXTS = [
    "the cat sat on the mat",
    "the cat sat on the sofa",
    "a dog sat on the cat",
    "seven dogs and 12 cats",
    "naïve café, 汉字 and 😀",
]
ROWS = [
    *(Row("who sat?", f" {text}") for text in TEXTS),
    Row("count:", " 1 2 12 7 77"),
    Row("a much longer prompt than the others, " * 2, " the end"),
    Row("nothing", ""),
]


def byte_level(merges: int, special: int = 2) -> Any:
    """A byte-level tokenizer with so many merges, learned from TEXTS; `special` ids come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    named = SPECIAL + [f"<extra{index}>" for index in range(special - len(SPECIAL))]
    trainer = trainers.BpeTrainer(
        vocab_size=len(named) + 256 + merges,
        special_tokens=named,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator([f" {text}" for text in TEXTS] * 3, trainer)
    return _fast(tokenizer)


def sentence_pieces(pieces: list[str]) -> Any:
    """A tokenizer in SentencePiece's manner: ▁ for blanks, the longest piece, bytes else."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [(name, float(len(name)) if name in pieces else -20.0) for name in names]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return _fast(tokenizer)


def _fast(tokenizer: Tokenizer) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def gpt2(tokenizer: Any, context: int = 64, seed: int = 0) -> Any:
    """A random GPT-2 of three layers, 24 wide."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=context,
        n_embd=24,
        n_layer=3,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def llama(tokenizer: Any, seed: int = 1) -> Any:
    """A random Llama of two layers, 32 wide."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()
