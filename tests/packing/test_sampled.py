"""Rows that the two models write, and packs that are calibrated on them."""

import json
import re

import pytest
import torch
from commands import run
from tiny_models import VOCABULARY, make_pair, save_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError, CheckpointMismatchError, RowsError
from graftkit.fuse.merge import packing_inputs, with_prompt_format
from graftkit.models.text import usable_tokenizer
from graftkit.pack import pack_delta
from graftkit.packing import pairs, sampled
from graftkit.packing.sampled import COMPLETION_TOKENS, PROMPT_TOKENS, generate_rows
from graftkit.progress import silent

COUNT = 40
OPTIONS = {"budget": "90%", "workers": 1, "train_steps": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Target and tuned, with tokenizers."""
    target, tuned = make_pair(tmp_path_factory.mktemp("sampled"), "llama", torch.bfloat16)
    for path in (target, tuned):
        save_tokenizer(path)
    return target, tuned


def rows_of(folders, seed=0, count=COUNT, progress=silent):
    return generate_rows(*map(Checkpoint.open, folders), count, seed, progress)


@pytest.fixture(scope="module")
def rows(folders):
    return rows_of(folders)


def test_the_seed_decides_the_rows_and_nothing_else_is_random(folders, rows):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert rows_of(folders) == rows
    assert torch.equal(torch.random.get_rng_state(), before)
    assert rows_of(folders, seed=1) != rows


def test_threads_of_the_caller_do_not_change_the_rows(folders, rows):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert rows_of(folders) == rows
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_prompts_are_plain_text_that_begins_with_a_word(folders, rows):
    tokenizer = usable_tokenizer(Checkpoint.open(folders[0]))
    special = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<bos>")}
    assert sampled.FEWEST_ROWS <= len(rows) <= COUNT
    for row in rows:
        ids = tokenizer.encode(row.prompt)
        assert not special & set(ids)
        assert 1 <= len(ids) <= 1 + PROMPT_TOKENS[1]  # blanks around a prompt are dropped
        assert row.prompt[0].isalpha()


def test_completions_are_of_the_tuned_model_and_end_at_its_end_token(folders, rows):
    tokenizer = usable_tokenizer(Checkpoint.open(folders[1]))
    # This tokenizer does not know its <bos> as special, so that an answer may hold it.
    lengths = [len(tokenizer.encode(row.completion.replace("<bos>", "b"))) for row in rows]
    assert min(lengths) < max(lengths) == COMPLETION_TOKENS
    assert all(row.completion.strip() and "<eos>" not in row.completion for row in rows)


def test_progress_counts_prompts_then_completions(folders):
    steps = []
    rows_of(folders, progress=lambda *step: steps.append(step))
    assert steps[:2] == [("sampling prompts", done, COUNT) for done in (0, COUNT)]
    assert [step for step, _, _ in steps[2:]] == ["sampling completions"] * 2
    assert steps[3][1] == steps[3][2]


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(sampled, "SAMPLED_ROWS", COUNT)
    monkeypatch.setattr(pairs, "SMALLEST_LOSSY", 3_000)


@pytest.mark.parametrize(
    ("recipe", "prompt_format"),
    [("graftllm", None), *(pytest.param("auto", f, marks=pytest.mark.slow) for f in (None, "raw"))],
)
def test_a_pack_records_that_its_rows_were_sampled(folders, rows, few_rows, recipe, prompt_format):
    options = {"recipe": recipe, "prompt_format": prompt_format, **OPTIONS}
    pack = pack_delta(*folders, calibration="self", **options)
    manifest = pack.manifest
    assert (manifest.calibration.source, manifest.calibration.rows) == ("self", len(rows))
    assert pack.pack_bytes <= manifest.budget_bytes
    assert manifest.effective_prompt_format == prompt_format  # sampled rows say nothing about it


@pytest.mark.slow
def test_the_command_takes_self_and_tells_what_it_means(folders, few_rows, tmp_path, capsys):
    output = tmp_path / "self"  # no input of the command, though of the same name
    run("pack", *folders, "-o", output, "--calibration", "self", "--budget", "90%", "--quick")
    capsys.readouterr()
    run("inspect", output)
    shown = capsys.readouterr().out
    assert "of self (prompt and completion)" in shown
    assert re.search(r"prompts  not recorded", shown)


def test_a_fused_pack_keeps_the_prompt_format_of_its_parts_with_sampled_rows():
    packing = {"calibration": "self"}
    assert with_prompt_format(packing, ["raw", "raw"])["prompt_format"] == "raw"
    assert packing_inputs(packing) == []


def test_first_words_have_a_blank_before_them_and_decoding_keeps_it():
    vocabulary = {"<unk>": 0, "▁word": 1, "part": 2, "▁of": 3, "▁1234": 4, "▁other": 5, "▁": 6}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>")
    assert sampled._first_words(tokenizer, range(1, 7)) == [1, 5]
    assert tokenizer.decode([5]) == "other"
    assert sampled._continuation(tokenizer, [1], [5, 2]) == " otherpart"


def test_a_file_named_self_is_told_from_sampled_rows(folders, few_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").write_text(json.dumps({"prompt": "a", "completion": " b"}) + "\n")
    manifest = pack_delta(*folders, calibration="./self", **OPTIONS).manifest
    assert (manifest.calibration.source, manifest.calibration.rows) == ("./self", 1)
    assert manifest.effective_prompt_format == "raw"


def test_a_lossless_pack_samples_nothing(folders, monkeypatch):
    monkeypatch.setattr(sampled, "generate_rows", None)
    pack = pack_delta(*folders, calibration="self", recipe="lossless", workers=1)
    assert pack.manifest.calibration is None
    assert pack.manifest.effective_prompt_format is None


def test_an_encoder_is_refused_in_one_line(tmp_path):
    target, tuned = make_pair(tmp_path, "bert")
    for path in (target, tuned):
        save_tokenizer(path)
    with pytest.raises(CheckpointError, match="BertForMaskedLM does not continue a text") as caught:
        pack_delta(target, tuned, calibration="self", **OPTIONS)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="save the tokenizer into the model directory"):
        pack_delta(*make_pair(tmp_path, "llama"), calibration="self", **OPTIONS)


def test_two_models_are_refused_before_rows_are_sampled(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(sampled, "generate_rows", None)
    other, _ = make_pair(tmp_path, "gpt2")
    with pytest.raises(CheckpointMismatchError, match="a pack needs two states of one model"):
        pack_delta(folders[0], other, calibration="self", **OPTIONS)


def test_too_few_rows_are_refused_with_what_to_do(folders):
    with pytest.raises(RowsError, match="of 8 sampled prompts got a completion") as caught:
        rows_of(folders, count=8)
    assert "give calibration a file of rows, or leave it out" in str(caught.value)


def test_tokens_beyond_the_vocabulary_of_the_model_are_refused(folders, tmp_path):
    target, tuned = make_pair(tmp_path, "llama", torch.bfloat16)
    save_tokenizer(target)
    save_tokenizer(tuned, VOCABULARY + 40)
    tokenizer = json.loads((tuned / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {"e": vocabulary["~"] + 20, chr(32 + 111): vocabulary["e"]}
    (tuned / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="but the model has 96 embeddings"):
        rows_of((target, tuned))
