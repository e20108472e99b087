import numpy as np
import pytest
from distill.foreign import TEXTS, byte_level, sentence_pieces
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from graftkit.distill.transfer.alignment import (
    UNKNOWN,
    map_vocabulary,
    match_tokens,
    read_as_source,
    span_pools,
    tokenize_completion,
)
from graftkit.errors import CheckpointError
from graftkit.models.loading import load_tokenizer
from graftkit.rows import Row, encode_row, read_rows

FINE, COARSE = byte_level(20), byte_level(90, special=5)
PIECES = sentence_pieces(["▁", "▁the", "▁cat", "▁c", "▁s", "at", "1", "2", "7", "s", "d", "o", "g"])
PAIRS = [(COARSE, FINE), (FINE, COARSE), (COARSE, PIECES), (PIECES, COARSE), (PIECES, FINE)]


def pieces(tokenizer, ids):
    """Texts of single tokens, blanks included."""
    return [tokenizer.convert_ids_to_tokens(i).replace("Ġ", " ").replace("▁", " ") for i in ids]


def aligned(source, target, text):
    """Texts of the matched tokens, (source, target)."""
    left, right = tokenize_completion(source, text), tokenize_completion(target, text)
    actual = match_tokens(left, right, map_vocabulary(source, target, len(source)))
    chosen = [(left.ids[i], right.ids[j]) for j, i in enumerate(actual) if i != UNKNOWN]
    return list(
        zip(
            pieces(source, [s for s, _ in chosen]),
            pieces(target, [t for _, t in chosen]),
            strict=True,
        )
    )


@pytest.mark.parametrize("tokenizer", [FINE, COARSE, PIECES])
def test_a_completion_is_cut_as_rows_are_encoded(tokenizer):
    for text in [*TEXTS, "", "  two  blanks \n"]:
        encoded = encode_row(tokenizer, Row("a prompt", text))
        ids, start = encoded.ids, encoded.start
        assert tokenize_completion(tokenizer, text).ids == ids[start:]


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), pair=st.sampled_from(PAIRS))
def test_of_any_text_matched_tokens_start_at_the_same_character_and_alike(text, pair):
    source, target = pair
    left, right = tokenize_completion(source, text), tokenize_completion(target, text)
    vocabulary = map_vocabulary(source, target, len(source))
    for index, other in enumerate(match_tokens(left, right, vocabulary)):
        if other != UNKNOWN and index < len(right.spans):
            assert left.spans[other][0] == right.spans[index][0]
            assert vocabulary[left.ids[other]] == right.ids[index]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), pair=st.sampled_from(PAIRS))
def test_of_any_text_pooled_spans_cover_the_same_characters(text, pair):
    left, right = (tokenize_completion(tokenizer, text) for tokenizer in pair)
    pools = span_pools(left.spans, right.spans)
    actual = []
    for spans, pool in zip((left.spans, right.spans), pools, strict=True):
        assert len(pool) == len(spans)
        groups = [[s for s, n in zip(spans, pool, strict=True) if n == k] for k in set(pool) - {-1}]
        actual.append([(group[0][0], group[-1][1]) for group in groups])
    assert actual[0] == actual[1]
    assert not text.strip() or actual[0]


def test_a_source_token_that_begins_with_the_targets_stands_for_it():
    assert aligned(COARSE, FINE, " the sofa") == [
        (" the", " the"),
        (" sofa", " s"),
        ("<eos>", "<eos>"),
    ]


def test_a_source_token_that_is_shorter_than_the_targets_says_nothing():
    assert aligned(FINE, COARSE, " the sofa") == [(" the", " the"), ("<eos>", "<eos>")]


def test_the_end_of_the_text_is_matched_with_the_end():
    left, right = tokenize_completion(COARSE, " the cat"), tokenize_completion(FINE, " the cat")
    actual = match_tokens(left, right, map_vocabulary(COARSE, FINE, len(COARSE)))
    assert actual[-1] == len(left.ids) - 1


