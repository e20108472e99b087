from dataclasses import dataclass
from pathlib import Path

import commands
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, lossless_pack, perturb, save_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from graftkit.pack import pack_delta
from graftkit.skillpack import SkillPack

SKILLS = 3
RANK = 2


@dataclass(frozen=True)
class Skills:
    """A tiny bf16 target, tuned copies of it and their packs; never written.

    Attributes:
        tuned: copies whose every weight moved a little, and every matrix more along two directions.
        exact: lossless packs.
        lossy: packs of an eighth of the target's size, with low-rank matrices.
    """

    target: Path
    tuned: list[Path]
    exact: list[SkillPack]
    lossy: list[SkillPack]


@pytest.fixture(scope="session")
def skills(tmp_path_factory: pytest.TempPathFactory) -> Skills:
    folder = tmp_path_factory.mktemp("skills")
    # Matrices of at least 4,096 weights, so that they are not all stored exactly.
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    perturb(model, seed=0, scale=0.1)
    target, tuned = folder / "target", [folder / f"skill-{index}" for index in range(SKILLS)]
    model.bfloat16().save_pretrained(target)
    save_tokenizer(target)
    for index, path in enumerate(tuned):
        save_tuned(target, path, index)
    exact = [lossless_pack(target, path) for path in tuned]
    lossy = [pack_delta(target, path, budget="12%", workers=1) for path in tuned]
    return Skills(target, tuned, exact, lossy)


def save_tuned(target: Path, path: Path, seed: int) -> None:
    path.mkdir()
    for file in target.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(target / "model.safetensors")
    for name, weight in weights.items():
        delta = 0.02 * torch.randn(weight.shape, generator=generator)
        if weight.dim() == 2:
            delta *= 0.05
            left = torch.randn(weight.shape[0], RANK, generator=generator)
            delta += 0.02 * left @ torch.randn(RANK, weight.shape[1], generator=generator)
        weights[name] = (weight.float() + delta).bfloat16()
    save_file(weights, path / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def files(skills, tmp_path_factory):
    """The lossy packs as files."""
    folder = tmp_path_factory.mktemp("packs")
    names = [folder / f"skill-{index}.skillpack" for index in range(SKILLS)]
    for file, pack in zip(names, skills.lossy, strict=True):
        pack.save(file)
    return names


@pytest.fixture
def run(capsys):
    """Exit code, stdout and stderr of one command in this process."""

    def command(*arguments):
        capsys.readouterr()
        code = commands.run(*arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command
