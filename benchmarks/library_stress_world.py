"""What library_stress.py attacks: a tiny random target and packs of it."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftkit.checkpoint import Checkpoint
from graftkit.models.loading import load_model
from graftkit.models.text import usable_tokenizer
from graftkit.pack import pack_delta
from graftkit.route.centroid import fit_key

LETTERS = ("0123456789", "ABCDEFGHIJ", "klmnopqrst", "!#$%&()*+-")


def make_world(folder: Path) -> tuple[Path, list[Path]]:
    """A tiny target and eight different packs of it, some with router keys."""
    target = folder / "target"
    model = tiny_model()
    model.save_pretrained(target)
    save_tokenizer(target)
    live, tokenizer = load_model(target), usable_tokenizer(Checkpoint.open(target))
    files = []
    for seed, letters in enumerate(LETTERS):
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        tuned = tiny_model()
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        tuned.save_pretrained(folder / letters[0])
        pack = pack_delta(target, folder / letters[0], recipe="lossless", workers=1)
        prompts = ["".join(draw.choices(letters, k=8)) for _ in range(30)]
        for name, kept in (
            ("plain", pack),
            ("keyed", fit_key(live, tokenizer, prompts).into(pack)),
        ):
            files.append(folder / f"{letters[0]}-{name}.skillpack")
            kept.save(files[-1])
    return target, files


def tiny_model() -> LlamaForCausalLM:
    """Random, two layers, 96 tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(num_attention_heads=4, max_position_embeddings=64, **sizes, **ids)
    return LlamaForCausalLM(config).eval()


def save_tokenizer(folder: Path) -> None:
    """One token a character."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    vocabulary |= {chr(33 + index): 4 + index for index in range(92)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {name: f"<{name[:3]}>" for name in ("pad_token", "eos_token", "unk_token")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
