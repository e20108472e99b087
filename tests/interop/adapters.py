"""PEFT adapters of tiny models, made by PEFT itself, with random factors."""

import json
import shutil
import warnings

import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, inputs

from graftkit.models import load_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def make_adapter(folder, architecture, dtype=torch.float32, seed=0, **options):
    """Folders of a target and of an adapter of it whose every number is random."""
    target, adapter = folder / "target", folder / "adapter"
    if not target.exists():
        build(architecture, dtype).save_pretrained(target)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load_model(target), peft.LoraConfig(**settings))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(0.1 * noise.to(parameter.dtype))
        model.save_pretrained(adapter)
    return target, adapter


def peft_model(target, adapter, dtype="auto"):
    """The target with the adapter on it, as PEFT loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", peft.utils.warning.PeftWarning)
        return peft.PeftModel.from_pretrained(load_model(target, dtype), adapter).eval()


def logits(model):
    with torch.no_grad():
        return model(**inputs()).logits


def tensors_of(adapter):
    return load_file(adapter / WEIGHTS)


def changed(adapter, to, settings=(), tensors=()):
    """A copy of an adapter with other settings or tensors; a tensor that is None is dropped."""
    shutil.copytree(adapter, to)
    config = json.loads((adapter / CONFIG).read_text()) | dict(settings)
    (to / CONFIG).write_text(json.dumps(config))
    merged = tensors_of(adapter) | dict(tensors)
    save_file({k: v.contiguous() for k, v in merged.items() if v is not None}, to / WEIGHTS)
    return to
