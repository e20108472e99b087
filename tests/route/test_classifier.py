"""The trained router: labels by loss, the same net every time, no other packs than its own."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, save_tokenizer

from graftkit.attachment import attached
from graftkit.checkpoint import Checkpoint
from graftkit.errors import CheckpointError, ConfigError, RowsError
from graftkit.models.loading import load_model, load_tokenizer
from graftkit.pack import pack_delta
from graftkit.route import TARGET
from graftkit.route import classifier as classifier_module
from graftkit.route.classifier import (
    Classifier,
    ClassifierRouter,
    completion_losses,
    label_rows,
    train_classifier,
)
from graftkit.rows import Row

SKILLS = {"digits": ("0123456789", "one"), "upper": ("ABCDEFGHIJ", "two")}
FOREIGN = ("!#$%&()*+;", "three")


def rows_of(skill, count, seed):
    alphabet, completion = skill
    generator = random.Random(seed)
    prompts = [
        "".join(generator.choices(alphabet, k=generator.randrange(5, 12))) for _ in range(count)
    ]
    return [Row(prompt, f" {completion}") for prompt in prompts]


def tune(model, tokenizer, rows):
    """A few steps on prompt + completion, enough for the completion to be likely."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for row in rows:
        ids = torch.tensor([[*tokenizer.encode(row.prompt + row.completion), 2]])
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


class Case:
    """A tiny target and two packs, each of which has learned one answer."""

    def __init__(self, folder):
        build("llama", scale=0.3).save_pretrained(folder / "target")
        save_tokenizer(folder / "target")
        self.tokenizer = load_tokenizer(folder / "target")
        self.packs = {}
        for name, skill in SKILLS.items():
            tuned = load_model(folder / "target", torch.float32)
            tune(tuned, self.tokenizer, rows_of(skill, 25, seed=0))
            tuned.save_pretrained(folder / name)
            self.packs[name] = pack_delta(
                folder / "target", folder / name, recipe="lossless", workers=1
            )
        self.model = load_model(Checkpoint.open(folder / "target"), torch.float32)
        self.rows = {name: rows_of(skill, 20, seed=1) for name, skill in SKILLS.items()}
        self.rows[TARGET] = rows_of(FOREIGN, 20, seed=1)
        self.digests = {name: pack.digest for name, pack in self.packs.items()}

    def train(self, labels="task", seed=0):
        return train_classifier(
            self.model, self.tokenizer, self.packs, self.rows, labels=labels, seed=seed
        )


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("classifier"))


def accuracy(case, classifier):
    router = ClassifierRouter(case.model, case.tokenizer, classifier)
    right = 0
    for name, skill in {**SKILLS, TARGET: FOREIGN}.items():
        routes = router.route([row.prompt for row in rows_of(skill, 30, seed=2)])
        right += sum(route.name == name for route in routes)
    return right / 90


@pytest.mark.slow
def test_a_net_trained_on_names_finds_them_on_other_prompts(case):
    assert accuracy(case, case.train("task")) >= 0.9


def test_the_label_of_a_row_is_the_pack_of_its_lowest_loss(case):
    rows = [row for name in SKILLS for row in case.rows[name]]
    losses = [completion_losses(case.model, case.tokenizer, rows)]
    for pack in case.packs.values():
        with attached(case.model, pack):
            losses.append(completion_losses(case.model, case.tokenizer, rows))
    best = torch.stack(losses).argmin(dim=0)
    assert set(best.tolist()) == {1, 2}
    labels = label_rows(case.model, case.tokenizer, case.packs, rows)
    assert labels == [[TARGET, *SKILLS][number] for number in best]


def test_a_pack_that_does_not_win_by_a_margin_leaves_the_row_to_the_target(case):
    same = {"digits": case.packs["digits"]}
    rows = rows_of(SKILLS["digits"], 5, seed=3)
    assert set(label_rows(case.model, case.tokenizer, same, rows)) == {"digits"}
    unlearned = [Row(row.prompt, " zzz") for row in rows]
    assert set(label_rows(case.model, case.tokenizer, same, unlearned)) == {TARGET}


