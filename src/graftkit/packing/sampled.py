"""Calibration rows that the two models write, for a pack without rows of the user.

Prompts are sampled from the target, each from a random word on. Completions of these prompts are
sampled from the tuned model up to its end token. This is data-free distillation as in LLM-QAT
(arXiv 2305.17888), except that two models take part: one writes the prompts, the other answers.
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from blake3 import blake3

from graftkit.checkpoint import Checkpoint
from graftkit.config import SELF
from graftkit.errors import CheckpointError, RowsError
from graftkit.models.loading import empty_model, load_or_stream, silence_transformers
from graftkit.models.text import (
    check_vocabulary,
    context_length,
    end_tokens,
    generate_sampled,
    one_thread,
    pad_id,
    usable_tokenizer,
    vocabulary_size,
)
from graftkit.packing.measure import CalibrationRows
from graftkit.progress import Progress, StepProgress
from graftkit.rows import EncodedRow, Row, encode_row

_Item = TypeVar("_Item")

SAMPLED_ROWS, FEWEST_ROWS = 512, 32
"""Rows that are sampled by default, and the fewest that a pack is calibrated on."""

PROMPT_TOKENS = (6, 24)  # sampled tokens of a prompt, from and to, behind its first word
COMPLETION_TOKENS = 32
_SHORTEST_CONTEXT = 64  # prompt, completion and special tokens
_BATCH = 64
_WORD_STARTS = ("Ġ", "▁")  # how byte-level BPE and SentencePiece write the blank before a word
_WORD_LETTERS = 3
_INSTEAD = "give calibration a file of rows, or leave it out"


def sampled_calibration(
    target: Checkpoint, tuned: Checkpoint, seed: int, progress: Progress
) -> CalibrationRows:
    """SAMPLED_ROWS rows that the models write, with a digest of their content.

    Raises: CheckpointError, RowsError.
    """
    rows = generate_rows(target, tuned, SAMPLED_ROWS, seed, progress)
    content = json.dumps([row.content for row in rows])
    return CalibrationRows(rows, SELF, blake3(content.encode()).hexdigest())


def generate_rows(
    target: Checkpoint, tuned: Checkpoint, count: int, seed: int, progress: Progress
) -> list[Row]:
    """At most `count` prompts of the target, with completions of the tuned model.

    The rows depend on the models, the seed and the machine only, and the caller's random state
    stays as it is. One model is in memory at a time. Rows without a completion are dropped.

    Raises: CheckpointError for a model that does not continue a text, or has no tokenizer;
        RowsError for a context below 64 tokens, and if fewer than 32 rows have a completion.
    """
    for checkpoint in (target, tuned):
        _check_writes_text(checkpoint)
    tokenizers = usable_tokenizer(target), usable_tokenizer(tuned)
    chooser = random.Random(seed)
    with TemporaryDirectory(prefix="graftkit-") as folder, one_thread(), silence_transformers():
        step = partial(progress, "sampling prompts")
        prompts = _sample_prompts(target, tokenizers[0], count, chooser, Path(folder, "0"), step)
        step = partial(progress, "sampling completions")
        rows = _sample_completions(tuned, tokenizers[1], prompts, chooser, Path(folder, "1"), step)
    if len(rows) < FEWEST_ROWS:
        raise RowsError(
            f"{tuned.path}: {len(rows)} of {count} sampled prompts got a completion; expected at "
            f"least {FEWEST_ROWS}, so {_INSTEAD}"
        )
    return rows


def _check_writes_text(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError, RowsError for a model from which no rows can be sampled."""
    model: Any = empty_model(checkpoint)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise CheckpointError(
            f"{checkpoint.path}: a {type(model).__name__} does not continue a text, so no rows can "
            f"be sampled from it; {_INSTEAD}"
        )
    context = context_length(model)
    if context is not None and context < _SHORTEST_CONTEXT:
        raise RowsError(
            f"{checkpoint.path}: reads at most {context} tokens, and sampled rows need "
            f"{_SHORTEST_CONTEXT}; {_INSTEAD}"
        )


