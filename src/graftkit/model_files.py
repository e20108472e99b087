"""The files of a model directory: those that hold its weights, and the side files beside them.

Weight files are those that `from_pretrained` of transformers 5 would load
(`modeling_utils._get_resolved_checkpoint_files`): the file that config.json names under
`transformers_weights`, else model.safetensors, else the shards of its index. Other files beside
them, such as the index or the shards of an earlier save, are ignored.

Of the side files a pack holds those that decide how text, images or sound become tensors, how a
model is built and how it generates, where the tuned model's differ from the target's. A checkpoint
that graftkit writes gets a copy of every file of the target that holds no weights.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from graftkit.errors import CheckpointError
from graftkit.files import is_work_folder

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


SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    # Vocabularies of other tokenizers of transformers.
    "audio_tokenizer_config.json",
    "bpe.codes",
    "byte_maps.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "normalizer.json",
    "params.json",
    "target_vocab.json",
    "tekken.json",
    "tokenizer.model.v3",
    "tokenizer.model.v7",
    "vocab-src.json",
    "vocab-tgt.json",
    "word_pronunciation.json",
    "word_shape.json",
    # Preprocessing of images, sound and video.
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "video_preprocessor_config.json",
    # Sentence encoders.
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
"""Names under which a pack may hold a file, in this order; `is_side_file` adds vocabularies."""

HUB_PATTERNS = (
    *("*.json", "*.txt", "*.model", "*.model.v*", "*.jinja", "*.spm", "*.tiktoken", "*.bpe"),
    *("*.codes", "*.vocab", "*.py", "*.md", "LICENSE*", "LICENCE*", "NOTICE*"),
)
"""Files that are fetched from a Hub repository beside its weights."""

_VOCABULARY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.(model|spm|tiktoken|bpe|vocab|jinja)")
_TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "tokenizer.model.v7",
        "tekken.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "vocab-src.json",
        "vocab-tgt.json",
        "target_vocab.json",
        "entity_vocab.json",
        "merges.txt",
        "bpe.codes",
        "byte_maps.json",
        "dict.txt",
        "emoji.json",
        "normalizer.json",
        "word_pronunciation.json",
        "word_shape.json",
    }
)
_WEIGHTS = re.compile(
    r"(?i)(.*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|joblib|h5|hdf5|keras|msgpack|onnx|onnx_data|"
    r"gguf|ggml|tflite|pb|mlmodel|npz|npy|ot|nemo|engine|plan|trt|llamafile|pdparams|mar|index|"
    r"meta|data-\d+-of-\d+|distcp|skillpack|tmp|pyc|so|dll|dylib|exe)"
    r"|.*\.(safetensors|bin|h5|msgpack)\.index(\..*)?\.json|.*\.onnx[._]data.*"
    r"|.*\.safetensors\..*|adapter_config\.json|trainer_state\.json|checkpoint)"
)
_CODE = re.compile(r"(?i).*\.(py|ipynb|sh|c|cc|cpp|cu|cuh|h|hpp|js)")
_NO_MODEL_FOLDERS = re.compile(
    r"(checkpoint-\d+|global_step\d+|runs|logs|wandb|__pycache__|onnx|openvino|coreml)"
)
_CARD = "README.md"
# Documents and records that are not needed to load a model.
_RECORDS = re.compile(
    r"(?i).*(results|metrics|training_args|trainer|log|requirements|licen[cs]e|notice|readme|"
    r"modelcard|model_card|benchmark|changelog).*"
)
_LOADED_ENDINGS = (".json", ".txt", ".model", ".jinja", ".spm", ".bpe", ".codes", ".vocab")


def is_side_file(name: str) -> bool:
    """Whether a pack may hold a file of this name.

    It may hold those of `SIDE_FILES`, and vocabularies and templates by their ending, which lie in
    the model's own folder.
    """
    return name in SIDE_FILES or _VOCABULARY.fullmatch(name) is not None


def is_tokenizer_file(name: str) -> bool:
    """Whether a side file decides the meaning of token ids."""
    is_other = name in SIDE_FILES or name.endswith(".jinja")
    return name in _TOKENIZER_FILES or (is_side_file(name) and not is_other)


def is_template(name: str) -> bool:
    """Whether a side file shapes conversations only, not the tokens of a plain prompt."""
    return name.endswith(".jinja") or name == "chat_template.json"


class CopiedFiles(Mapping[str, bytes]):
    """Side files of a checkpoint that is written from a target, by name; read on access.

    Args:
        folder: of the target. changed: contents that replace the target's files or are new.
        code: also files of code.
    """

    def __init__(self, folder: Path, changed: Mapping[str, bytes], code: bool = False):
        self._changed = dict(changed)
        self._files = {name: folder / name for name in copied_names(folder, code)}

    def __getitem__(self, name: str) -> bytes:
        return self._changed[name] if name in self._changed else self._files[name].read_bytes()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files.keys() | self._changed.keys()))

    def __len__(self) -> int:
        return len(self._files.keys() | self._changed.keys())


def copied_names(folder: Path, code: bool = False) -> list[str]:
    """Files of a model directory that hold no weights, as paths with "/" relative to it.

    Left out are weights and traces of training in any format, hidden files, folders that hold a
    model, a checkpoint or logs of their own, and links that lead out of the directory (those of
    the Hub's cache, and of files that transformers itself would read, are followed). Code is left
    out unless `code`.
    """
    names = [name for name in _walk(folder, folder) if code or not _CODE.fullmatch(name)]
    return sorted(names)


def code_names(folder: Path) -> list[str]:
    """Files of code that `copied_names` leaves out."""
    return sorted(name for name in _walk(folder, folder) if _CODE.fullmatch(name))


def changed_code(target: Path, tuned: Path) -> list[str]:
    """Files of code that both directories have and that differ."""
    shared = set(code_names(target)) & set(code_names(tuned))
    return sorted(n for n in shared if (target / n).read_bytes() != (tuned / n).read_bytes())


def check_side_files(target: Path, tuned: Path) -> None:
    """Refuse a tuned model with a changed file that a pack cannot hold.

    The target's file would silently take its place.

    Raises: CheckpointError naming the file.
    """
    for name in copied_names(tuned):
        if is_side_file(name) or _RECORDS.fullmatch(name) or not name.endswith(_LOADED_ENDINGS):
            continue
        old = target / name
        if old.is_file() and old.read_bytes() != (tuned / name).read_bytes():
            raise CheckpointError(
                f"{tuned / name}: differs from the target's, and a pack holds no file of that "
                "name; delete it in one of the folders if it is no part of the model"
            )


def config_for_weights(config: bytes, weights: Mapping[str, int]) -> bytes:
    """A config.json that fits newly written weights.

    A dtype in it is kept if some weights have it; otherwise it becomes that of most weights. The
    key `transformers_weights` is removed, as the weights have their usual file name.

    Args:
        weights: number of weights by dtype, as torch names it.
    Returns: the same bytes where nothing has to change.
    """
    try:
        settings = json.loads(config)
    except (ValueError, RecursionError):
        return config
    if not isinstance(settings, dict):
        return config
    named = settings.pop("transformers_weights", None) is not None
    wrong = bool(weights) and _correct_dtypes(settings, weights)
    if not named and not wrong:
        return config
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def card_with_note(card: bytes, note: str) -> bytes:
    """A model card with a note in front of its text, behind its metadata."""
    text = card.decode("utf-8", errors="replace")
    head = re.match(r"---\r?\n.*?\r?\n---\r?\n", text, re.DOTALL)
    cut = head.end() if head else 0
    return f"{text[:cut]}\n> {note}\n\n{text[cut:].lstrip()}".encode()


def files_beside_weights(
    folder: Path,
    changed: Mapping[str, bytes],
    note: str,
    code: bool = False,
) -> CopiedFiles:
    """All side files of a checkpoint that is written from the target in `folder`.

    The target's model card describes the target; a note in front of it says what the checkpoint is.

    Args:
        changed: side files of the tuned model. note: of the card.
    """
    own = CopiedFiles(folder, changed, code)
    noted = dict(changed)
    if _CARD in own:
        noted[_CARD] = card_with_note(own[_CARD], note)
    return CopiedFiles(folder, noted, code)


def _correct_dtypes(settings: Any, weights: Mapping[str, int]) -> bool:
    """Correct the dtypes of a configuration and of those nested in it; whether one was wrong."""
    if not isinstance(settings, dict):
        return False
    wrong = [
        key
        for key in ("dtype", "torch_dtype")
        if isinstance(settings.get(key), str)
        and settings[key].removeprefix("torch.") not in weights
    ]
    common = max(sorted(weights), key=lambda dtype: weights[dtype])
    settings.update(dict.fromkeys(wrong, common))
    inner = [value for key, value in settings.items() if key.endswith("_config")]
    return any([bool(wrong), *(_correct_dtypes(value, weights) for value in inner)])


def _walk(folder: Path, root: Path) -> Iterator[str]:
    for entry in sorted(folder.iterdir()):
        name = entry.relative_to(root).as_posix()
        if entry.name.startswith(".") or not _stays_inside(entry, name, root):
            continue
        if entry.is_dir():
            ours = is_work_folder(entry)  # such as that of a merge into a folder of its target
            if not (ours or _NO_MODEL_FOLDERS.fullmatch(entry.name) or _holds_weights(entry)):
                yield from _walk(entry, root)
        elif entry.is_file() and not _WEIGHTS.fullmatch(entry.name):
            yield name


def _holds_weights(folder: Path) -> bool:
    files = [entry.name for entry in folder.iterdir() if entry.is_file()]
    return any(_WEIGHTS.fullmatch(name) for name in files)


def _stays_inside(entry: Path, name: str, root: Path) -> bool:
    """Whether an entry, or the target of a link, belongs to the model."""
    if not entry.is_symlink():
        return True
    end, top = entry.resolve(), root.resolve()
    # A snapshot of the Hub's cache consists of links to the repository's blobs.
    is_blob = end.parent.name == "blobs" and end.parent.parent in top.parents
    linked_file = is_side_file(name) and entry.is_file()
    return is_blob or linked_file or (top in end.parents and entry.is_file())
