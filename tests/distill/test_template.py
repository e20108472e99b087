import pytest
from distill.tiny import byte_tokenizer, tiny_llama

from graftkit.checkpoint import Checkpoint
from graftkit.distill.records import ScoredAnswer, SourceAnswer
from graftkit.distill.select import Template
from graftkit.errors import CheckpointError
from graftkit.models.loading import empty_model
from graftkit.rows import encode_row


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return empty_model(Checkpoint.open(tiny_llama(tmp_path_factory.mktemp("model"))))


def scored(prompt, text):
    return ScoredAnswer(SourceAnswer(0, prompt, "s", 0, text, 1, "stop"), True, None, 1.0)


def test_plain_answers_begin_with_one_blank(tmp_path, model):
    template = Template(byte_tokenizer(tmp_path), model, False, 99)
    row = template.row("say one:", "one!")
    assert (row.prompt, row.completion) == ("say one:", " one!")


def test_a_turn_of_chat_is_the_tokens_that_the_template_gives(tmp_path, model):
    tokenizer = byte_tokenizer(tmp_path, chat=True)
    row = Template(tokenizer, model, True, 99).row("say one", "one!")
    turns = [{"role": "user", "content": "say one"}, {"role": "assistant", "content": "one!"}]
    expected = tokenizer.apply_chat_template(turns, return_dict=False)
    encoded = encode_row(tokenizer, row)
    ids, start = encoded.ids, encoded.start
    assert ids == [*expected, tokenizer.eos_token_id]
    requested = tokenizer.apply_chat_template(
        turns[:1], add_generation_prompt=True, return_dict=False
    )
    assert ids[:start] == requested


def test_an_end_of_turn_that_is_the_eos_is_not_written_twice(tmp_path, model):
    tokenizer = byte_tokenizer(tmp_path, chat=True)
    tokenizer.eos_token = "<|end|>"
    row = Template(tokenizer, model, True, 99).row("say one", "one!")
    ids = encode_row(tokenizer, row).ids
    assert row.completion == "one!"
    assert ids.count(tokenizer.eos_token_id) == 2  # behind each turn


def test_a_tokenizer_that_adds_bos_itself_does_not_get_it_twice(tmp_path, model):
    tokenizer = byte_tokenizer(tmp_path, chat=True)
    tokenizer.add_bos_token = True
    row = Template(tokenizer, model, True, 99).row("say one", "one!")
    ids = encode_row(tokenizer, row).ids
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_chat_without_a_template_is_refused(tmp_path, model):
    with pytest.raises(CheckpointError, match="has no chat template"):
        Template(byte_tokenizer(tmp_path), model, True, 99)


def test_rows_beyond_the_limit_or_the_context_do_not_fit(tmp_path, model):
    template = Template(byte_tokenizer(tmp_path), model, False, 12)
    assert template.fits(scored("say:", "one"))
    assert not template.fits(scored("say:", "one two three"))
    unlimited = Template(byte_tokenizer(tmp_path), model, False, 10_000)
    assert not unlimited.fits(scored("say:", "x" * 200))  # the model reads 128
