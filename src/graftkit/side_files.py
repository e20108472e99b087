"""The files of a model directory beside its weights.

A pack holds those that decide how text, images or sound become tensors, how a model is built and
how it generates, where the tuned model's differ from the target's. A checkpoint that graftkit
writes gets a copy of every file of the target that holds no weights.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graftkit.errors import CheckpointError
from graftkit.files import is_work_folder

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
