"""The files of a model directory that hold its weights, or what else a directory without any is.

The files are those that `from_pretrained` of transformers 5 would load
(`modeling_utils._get_resolved_checkpoint_files`): the file that config.json names under
`transformers_weights`, else model.safetensors, else the shards of its index. Other files beside
them, such as the index or the shards of an earlier save, are ignored.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftkit.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_ZERO = ("global_step*", "zero_to_fp32.py", "zero_pp_rank_*", "*_optim_states.pt")
_OTHER_FRAMEWORKS = {
    "*.h5": "TensorFlow",
    "saved_model.pb": "TensorFlow",
    "*.ckpt.index": "TensorFlow",
    "*.msgpack": "Flax",
    "*.onnx": "ONNX",
}


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Every weight file of a directory with the tensors that its index promises (None: no index).

    Raises: CheckpointError for a broken index, a missing file, an adapter, and for a directory
        without weights that transformers would load, which says what it holds instead.
    """
    _refuse_adapter(folder)
    named = _explicit_file(folder)
    if named is not None:
        return _shards(named) if named.name.endswith(".index.json") else {named: None}
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if (folder / INDEX).is_file():
        return _shards(folder / INDEX)
    raise CheckpointError(describe_weightless(folder))


def describe_weightless(folder: Path) -> str:
    """One line that says what a directory without weights is, and what to do."""
    for describe in _DESCRIPTIONS:
        text = describe(folder)
        if text is not None:
            return text
    return f"{folder}: no {SINGLE} here; expected a Hugging Face model directory"


def describe_file(file: Path) -> str:
    """One line about a file where a directory is expected."""
    if file.suffix == ".gguf":
        return f"{file}: {_GGUF}"
    if file.suffix == ".safetensors":
        return f"{file}: a file; name the model directory that holds it, {file.parent}"
    return f"{file}: a file; expected a Hugging Face model directory or a Hub id (user/name)"


def _refuse_adapter(folder: Path) -> None:
    """An adapter alone is no model; beside a model, transformers would load both of them."""
    if not _has(folder, ADAPTER_CONFIG, "adapter_model.*"):
        return
    if (folder / "config.json").is_file() and _has(folder, SINGLE, INDEX):
        if not (folder / ADAPTER_CONFIG).is_file():
            return
        raise CheckpointError(
            f"{folder}: holds a model and a PEFT adapter ({ADAPTER_CONFIG}), and transformers "
            "loads both together; save the result of merge_and_unload, or keep them in two folders"
        )
    raise CheckpointError(
        f"{folder}: a PEFT adapter, no whole model; make a pack of it with graftkit import-lora "
        "TARGET ADAPTER, or save the result of merge_and_unload and pack that"
    )


def _explicit_file(folder: Path) -> Path | None:
    """The file that config.json names under `transformers_weights`, None where it names none.

    Raises: CheckpointError where that file is missing or not safetensors.
    """
    try:
        name = json.loads((folder / "config.json").read_text("utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    file = _inside(folder, name, folder / "config.json")
    if not file.is_file() or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers_weights names {name}, expected a safetensors "
            "file in this folder; correct it"
        )
    return file


def _shards(index: Path) -> dict[Path, set[str] | None]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error!r})") from error
    shards: dict[Path, set[str]] = {}
    for name, file in entries:
        shards.setdefault(_inside(index.parent, file, index), set()).add(name)
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(
                f"{shard}: this shard is listed in {index.name} but missing; download it again"
            )
    return dict(shards)


def _inside(folder: Path, name: str, where: Path) -> Path:
    """A file of the folder by its relative name. Raises: CheckpointError for any other path."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{where}: names {name}, expected a file in this folder; download it again"
        )
    return folder / name


_GGUF = (
    "GGUF, a file of llama.cpp that is mostly quantized; use the unquantized model's Hugging Face "
    "directory (safetensors)"
)


def _diffusers(folder: Path) -> str | None:
    if not (folder / "model_index.json").is_file():
        return None
    return (
        f"{folder}: a diffusers pipeline; graftkit packs single transformers models, so name the "
        "folder of one of its parts, such as text_encoder"
    )


def _sentence_transformers(folder: Path) -> str | None:
    """modules.json lists the parts; the first one is the transformer."""
    try:
        parts: list[dict[str, Any]] = json.loads((folder / "modules.json").read_text("utf-8"))
        names = [str(part["path"]) for part in parts if part.get("path")]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    models = [name for name in names if _is_model(folder / name)]
    if not models:
        return None
    return (
        f"{folder}: a sentence-transformers model whose transformer lies in a folder of its own; "
        f"name {folder / models[0]}"
    )


def _gguf(folder: Path) -> str | None:
    files = _matches(folder, "*.gguf")
    return f"{files[0]}: {_GGUF}" if files else None


def _fsdp(folder: Path) -> str | None:
    files = _matches(folder, "*.distcp", "*/*.distcp")
    if not files:
        return None
    return (
        f"{files[0].parent}: sharded weights of FSDP (.distcp); write them as one model first: "
        "accelerate merge-weights, then save_pretrained"
    )


def _deepspeed(folder: Path) -> str | None:
    if not _matches(folder, *_ZERO):
        return None
    return (
        f"{folder}: a sharded state of DeepSpeed; make whole weights of it first "
        "(zero_to_fp32.py --safe_serialization), then save_pretrained"
    )


def _training_run(folder: Path) -> str | None:
    steps = [path for path in _matches(folder, "checkpoint-*") if path.is_dir()]
    numbered = [path for path in steps if path.name.rpartition("-")[2].isdigit()]
    if not numbered:
        return None
    last = max(numbered, key=lambda path: int(path.name.rpartition("-")[2]))
    return (
        f"{folder}: a training run that holds {len(numbered)} checkpoint folders and no model of "
        f"its own; name one of them, such as {last}"
    )


def _pickle(folder: Path) -> str | None:
    files = _matches(folder, *_PICKLES)
    if not files:
        return None
    return (
        f"{files[0]}: a pickle checkpoint can run code and is not read; save the model "
        "as safetensors first (model.save_pretrained)"
    )


def _other_framework(folder: Path) -> str | None:
    for pattern, framework in _OTHER_FRAMEWORKS.items():
        files = _matches(folder, pattern)
        if files:
            return (
                f"{files[0]}: weights of {framework}; expected {SINGLE}: save the model from "
                "PyTorch as safetensors (model.save_pretrained)"
            )
    return None


def _loose(folder: Path) -> str | None:
    files = _matches(folder, "*.safetensors")
    if not files:
        return None
    return (
        f"{folder}: holds {files[0].name}, but neither {SINGLE} nor {INDEX}, and transformers "
        f"loads no other; save the model with save_pretrained, or rename the file to {SINGLE} if "
        "it is the whole model"
    )


def _models_below(folder: Path) -> str | None:
    models = [path for path in _matches(folder, "*") if path.is_dir() and _is_model(path)]
    return f"{folder}: no model here; there is one in {models[0]}, name that" if models else None


_DESCRIPTIONS: tuple[Callable[[Path], str | None], ...] = (
    _diffusers,
    _sentence_transformers,
    _gguf,
    _fsdp,
    _deepspeed,
    _training_run,
    _pickle,
    _other_framework,
    _loose,
    _models_below,
)


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and _has(folder, SINGLE, INDEX)


def _matches(folder: Path, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _has(folder: Path, *patterns: str) -> bool:
    return bool(_matches(folder, *patterns))