def test_one_vocabulary_maps_to_itself_and_every_token_is_matched():
    vocabulary = map_vocabulary(FINE, FINE, len(FINE) + 6)
    assert vocabulary[: len(FINE)].tolist() == list(range(len(FINE)))
    assert (vocabulary[len(FINE) :] == UNKNOWN).all()
    tokens = tokenize_completion(FINE, "naïve 汉字 😀 12")
    assert match_tokens(tokens, tokens, vocabulary).tolist() == list(range(len(tokens.ids)))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_what_a_token_maps_to_begins_its_text(source, target):
    vocabulary = map_vocabulary(source, target, len(source))
    known = [token for token in range(8, len(source)) if vocabulary[token] != UNKNOWN]
    assert len(known) > 250
    for token in known:
        left, right = source.decode([token]), target.decode([int(vocabulary[token])])
        left, right = left.replace("▁", " "), right.replace("▁", " ")
        assert left.startswith(right) or "\ufffd" in left + right


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_no_digit_maps_to_another_digit(source, target):
    vocabulary = map_vocabulary(source, target, len(source))
    for name, token in source.get_vocab().items():
        text = name.replace("Ġ", "").replace("▁", "")
        if text.isdecimal() and vocabulary[token] != UNKNOWN:
            actual = target.decode([int(vocabulary[token])]).strip()
            assert text.startswith(actual)


def test_special_tokens_map_to_nothing_but_every_end_to_the_end():
    extra = COARSE.convert_tokens_to_ids("<extra1>")
    ends = [FINE.eos_token_id] * 2
    vocabulary = map_vocabulary(COARSE, FINE, len(COARSE), ends=[extra, 10**6])
    assert vocabulary[[COARSE.eos_token_id, extra]].tolist() == ends
    assert vocabulary[COARSE.pad_token_id] == UNKNOWN


def test_blanks_count_as_the_same_in_byte_level_and_sentence_pieces():
    vocabulary = map_vocabulary(COARSE, PIECES, len(COARSE))
    the = COARSE.convert_tokens_to_ids("Ġthe")
    assert PIECES.convert_ids_to_tokens(int(vocabulary[the])) == "▁the"


def test_offsets_that_leave_out_blanks_are_filled():
    trimmed = byte_level(20)
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert (
        tokenize_completion(trimmed, " the cat").spans
        == tokenize_completion(FINE, " the cat").spans
    )


def test_a_prompt_is_a_turn_of_the_template_where_the_source_chats():
    chatty = byte_level(20)
    chatty.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}>"
    prompt, _ = read_as_source(chatty, Row("hi", " ho"), True, len(chatty))
    assert chatty.decode(prompt) == "user: hi>"


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{% broken"])
def test_a_source_without_a_usable_template_is_refused_by_name(template):
    chatty = byte_level(20)
    chatty.chat_template = template
    with pytest.raises(CheckpointError, match="chat = false"):
        read_as_source(chatty, Row("hi", " ho"), True, len(chatty))


def test_a_token_without_an_embedding_is_refused():
    with pytest.raises(CheckpointError, match="has 40 embeddings"):
        read_as_source(FINE, Row("hi", " ho"), False, 40)


def test_a_tokenizer_that_does_not_tell_where_tokens_lie_is_refused():
    class Slow:
        is_fast = False
        name_or_path = "slow-model"

    with pytest.raises(CheckpointError, match="slow-model: does not tell"):
        tokenize_completion(Slow(), "text")


def edit_distance(left, right):
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, row = row, [i]
        for j, b in enumerate(right, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
    return row[-1]


def warp(left, right):
    """FuseLLM's dynamic time warping over token strings: the pairs that are one to one."""
    cost = np.full((len(left) + 1, len(right) + 1), np.inf)
    cost[0, 0] = 0
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            best = min(cost[i, j], cost[i, j + 1], cost[i + 1, j])
            cost[i + 1, j + 1] = best + edit_distance(a, b)
    i, j, path = len(left), len(right), []
    while i and j:
        path.append((i - 1, j - 1))
        i, j = min([(i - 1, j - 1), (i - 1, j), (i, j - 1)], key=lambda place: cost[place])
    lefts, rights = [i for i, _ in path], [j for _, j in path]
    return {(i, j) for i, j in path if lefts.count(i) == 1 and rights.count(j) == 1}


def test_on_real_rows_more_is_aligned_than_by_time_warping_and_nothing_at_other_text(shared):
    source, target = (load_tokenizer(shared / "nursery" / name) for name in ("source", "target"))
    vocabulary = map_vocabulary(source, target, len(source))
    rows = read_rows(shared / "data" / "llm" / "nl_regex" / "train.jsonl")[:40]
    ours = theirs = elsewhere = tokens = 0
    for row in rows:
        left, right = (
            tokenize_completion(source, row.completion),
            tokenize_completion(target, row.completion),
        )
        ours += int((match_tokens(left, right, vocabulary) != UNKNOWN).sum()) - 1
        pairs = warp(pieces(source, left.ids[:-1]), pieces(target, right.ids[:-1]))
        theirs += len(pairs)
        elsewhere += sum(left.spans[i][0] != right.spans[j][0] for i, j in pairs)
        tokens += len(right.spans)
    assert theirs < ours < tokens
    assert elsewhere > 0
