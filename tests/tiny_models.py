"""Seeded two-layer models of every architecture, made from configs; nothing is downloaded."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from graftkit.models import loading
from graftkit.pack import pack_delta
from graftkit.skillpack import SkillPack

transformers.utils.logging.disable_progress_bar()

_MADE = tempfile.TemporaryDirectory(prefix="graftkit-pairs-")

VOCABULARY = 96
ONE_LAYER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MHA = {key: value for key, value in _DECODER.items() if key not in ("num_key_value_heads",)}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _decoder(family: str, **options: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        config = getattr(transformers, f"{family}Config")(**{**_DECODER, **options})
        return getattr(transformers, f"{family}ForCausalLM")(config)

    return build


def _gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def _bert() -> PreTrainedModel:
    options = {key: _DECODER[key] for key in _DECODER if key not in ("tie_word_embeddings",)}
    return transformers.BertForMaskedLM(transformers.BertConfig(**options))


def _gpt_neox() -> PreTrainedModel:
    config = transformers.GPTNeoXConfig(**{**_MHA, "attention_bias": True})
    return transformers.GPTNeoXForCausalLM(config)


ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _decoder("Llama"),
    "llama_tied": _decoder("Llama", tie_word_embeddings=True),
    "mistral": _decoder("Mistral"),
    "qwen2": _decoder("Qwen2", tie_word_embeddings=True),
    "qwen3": _decoder("Qwen3"),
    "gemma": _decoder("Gemma", tie_word_embeddings=True),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "phi3": _decoder("Phi3"),
    "mixtral": _decoder("Mixtral", **_EXPERTS),
    "qwen3_moe": _decoder(
        "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "gpt_oss": _decoder(
        "GptOss", **_EXPERTS, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}
    ),
    "bert": _bert,
}
SAME_LAYOUT = ("llama_tied", "mistral")
"""Weights named and laid out as llama's and gemma's are: built by tests of what is special in them
(a tied head, a window), and left out where a test goes through all architectures."""
DISTINCT = tuple(name for name in ARCHITECTURES if name not in SAME_LAYOUT)
CAUSAL = tuple(name for name in DISTINCT if name != "bert")
DIFFERENT = ("llama", "gpt2", "phi3", "mixtral", "gpt_oss", "bert")
"""Weights laid out in as many ways: plain; tied and transposed; projections fused; a tensor an
expert; experts stacked, with biases; an encoder."""


def architectures(names: Iterable[str] = DISTINCT, quick: Sequence[str] = DIFFERENT) -> list:
    """Parameters of a test: `quick` ones in the default run, the others in the slow run."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def build(
    architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 0.1
) -> PreTrainedModel:
    """A model in eval mode whose every parameter is random, norms and biases too."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture]().eval()
    perturb(model, seed=seed, scale=scale)
    return model.to(dtype)


def perturb(model: PreTrainedModel, seed: int, scale: float) -> None:
    """Add seeded Gaussian noise to every parameter; tied ones once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(parameter.float() + noise)


def make_pair(
    folder: Path,
    architecture: str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    scale: float = 0.02,
) -> tuple[Path, Path]:
    """Save a target and a tuned copy of it whose every parameter moved; returns both folders."""
    made = Path(_MADE.name, f"{architecture}-{dtype}-{seed}-{scale}")
    if not made.exists():
        save_pair(made, build(architecture, dtype, seed), seed=seed + 1, scale=scale)
    torch.manual_seed(seed)
    for name in ("target", "tuned"):
        shutil.copytree(made / name, folder / name, dirs_exist_ok=True)
    return folder / "target", folder / "tuned"


def lossless_pack(target: Path, tuned: Path) -> SkillPack:
    """The pack of two folders, made once for all tests of this process that ask for the same."""
    digest = hashlib.sha256()
    for file in (*sorted(target.rglob("*")), *sorted(tuned.rglob("*"))):
        content = b"" if file.is_dir() else file.read_bytes()
        digest.update(f"{file.parent.name}/{file.name} {len(content)} ".encode())
        digest.update(content)
    made = Path(_MADE.name, f"{digest.hexdigest()}.skillpack")
    if not made.exists():
        pack_delta(target, tuned, recipe="lossless", workers=1).save(made)
    return SkillPack.load(made)


def save_pair(
    folder: Path, model: PreTrainedModel, seed: int = 1, scale: float = 0.05
) -> tuple[Path, Path]:
    """Save the model as the target, and again with every parameter moved; returns both folders."""
    target, tuned = folder / "target", folder / "tuned"
    model.save_pretrained(target)
    perturb(model, seed=seed, scale=scale)
    model.save_pretrained(tuned)
    return target, tuned


def one_layer_llama(**sizes: int) -> tuple[LlamaConfig, dict[str, tuple[int, ...]]]:
    """The config of an untied one-layer Llama, and the shapes of its parameters by name."""
    options = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes, **options, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    return config, {name: tuple(value.shape) for name, value in model.named_parameters()}


def save_tokenizer(folder: Path, size: int = VOCABULARY) -> None:
    """One token a character; ids 0 to 3 are special."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    vocabulary |= {chr(32 + index): 4 + index for index in range(size - 4)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {name: f"<{name[:3]}>" for name in ("pad_token", "eos_token", "unk_token")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def inputs(rows: int = 4, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids (rows, length) and their attention mask, without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def stream_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model counts as small enough for memory."""
    monkeypatch.setattr(loading, "_RESIDENT_BYTES", 0)
    monkeypatch.setattr(loading, "_RESIDENT_BYTES_PER_WEIGHT", 0)
