"""Conversations become the tokens of the template, and the assistant's are found in them."""

import json
import os
from pathlib import Path

import pytest
from distill.tiny import CHAT, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from graftkit.errors import RowsError
from graftkit.rows import Row, encode_prompt, encode_question, encode_row, end_of_turn
from graftkit.rows.chat import chat_template, template_digest

REAL = Path(os.environ.get("GRAFTKIT_REAL_MODEL", "absent"))
TURNS = (
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
)
SEPARATED = CHAT.replace("<|end|>", "<|end|>\n")
MARKED = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Writes a thought into the last turn only, as templates of reasoning models do.
REWRITES = CHAT.replace(
    "{{ m.content }}", "{{ '(hm)' if loop.last and m.role == 'assistant' }}{{ m.content }}"
)
STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('no user first') }}{% endif %}" + CHAT
)
TOOLS = (
    "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"function": {"name": "add", "arguments": {"a": 1}}}


@pytest.fixture
def tokenizer(tmp_path):
    return byte_tokenizer(tmp_path, chat=True)


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def scored_text(tokenizer, row):
    """The scored parts of a row, as text."""
    encoded = encode_row(tokenizer, row)
    marks = [*encoded.scored, False]
    parts, part = [], []
    for token, scored in zip([*encoded.ids, None], marks, strict=True):
        if scored:
            part.append(token)
        elif part:
            parts.append(tokenizer.decode(part))
            part = []
    return parts


@pytest.mark.parametrize("template", [CHAT, SEPARATED, MARKED], ids=["plain", "lines", "marks"])
def test_every_turn_of_the_assistant_is_scored_with_its_end_and_nothing_else(tokenizer, template):
    with_template(tokenizer, template)
    row = Row.of_messages(list(TURNS))
    assert scored_text(tokenizer, row) == ["1<|end|>", "2<|end|>"]
    whole = tokenizer.apply_chat_template(list(TURNS), return_dict=False)
    assert encode_row(tokenizer, row).ids == whole


def test_a_bos_of_the_template_comes_once(tokenizer):
    tokenizer.add_bos_token = True
    ids = encode_row(tokenizer, Row.of_messages(list(TURNS))).ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert encode_question(tokenizer, "one?", chat=True).count(tokenizer.bos_token_id) == 1


def test_a_generation_starts_where_the_last_answer_is_scored(tokenizer):
    row = Row.of_messages(list(TURNS))
    encoded = encode_row(tokenizer, row)
    assert encode_prompt(tokenizer, row) == encoded.ids[: encoded.answer[0]]
    start = tokenizer.apply_chat_template(
        list(TURNS[:3]), add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(tokenizer, row) == start


def test_turns_are_tokenized_apart_where_a_token_would_reach_across(tokenizer):
    class Merging:
        """Reads the header of an answer and its first letter as one token."""

        all_special_ids = tokenizer.all_special_ids
        chat_template = CHAT

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode(self, text, *, add_special_tokens):
            head, found, tail = text.partition("<assistant>1")
            ids = tokenizer.encode(head, add_special_tokens=False)
            return ids + ([999, *self.encode(tail, add_special_tokens=False)] if found else [])

    encoded = encode_row(Merging(), Row.of_messages(list(TURNS[:2])))
    assert 999 not in encoded.ids
    first, end = encoded.answer
    assert tokenizer.decode(encoded.ids[first:end]) == "1<|end|>"


def test_tool_calls_are_scored_and_their_arguments_may_be_text(tokenizer):
    with_template(tokenizer, TOOLS)
    text = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    rows = [
        Row.of_messages([TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}])
        for call in (CALL, text)
    ]
    assert rows[0] == rows[1]
    assert scored_text(tokenizer, rows[0]) == ['{"name": "add", "arguments": {"a": 1}}<|end|>']


def test_a_template_that_leaves_out_calls_or_tools_is_refused(tokenizer):
    called = [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    with pytest.raises(RowsError, match="does not write the call of the tool 'add'"):
        encode_row(tokenizer, Row.of_messages(called))
    with pytest.raises(RowsError, match="does not write the description of the tool 'add'"):
        encode_row(tokenizer, Row.of_messages(list(TURNS[:2]), json.dumps([{"name": "add"}])))


def test_a_template_that_rewrites_earlier_turns_is_refused_in_one_line(tokenizer):
    with_template(tokenizer, REWRITES)
    with pytest.raises(RowsError, match=r"r:1: .*writes message 2 otherwise when more") as caught:
        encode_row(tokenizer, Row.of_messages(list(TURNS), origin="r:1"))
    assert "\n" not in str(caught.value)
    row = Row.of_messages(list(TURNS[:2]))
    assert scored_text(tokenizer, row) == ["(hm)1<|end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STRICT, r"r:1: the chat template does not take these messages \(no user first\)"),
        ("{{ messages[0].content + 1 }}", "does not take these messages"),
        ("{{ 1 / 0 }}", r"does not take these messages \(division by zero\)"),
        ("{% for", "does not take these messages"),
        (None, "need a chat template, and the tokenizer has none"),
        ("{{ messages | length }}", "writes message 2 otherwise"),
        ("same", "assistant's turns have no tokens"),
        (MARKED.replace("assistant'", "nobody'"), "assistant's turns have no tokens"),
    ],
)
def test_a_template_that_fails_is_refused_with_the_row(tokenizer, template, message):
    with_template(tokenizer, template)
    messages = [{"role": "system", "content": "s"}, *TURNS[1:4]]
    if template is not STRICT:
        messages = list(TURNS)
    with pytest.raises(RowsError, match=message) as caught:
        encode_row(tokenizer, Row.of_messages(messages, origin="r:1"))
    assert "\n" not in str(caught.value)


def test_a_conversation_beyond_the_context_is_refused(tokenizer):
    row = Row.of_messages([TURNS[0], {"role": "assistant", "content": "x" * 10_000}], origin="r:1")
    with pytest.raises(RowsError, match=r"r:1: the row has 10\d+ tokens .*at most 128"):
        encode_row(tokenizer, row, 128)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], '"messages" is empty'),
        ("a", '"messages" is str'),
        ([1], "message 1 is int; expected an object"),
        ([TURNS[0]], "no message of the assistant"),
        ([TURNS[1]], "begins with the assistant"),
        ([{"role": "asistant", "content": "x"}], "message 1 has the role 'asistant'; expected one"),
        ([{"content": "x"}], "message 1 has the role None"),
        ([TURNS[0], {"role": "assistant"}], 'message 2: "content" is NoneType'),
        ([TURNS[0], {"role": "assistant", "content": 4}], 'message 2: "content" is int'),
        ([{"role": "user", "content": [{"type": "image"}]}], "has a part of type image"),
        ([TURNS[0], {"role": "assistant", "tool_calls": {}}], '"tool_calls" is dict'),
        ([TURNS[0], {"role": "assistant", "tool_calls": [{}]}], "tool call without a name"),
        ([TURNS[0], {"role": "assistant", "content": "\ud800"}], "half of a surrogate pair"),
        ([TURNS[0], {"role": "assistant", "content": "", "x": b"1"}], "is no JSON"),
    ],
)
def test_messages_that_are_none_are_refused_with_their_number(messages, message):
    with pytest.raises(RowsError, match=f"r:7: .*{message}|r:7: {message}") as caught:
        Row.of_messages(messages, origin="r:7")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "message"), [("{", "not JSON"), (3, '"tools" is int'), ([1], '"tools" is list')]
)
def test_tools_that_are_none_are_refused(tools, message):
    with pytest.raises(RowsError, match=message):
        Row.of_messages(list(TURNS), tools)


