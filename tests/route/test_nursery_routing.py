"""The default router on four real skills, and on text of none of them."""

import gzip
import random

import pytest
import torch

from graftkit.models.loading import load_model, load_tokenizer
from graftkit.route import TARGET
from graftkit.route.centroid import CentroidRouter, fit_key
from graftkit.rows import read_rows

SKILLS = ("clinc150_intent", "nl_regex", "inflect_spa", "cmudict_g2p")
FOREIGN = ("sms_spam", "scan_actions", "zh_pinyin", "addition_synth", "snips_function_call")
ROWS = 100


class Nursery:
    """The nursery's target, and a router with keys of 100 training prompts for each skill."""

    def __init__(self, shared):
        self.shared = shared
        folder = shared / "nursery" / "target"
        model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
        keys = {name: fit_key(model, tokenizer, self.prompts(name, "train")) for name in SKILLS}
        self.router = CentroidRouter(model, tokenizer, keys)

    def prompts(self, name, split, count=ROWS):
        file = self.shared / "data" / "llm" / name / f"{split}.jsonl"
        return [row.prompt for row in read_rows(file)[:count]]

    def base_text(self, name, count):
        file = self.shared / "data" / "llm" / "base" / f"{name}.txt.gz"
        text, places = gzip.decompress(file.read_bytes()).decode(), random.Random(0)
        starts = [places.randrange(len(text) - 200) for _ in range(count)]
        return [text[start : start + 200] for start in starts]

    def names(self, prompts):
        return [route.name for route in self.router.route(prompts)]


@pytest.fixture(scope="module")
def nursery(shared):
    return Nursery(shared)


@pytest.mark.slow
def test_of_mixed_test_rows_nearly_all_find_their_pack_and_none_another(nursery):
    rows = [(name, prompt) for name in SKILLS for prompt in nursery.prompts(name, "test")]
    random.Random(0).shuffle(rows)
    actual = nursery.names([prompt for _, prompt in rows])
    pairs = [(name, pack) for (name, _), pack in zip(rows, actual, strict=True)]
    assert sum(pack in (name, TARGET) for name, pack in pairs) >= 0.97 * len(pairs)
    assert sum(pack == name for name, pack in pairs) >= 0.97 * len(pairs)


@pytest.mark.slow
def test_rows_of_no_skill_are_left_to_the_target(nursery):
    rows = [prompt for name in FOREIGN for prompt in nursery.prompts(name, "test", 40)]
    rows += [
        piece for name in ("books-valid", "python-valid") for piece in nursery.base_text(name, 40)
    ]
    assert sum(name != TARGET for name in nursery.names(rows)) <= 0.05 * len(rows)


@pytest.mark.slow
def test_a_skills_prompt_in_another_language_is_left_to_the_target(nursery):
    texts = ["wie wird das wetter morgen in berlin", "如何更改我的密码", "какая завтра погода"]
    prompts = [f"Äußerung: {text}\nAbsicht:" for text in texts]
    assert nursery.names(prompts) == [TARGET] * len(prompts)
