"""Models for chats are asked in their template; skills that were trained raw are asked raw."""

import json
import shutil

import pytest
import torch
from commands import run
from distill.tiny import CHAT, tiny_llama, write_jsonl
from tiny_models import perturb
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from graftkit.cli.generating import generate_answers
from graftkit.errors import CheckpointError, ConfigError, PackMismatchError, RowsError
from graftkit.evaluate import compare, exact_match
from graftkit.fuse.merge import fuse_packs, merge_packs
from graftkit.library import Library
from graftkit.models.text import generate_greedy
from graftkit.pack import pack_delta
from graftkit.rows import Row, template_digest
from graftkit.skillpack import SkillPack

PROMPT = "one?"
TOKENS = 10
OTHER = CHAT.replace("<assistant>", "<reply>")
PAIRS = [{"prompt": f"{i}+1=", "completion": f" {i + 1}"} for i in range(6)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
    for i in range(6)
]
TEXTS = [{"text": f"{i} and {i + 1}"} for i in range(6)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target for chats and a tuned model with the same template."""
    folder = tmp_path_factory.mktemp("chat")
    target = tiny_llama(folder / "target", chat=True)
    config = AutoConfig.from_pretrained(target)
    config.tie_word_embeddings = False  # else a random model repeats its last token
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    perturb(model, seed=3, scale=0.3)
    model.save_pretrained(target)
    tune(target, folder / "tuned", 1)
    return folder


def tune(target, folder, seed, template=None):
    shutil.copytree(target, folder)
    model = AutoModelForCausalLM.from_pretrained(target)
    perturb(model, seed=seed, scale=0.05)
    model.save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def save_pack(world, file, tuned="tuned", **options):
    options = {"recipe": "lossless", "workers": 1} | options
    pack_delta(world / "target", world / tuned, **options).save(file)
    return file


def expected_answer(folder, *, system=None, raw=False):
    """What transformers' own template makes of the prompt, continued by the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": PROMPT})
    ids = (
        tokenizer.encode(PROMPT)
        if raw
        else tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    )
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ends = [1, *([] if raw else [tokenizer.convert_tokens_to_ids("<|end|>")])]
    output = generate_greedy(model, [ids], TOKENS, eos_token_id=ends, pad_token_id=0)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def answer(target, files=(), **options):
    return [
        a["text"] for a in generate_answers(str(target), list(files), PROMPT, TOKENS, **options)
    ]


def test_a_target_with_a_template_is_asked_in_it_unless_raw(world):
    target = world / "target"
    chat, raw = expected_answer(target), expected_answer(target, raw=True)
    assert answer(target) == [chat]
    assert answer(target, raw=True) == [raw]
    assert chat != raw
    told = expected_answer(target, system="be brief")
    assert answer(target, system="be brief") == [told]
    assert told != chat


def test_a_pack_is_asked_as_its_skill_was_trained(world, tmp_path):
    tuned = world / "tuned"
    rows = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    unknown = save_pack(world, tmp_path / "unknown.skillpack")
    raw = save_pack(world, tmp_path / "raw.skillpack", calibration=rows)
    chat = save_pack(world, tmp_path / "chat.skillpack", prompt_format="chat")
    expected = [expected_answer(tuned), expected_answer(tuned, raw=True), expected_answer(tuned)]
    assert answer(world / "target", [unknown, raw, chat]) == expected
    assert answer(world / "target", [chat], raw=True) == [expected[1]]
    formats = [
        SkillPack.load(file).manifest.effective_prompt_format for file in (unknown, raw, chat)
    ]
    assert formats == [None, "raw", "chat"]
    with pytest.raises(ConfigError, match="the pack of tuned is asked without one"):
        answer(world / "target", [raw], system="be brief")


@pytest.mark.slow
def test_a_pack_brings_its_own_template(world, tmp_path):
    target = world / "target"
    tune(target, tmp_path / "other", 2, OTHER)
    pack_delta(target, tmp_path / "other", recipe="lossless", workers=1).save(
        tmp_path / "o.skillpack"
    )
    plain = save_pack(world, tmp_path / "plain.skillpack")
    expected = [expected_answer(tmp_path / "other"), expected_answer(world / "tuned")]
    assert answer(target, [tmp_path / "o.skillpack", plain]) == expected
    merged = merge_packs(target, tmp_path / "o.skillpack", tmp_path / "merged")
    assert answer(merged) == expected[:1]
    library = Library.init(tmp_path / "library", target)
    library.add(tmp_path / "o.skillpack", "other")
    library.add(plain, "plain")
    texts = [
        library.generate(PROMPT, route=n, max_new_tokens=TOKENS).text for n in ("other", "plain")
    ]
    assert texts == expected


@pytest.mark.slow
def test_a_skill_of_another_template_is_refused_but_answers_raw(world, tmp_path):
    file = save_pack(world, tmp_path / "chat.skillpack", prompt_format="chat")
    target = shutil.copytree(world / "target", tmp_path / "target")
    (target / "chat_template.jinja").write_text(OTHER)
    with pytest.raises(PackMismatchError, match=r"trained in a chat template .* put back"):
        answer(target, [file])
    assert answer(target, [file], raw=True) == [expected_answer(world / "tuned", raw=True)]
    (target / "chat_template.jinja").unlink()
    with pytest.raises(PackMismatchError, match="the one here is none"):
        answer(target, [file])


@pytest.mark.slow
def test_a_library_asks_each_pack_in_its_way(world, tmp_path):
    library = Library.init(tmp_path / "library", world / "target")
    library.add(save_pack(world, tmp_path / "a.skillpack", prompt_format="raw"), "raw")
    library.add(save_pack(world, tmp_path / "b.skillpack", prompt_format="chat"), "chat")

    def ask(route, **options):
        return library.generate(PROMPT, route=route, max_new_tokens=TOKENS, **options)

    tuned, target = world / "tuned", world / "target"
    assert ask("raw").text == ask("chat", raw=True).text == expected_answer(tuned, raw=True)
    assert ask("chat").text == expected_answer(tuned)
    assert ask("target").text == expected_answer(target)
    assert ask("target", raw=True).text == expected_answer(target, raw=True)
    assert ask("target", system="be brief").text == expected_answer(target, system="be brief")
    noted = ask("raw", system="be brief")
    assert (noted.text, noted.note) == (
        "",
        "the prompt is given raw, and a system text needs a chat template",
    )
    long = library.generate("x" * 120, route="target")
    assert long.note is not None
    assert "tokens, and the target reads 128 in all" in long.note


@pytest.mark.slow
def test_a_library_answers_prompts_of_several_packs_at_once(world, tmp_path):
    library = Library.init(tmp_path / "library", world / "target")
    library.add(save_pack(world, tmp_path / "a.skillpack", prompt_format="raw"), "raw")
    alone = [
        library.generate(PROMPT, route=r, max_new_tokens=TOKENS).text for r in ("raw", "target")
    ]
    routes = iter(["raw", "target"])
    both = []
    for route in routes:
        both += library.generate([PROMPT, PROMPT], route=route, max_new_tokens=TOKENS)
    assert [each.text for each in both] == [alone[0]] * 2 + [alone[1]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "row_format", "answers"),
    [(PAIRS, "prompt_completion", "raw"), (CHATS, "messages", "chat"), (TEXTS, "text", None)],
)
def test_the_manifest_says_what_a_pack_was_calibrated_on(
    world, tmp_path, given, row_format, answers
):
    rows = write_jsonl(tmp_path / "rows.jsonl", given)
    pack = pack_delta(
        world / "target", world / "tuned", budget="80%", calibration=rows, train_steps=1, workers=1
    )
    manifest = pack.manifest
    assert manifest.calibration is not None
    assert (manifest.calibration.format, manifest.calibration.rows) == (row_format, 6)
    assert manifest.effective_prompt_format == answers
    tokenizer = AutoTokenizer.from_pretrained(world / "tuned")
    expected = template_digest(tokenizer) if row_format == "messages" else None
    assert manifest.template_blake3 == expected
    pack.save(tmp_path / "a.skillpack")
    assert SkillPack.load(tmp_path / "a.skillpack").manifest == manifest


