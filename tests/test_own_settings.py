"""Packs with a tokenizer or settings of their own: every way to use them answers as merged."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from tiny_models import build, lossless_pack, perturb, save_tokenizer
from transformers import AutoTokenizer

from graftkit.cli.generating import generate_answers
from graftkit.errors import PackMismatchError
from graftkit.evaluate import compare
from graftkit.fuse.merge import merge_packs
from graftkit.library import Library
from graftkit.rows import Row

PROMPT = "abc"
TOKENS = 12


def change_json(file, **settings):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | settings, indent=2))


@pytest.fixture
def target(tmp_path):
    build("llama", torch.float32, scale=0.3).save_pretrained(tmp_path / "target")
    save_tokenizer(tmp_path / "target")
    return tmp_path / "target"


def make_pack(target, name, change=lambda folder: None, seed=1):
    """A pack of a tuned model whose folder `change` has altered, and its file."""
    tuned = target.with_name(name)
    model = build("llama", torch.float32, scale=0.3)
    perturb(model, seed=seed, scale=0.02)
    model.save_pretrained(tuned)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(target / file, tuned / file)
    change(tuned)
    pack = lossless_pack(target, tuned)
    pack.save(target.with_name(f"{name}.skillpack"))
    return target.with_name(f"{name}.skillpack")


def ends_with(token):
    return lambda folder: change_json(folder / "tokenizer_config.json", eos_token=token)


def mark_special(folder, token):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.save_pretrained(folder)


def penalized(folder):
    change_json(folder / "generation_config.json", repetition_penalty=3.0)


def other_eps(folder):
    change_json(folder / "config.json", rms_norm_eps=0.5)


def renamed_letters(folder):
    """The tokenizer's letters a and b change places."""
    settings = json.loads((folder / "tokenizer.json").read_text())
    words = settings["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (folder / "tokenizer.json").write_text(json.dumps(settings))


def merged_answer(target, file):
    merged = target.with_name(f"merged-{file.stem}")
    shutil.rmtree(merged, ignore_errors=True)
    merge_packs(target, file, merged)
    [answer] = generate_answers(str(merged), [], PROMPT, TOKENS)
    return answer["text"]


CHANGES = {"eps": other_eps, "penalty": penalized, "letters": renamed_letters}


@pytest.mark.slow
def test_packs_generate_together_what_their_merged_checkpoints_do(target):
    plain = make_pack(target, "plain")
    text = merged_answer(target, plain)
    files = [make_pack(target, name, change) for name, change in CHANGES.items()]
    files += [plain, make_pack(target, "end", ends_with(text[1]))]
    expected = [merged_answer(target, file) for file in files]
    actual = generate_answers(str(target), files, PROMPT, TOKENS)
    assert [answer["text"] for answer in actual] == expected
    assert [answer["pack"] for answer in actual] == [file.name for file in files]
    assert len(set(expected)) == len(expected)  # every setting has a visible effect


@pytest.mark.slow
def test_a_lossless_pack_is_no_distance_from_a_tuned_model_of_other_settings(target):
    file = make_pack(target, "eps", other_eps)
    rows = [Row("abc", " de", "row 1"), Row("xy", " z", "row 2")]
    result = compare(target, target.with_name("eps"), file, rows)
    assert result.kl_mean < 1e-9
    assert result.top1_agreement == 1.0


@pytest.mark.parametrize(
    ("change", "named"), [(other_eps, "rms_norm_eps"), (renamed_letters, r"tokenizer\.json")]
)
def test_a_library_refuses_what_it_cannot_serve_beside_other_packs(target, change, named):
    library = Library.init(target.with_name("library"), target)
    with pytest.raises(PackMismatchError, match=named):
        library.add(make_pack(target, "own", change), "own")
    assert library.packs() == ()


def test_rows_of_a_library_end_and_continue_as_their_own_packs_do(target):
    plain = make_pack(target, "plain", seed=2)
    text = merged_answer(target, plain)
    mark_special(target, text[1])
    files = {"plain": plain, "end": make_pack(target, "end", ends_with(text[1]), seed=2)}
    files["penalty"] = make_pack(target, "penalty", penalized, seed=3)
    library = Library.init(target.with_name("library"), target)
    for name, file in files.items():
        library.add(file, name)
    actual = {name: library.generate(PROMPT, route=name, max_new_tokens=TOKENS) for name in files}
    expected = {name: merged_answer(target, file) for name, file in files.items()}
    assert {name: answer.text for name, answer in actual.items()} == expected
    assert len(expected["end"]) < len(expected["plain"])


def test_a_copied_list_of_settings_is_no_change(target):
    def spelled_anew(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(deepcopy(json.loads(file.read_text()))))

    library = Library.init(target.with_name("library"), target)
    library.add(make_pack(target, "spelled", spelled_anew), "spelled")
    assert [entry.name for entry in library.packs()] == ["spelled"]