def _sample_prompts(
    target: Checkpoint,
    tokenizer: Any,
    count: int,
    chooser: random.Random,
    offload: Path,
    progress: StepProgress,
) -> list[str]:
    """Prompts of the target: a random word and 6 to 24 tokens, none of them special.

    Raises: RowsError for a vocabulary without words.
    """
    model = load_or_stream(target, offload)
    ordinary = _ordinary_tokens(tokenizer, model)
    words = _first_words(tokenizer, ordinary)
    if not words:
        raise RowsError(f"{target.path}: no token of the tokenizer is a word; {_INSTEAD}")
    suppressed = sorted({*range(vocabulary_size(model))}.difference(ordinary))
    special = set(tokenizer.all_special_ids)
    begin = list(takewhile(special.__contains__, tokenizer.encode("a", add_special_tokens=True)))
    least, most = PROMPT_TOKENS
    prompts: list[str] = []
    for batch in _batches(range(count), progress):
        firsts = [_choose(chooser, words) for _ in batch]
        output = generate_sampled(
            model,
            [[*begin, first] for first in firsts],
            most,
            _generation_seed(chooser),
            eos_token_id=None,
            pad_token_id=pad_id(tokenizer),
            suppress_tokens=suppressed,
        )
        for first, tokens in zip(firsts, output.tolist(), strict=True):
            length = _choose(chooser, range(least, most + 1))
            prompts.append(tokenizer.decode([first, *tokens[:length]]).strip())
    return prompts


def _sample_completions(
    tuned: Checkpoint,
    tokenizer: Any,
    prompts: Sequence[str],
    chooser: random.Random,
    offload: Path,
    progress: StepProgress,
) -> list[Row]:
    """A row for each prompt that the tuned model continues and reads whole.

    Raises: CheckpointError when the tokenizer gives a token that the model lacks.
    """
    model = load_or_stream(tuned, offload)
    longest = context_length(model) or sys.maxsize
    encoded = [(text, tokenizer.encode(text, add_special_tokens=True)) for text in prompts]
    encoded = [(text, ids) for text, ids in encoded if 0 < len(ids) <= longest - COMPLETION_TOKENS]
    check_vocabulary([EncodedRow(ids, len(ids)) for _, ids in encoded], model, str(tuned.path))
    ends = end_tokens(model.generation_config, tokenizer, chat=True)
    rows: list[Row] = []
    for batch in _batches(encoded, progress):
        output = generate_sampled(
            model,
            [ids for _, ids in batch],
            COMPLETION_TOKENS,
            _generation_seed(chooser),
            eos_token_id=ends or None,
            pad_token_id=pad_id(tokenizer),
        )
        for (prompt, ids), tokens in zip(batch, output.tolist(), strict=True):
            tokens = list(takewhile(lambda token: token not in ends, tokens))
            row = Row(prompt, _continuation(tokenizer, ids, tokens), f"sampled row {len(rows) + 1}")
            if row.completion.strip() and len(encode_row(tokenizer, row)) <= longest:
                rows.append(row)
    return rows


def _ordinary_tokens(tokenizer: Any, model: Any) -> list[int]:
    """Tokens of the model that the tokenizer learned from text: none that is special or added."""
    config = model.generation_config
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    special |= {config.bos_token_id, config.pad_token_id, *end_tokens(config, tokenizer)}
    ids = set(tokenizer.get_vocab().values()) & set(range(vocabulary_size(model)))
    return sorted(ids - special)


def _first_words(tokenizer: Any, ordinary: Sequence[int]) -> list[int]:
    """Tokens that are a word of three letters and more with the blank before it.

    Of a vocabulary that does not write blanks into its tokens: every token of letters.
    """
    texts = [text.strip() for text in tokenizer.batch_decode([[id_] for id_ in ordinary])]
    letters = {id_: text for id_, text in zip(ordinary, texts, strict=True) if text.isalpha()}
    names = zip(letters, tokenizer.convert_ids_to_tokens(list(letters)), strict=True)
    words = [
        id_ for id_, name in names if name[0] in _WORD_STARTS and len(letters[id_]) >= _WORD_LETTERS
    ]
    return words or list(letters)


def _continuation(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens behind a prompt, with the blank that some decoders drop at a beginning."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(list(prompt), **options)
    whole: str = tokenizer.decode([*prompt, *tokens], **options)
    return whole[len(before) :]


def _batches(items: Sequence[_Item], progress: StepProgress) -> Iterator[Sequence[_Item]]:
    for first in range(0, len(items), _BATCH):
        progress(first, len(items))
        yield items[first : first + _BATCH]
    progress(len(items), len(items))


def _choose(chooser: random.Random, values: Sequence[int]) -> int:
    # random() is promised to stay the same between Python versions, choice() is not.
    return values[int(chooser.random() * len(values))]


def _generation_seed(chooser: random.Random) -> int:
    return int(chooser.random() * 2**32)