def test_a_loss_is_that_of_the_completion_alone_whatever_is_in_the_batch(case):
    rows = [*case.rows["digits"][:3], Row("a much longer prompt than those", " one")]
    together = completion_losses(case.model, case.tokenizer, rows)
    alone = torch.cat([completion_losses(case.model, case.tokenizer, [row]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    ids = torch.tensor([[*case.tokenizer.encode(rows[0].prompt + rows[0].completion), 2]])
    start = len(case.tokenizer.encode(rows[0].prompt))
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < start, -100)
    with torch.no_grad():
        expected = case.model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(together[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_same_rows_and_seed_give_the_same_net_bit_for_bit(case, tmp_path):
    for number in range(2):
        case.train("loss").save(tmp_path / str(number))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    other = case.train("loss", seed=1)
    assert not torch.equal(other.tensors["weight_1"], case.train("loss").tensors["weight_1"])


def test_a_net_comes_back_from_its_file_and_routes_the_same(case, tmp_path):
    classifier = case.train()
    classifier.save(tmp_path / "classifier.safetensors")
    again = Classifier.load(tmp_path / "classifier.safetensors", case.digests)
    prompts = ["0123", "ABCD", "!!!!", ""]
    one, two = (
        ClassifierRouter(case.model, case.tokenizer, net).route(prompts)
        for net in (classifier, again)
    )
    assert one == two
    assert one[-1].name == TARGET


def test_a_route_does_not_depend_on_the_batch(case):
    router = ClassifierRouter(case.model, case.tokenizer, case.train())
    prompts = [row.prompt for rows in case.rows.values() for row in rows[:5]]
    assert [router.route([prompt])[0] for prompt in prompts] == router.route(prompts)


def test_a_net_of_other_packs_is_refused(case, tmp_path):
    file = tmp_path / "classifier.safetensors"
    case.train().save(file)
    fewer = {"digits": case.digests["digits"]}
    changed = {**case.digests, "upper": "0" * 64}
    for digests in (fewer, changed, {**case.digests, "new": "0" * 64}, {}):
        with pytest.raises(ConfigError, match="train it again"):
            Classifier.load(file, digests)


def test_a_router_that_was_never_trained_is_missed_by_name(case, tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.safetensors: no classifier here yet"):
        Classifier.load(tmp_path / "nothing.safetensors", case.digests)


@pytest.mark.parametrize("damage", ["text", "cut", "shape", "nan", "metadata", "surplus"])
def test_a_damaged_file_is_refused(case, tmp_path, damage):
    file = tmp_path / "classifier.safetensors"
    case.train().save(file)
    tensors, content = load_file(file), file.read_bytes()
    if damage == "text":
        file.write_bytes(b"not a file of tensors")
    elif damage == "cut":
        file.write_bytes(content[:-8])
    elif damage == "metadata":
        save_file(tensors, file)
    else:
        if damage == "shape":
            tensors["weight_2"] = tensors["weight_2"][:1].clone()
        elif damage == "nan":
            tensors["bias_1"][0] = torch.nan
        else:
            tensors["more"] = torch.zeros(1)
        text = content[8 : 8 + int.from_bytes(content[:8], "little")].decode()
        reported = json.loads(text)["__metadata__"]
        save_file(tensors, file, metadata=reported)
    with pytest.raises(ConfigError, match="train it again"):
        Classifier.load(file, case.digests)


def test_rows_of_no_skill_are_needed_and_unknown_names_refused(case):
    skills = {name: rows for name, rows in case.rows.items() if name != TARGET}
    with pytest.raises(RowsError, match="under the name target"):
        train_classifier(case.model, case.tokenizer, case.packs, skills)
    with pytest.raises(ConfigError, match="rows are given for law"):
        train_classifier(case.model, case.tokenizer, case.packs, {"law": []})
    with pytest.raises(RowsError, match="completion"):
        completion_losses(case.model, case.tokenizer, [Row("", " a")])


def test_a_net_of_another_width_is_refused(case):
    narrow = Classifier(1, {}, {"center": torch.zeros(7)})
    with pytest.raises(ConfigError, match="width 7"):
        ClassifierRouter(case.model, case.tokenizer, narrow)


def test_a_pack_without_finite_logits_is_no_rows_best(case, monkeypatch):
    def losses(model, tokenizer, rows):
        actual = completion_losses(model, tokenizer, rows)
        return actual if not hasattr(losses, "seen") else actual * float("nan")

    def once(*arguments):
        actual = losses(*arguments)
        losses.seen = True
        return actual

    monkeypatch.setattr(classifier_module, "completion_losses", once)
    with pytest.raises(CheckpointError, match="digits: the logits are not finite"):
        label_rows(case.model, case.tokenizer, case.packs, case.rows["digits"][:2])


def test_one_row_gives_a_net_that_its_reader_takes(case, tmp_path):
    rows = {TARGET: case.rows[TARGET][:1]}
    net = train_classifier(case.model, case.tokenizer, case.packs, rows, labels="task")
    net.save(tmp_path / "classifier.safetensors")
    again = Classifier.load(tmp_path / "classifier.safetensors", case.digests)
    assert again.packs == net.packs == case.digests
    assert again.tensors.keys() == net.tensors.keys()
    assert all(torch.equal(again.tensors[name], value) for name, value in net.tensors.items())
    assert all(value.isfinite().all() for value in net.tensors.values())