@pytest.mark.slow
def test_a_record_of_prompts_and_completions_takes_no_byte_of_a_pack(world, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    pack = pack_delta(
        world / "target", world / "tuned", budget="80%", calibration=rows, train_steps=0, workers=1
    )
    written = json.loads(pack.manifest.to_json())
    assert "prompt_format" not in written
    assert "format" not in written["calibration"]


def test_a_prompt_format_that_cannot_be_is_refused(world, tmp_path):
    chats = write_jsonl(tmp_path / "chats.jsonl", CHATS)
    with pytest.raises(ConfigError, match="'template' is unknown; choose raw or chat"):
        save_pack(world, tmp_path / "a", prompt_format="template")
    with pytest.raises(ConfigError, match=r"chats\.jsonl: its rows are messages, .* cannot be raw"):
        save_pack(world, tmp_path / "a", prompt_format="raw", calibration=chats)
    plain = tmp_path / "plain"
    shutil.copytree(world / "tuned", plain)
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="the tokenizer has no chat template"):
        pack_delta(world / "target", plain, recipe="lossless", calibration=chats, workers=1)


@pytest.mark.slow
@pytest.mark.parametrize("formats", [("raw", "raw"), ("chat", "chat"), ("raw", "chat")])
def test_a_fused_pack_is_asked_as_its_packs_are_where_they_agree(world, tmp_path, formats):
    tune(world / "target", tmp_path / "second", 5)
    first = pack_delta(
        world / "target", world / "tuned", recipe="lossless", prompt_format=formats[0], workers=1
    )
    second = pack_delta(
        world / "target",
        tmp_path / "second",
        recipe="lossless",
        prompt_format=formats[1],
        workers=1,
    )
    fused = fuse_packs(
        world / "target", [first, second], tmp_path / "f.skillpack", recipe="lossless"
    )
    assert fused.manifest.effective_prompt_format == (
        formats[0] if len(set(formats)) == 1 else None
    )