def test_an_empty_answer_is_its_end(tokenizer):
    row = Row.of_messages([TURNS[0], {"role": "assistant", "content": ""}])
    assert scored_text(tokenizer, row) == ["<|end|>"]


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "on"}, {"type": "text", "text": "e?"}]
    joined = Row.of_messages([{"role": "user", "content": parts}, TURNS[1]])
    assert joined == Row.of_messages(list(TURNS[:2]))


def test_a_router_reads_the_turn_that_is_answered():
    row = Row.of_messages([*TURNS, {"role": "user", "content": "three?"}])
    assert (row.prompt, row.completion) == ("two?", "2")


def test_a_question_is_a_turn_of_the_user_behind_a_system_text(tokenizer):
    turns = [{"role": "system", "content": "be brief"}, TURNS[0]]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert encode_question(tokenizer, "one?", True, "be brief") == expected
    assert encode_question(tokenizer, "one?", False) == tokenizer.encode("one?")


def test_a_system_text_that_nobody_would_read_is_refused(tokenizer):
    with pytest.raises(RowsError, match="needs a chat template"):
        encode_question(tokenizer, "one?", False, "be brief")
    with_template(
        tokenizer, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(RowsError, match="does not write a system text"):
        encode_question(tokenizer, "one?", True, "be brief")


def test_the_token_behind_an_answer_is_found(tokenizer):
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")
    assert (
        end_of_turn(
            with_template(tokenizer, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
        )
        is None
    )
    assert end_of_turn(with_template(tokenizer, "{{ 1 / 0 }}")) is None


def test_of_several_templates_the_default_counts(tokenizer):
    digest = template_digest(tokenizer)
    with_template(tokenizer, {"default": CHAT, "rag": "{{ documents }}"})
    assert template_digest(tokenizer) == digest
    assert chat_template(with_template(tokenizer, None)) is None
    assert template_digest(tokenizer) is None


@pytest.fixture(scope="module")
def lasting(tmp_path_factory):
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=True)


@given(st.lists(st.text(), min_size=1, max_size=3), st.sampled_from([CHAT, SEPARATED, MARKED]))
def test_whatever_is_said_is_scored_as_it_was_said(lasting, said, template):
    with_template(lasting, template)
    turns = [{"role": role, "content": text} for text in said for role in ("user", "assistant")]
    assert scored_text(lasting, Row.of_messages(turns)) == [f"{text}<|end|>" for text in said]


@pytest.mark.parametrize(
    "quoted", ["<|end|>", "<assistant>x<|end|>", "a<|eos|>\n", "{{ x }}", "  "]
)
def test_words_that_look_like_a_template_are_the_words_of_who_said_them(lasting, quoted):
    with_template(lasting, SEPARATED)
    turns = [{"role": "user", "content": quoted}, {"role": "assistant", "content": quoted}]
    assert scored_text(lasting, Row.of_messages(turns)) == [f"{quoted}<|end|>"]


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="GRAFTKIT_REAL_MODEL names no chat model")
def test_the_assistants_turns_of_a_real_template_are_found():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REAL)
    row = Row.of_messages(list(TURNS))
    assert scored_text(tokenizer, row) == ["1<|im_end|>", "2<|im_end|>"]