@pytest.mark.slow
def test_conversations_and_texts_are_compared(world, tmp_path):
    pack = SkillPack.load(save_pack(world, tmp_path / "a.skillpack"))
    chats = [Row.of_messages(record["messages"]) for record in CHATS]
    actual = compare(world / "target", world / "tuned", pack, chats)
    assert actual.kl_mean < 1e-9
    assert actual.tokens == sum(len(f"{i}!") + 1 for i in range(6))  # and the end of the turn
    assert actual.exact_match_packed == actual.exact_match_tuned
    texts = [Row.of_text(record["text"]) for record in TEXTS]
    actual = compare(world / "target", world / "tuned", pack, texts)
    assert actual.exact_match_packed is actual.recovered is None
    assert actual.tokens == sum(len(record["text"]) for record in TEXTS)


def test_an_answer_of_a_conversation_matches_word_for_word(world, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(world / "target").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "target")
    question = {"role": "user", "content": PROMPT}
    ids = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_dict=False)

    def say_four(model, prompts, *arguments, **options):
        assert prompts == [ids]
        return torch.tensor([tokenizer.encode("four<|end|>")])

    monkeypatch.setattr("graftkit.evaluate.generate_greedy", say_four)

    def match(text):
        row = Row.of_messages([question, {"role": "assistant", "content": text}])
        return exact_match(model, tokenizer, [row])

    assert match("four") == 1.0
    assert match("five") == match("") == 0.0
    with pytest.raises(RowsError, match="a text has no prompt to answer"):
        exact_match(model, tokenizer, [Row.of_text("x")])


@pytest.mark.slow
def test_the_command_takes_raw_and_system(world, tmp_path, capsys):
    target = world / "target"
    command = ["generate", target, "--prompt", PROMPT, "--max-new-tokens", TOKENS, "--json"]

    def texts(*options):
        assert run(*command, *options) == 0
        return [a["text"] for a in json.loads(capsys.readouterr().out)["answers"]]

    assert texts() == [expected_answer(target)]
    assert texts("--raw") == [expected_answer(target, raw=True)]
    assert texts("--system", "be brief") == [expected_answer(target, system="be brief")]
    assert run(*command, "--raw", "--system", "x") == 1
    assert "leave out --raw" in capsys.readouterr().err


@pytest.mark.slow
def test_inspect_shows_how_a_pack_is_asked(world, tmp_path, capsys):
    file = save_pack(world, tmp_path / "a.skillpack", prompt_format="chat")
    assert run("inspect", file) == 0
    assert "prompts  chat, template " in capsys.readouterr().out


def test_a_target_without_a_template_refuses_a_system_text(tmp_path):
    target = tiny_llama(tmp_path / "plain", dtype="float32")
    assert answer(target) == answer(target, raw=True)
    with pytest.raises(
        ConfigError, match="--system needs a chat template, and the target is asked"
    ):
        answer(target, system="x")


@pytest.mark.slow
def test_a_base_model_without_a_template_is_compared_in_the_tuned_ones(world, tmp_path):
    target = tiny_llama(tmp_path / "target", dtype="float32")
    tune(target, tmp_path / "tuned", 1, CHAT)
    pack = pack_delta(target, tmp_path / "tuned", recipe="lossless", workers=1)
    actual = compare(target, tmp_path / "tuned", pack, [Row.of_messages(CHATS[0]["messages"])])
    assert actual.exact_match_target is not None
    assert actual.kl_mean < 1e-9
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    tokenizer.save_pretrained(tmp_path / "tuned")
    pack = pack_delta(target, tmp_path / "tuned", recipe="lossless", workers=1)
    actual = compare(target, tmp_path / "tuned", pack, [Row.of_messages(CHATS[0]["messages"])])
    assert actual.exact_match_target is actual.recovered is None
    assert actual.exact_match_tuned == actual.exact_match_packed
