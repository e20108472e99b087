import shutil
import threading

import pytest
import torch
from library.conftest import NAMES, prompts_of
from tiny_models import build, lossless_pack, make_pair

from graftkit import SkillPack, attached
from graftkit.errors import ConfigError, GraftError, LibraryError, PackMismatchError, RowsError
from graftkit.library import Library
from graftkit.library.folder import PackFolder
from graftkit.models.loading import load_model
from graftkit.skillpack.manifest import RouterInfo

MIXED = [prompts_of(name, 3, seed=5)[place] for place in range(3) for name in NAMES]


def state_of(library: Library) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in library.live.model.state_dict().items()}


def reference(world, name: str | None, prompt: str, new_tokens: int = 8) -> str:
    """What the target with one pack merged in says to one prompt alone."""
    library = Library.init(world.target.parent / f"reference-{name}-{hash(prompt)}", world.target)
    live = library.live
    (ids,) = live.encode([prompt])
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": 2}
    live.attachment.detach()
    if name is None:
        output = live.model.generate(torch.tensor([ids]), **options)
    else:
        with attached(live.model, SkillPack.load(world.packs[name])):
            output = live.model.generate(torch.tensor([ids]), **options)
    return live.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


# Adding and removing.


def test_a_library_is_opened_without_loading_a_model(full):
    library = Library.open(full)
    assert [entry.label for entry in library.packs()] == ["digits@1", "upper@1", "lower@1"]
    assert library._live is None


def test_an_added_pack_is_the_given_file(full, world):
    library = Library.open(full)
    for entry in library.packs():
        assert (full / entry.file).read_bytes() == world.packs[entry.name].read_bytes()
        assert entry.has_key
    assert library.load("digits").manifest.tuned.name == "digits"


def test_prompts_become_the_key_of_a_pack_that_has_none(world, library):
    entry = library.add(world.plain, "plain", prompts_of("lower", seed=3))
    assert entry.has_key
    pack, given = library.load("plain"), SkillPack.load(world.plain)
    assert pack.router_key is not None
    assert pack.manifest.tensors == given.manifest.tensors
    assert library.add(world.plain, "keyless").has_key is False


def test_too_few_prompts_are_refused_and_nothing_is_added(world, library):
    with pytest.raises(RowsError, match="a router key needs at least 20"):
        library.add(world.plain, "plain", prompts_of("lower", count=5))
    assert "plain" not in library.index.newest


def test_a_pack_of_another_target_is_refused(world, library):
    with pytest.raises(
        PackMismatchError, match=r"foreign\.skillpack: made for other .*this library"
    ):
        library.add(world.foreign, "foreign")
    assert "foreign" not in library.index.newest


def test_a_file_that_is_no_pack_is_refused(world, library, tmp_path):
    broken = tmp_path / "broken.skillpack"
    broken.write_bytes(world.plain.read_bytes()[:-20])
    with pytest.raises(GraftError, match=r"broken\.skillpack"):
        library.add(broken, "broken")
    with pytest.raises(GraftError, match="cannot be read"):
        library.add(tmp_path / "nowhere.skillpack", "nowhere")


@pytest.mark.slow
def test_a_pack_that_resizes_the_vocabulary_is_refused(tmp_path):
    target, tuned = make_pair(tmp_path, "llama", torch.float32)
    model = build("llama", torch.float32, seed=3)
    model.resize_token_embeddings(100)
    model.save_pretrained(tuned)
    file = tmp_path / "resized.skillpack"
    lossless_pack(target, tuned).save(file)
    library = Library.init(tmp_path / "library", target)
    with pytest.raises(PackMismatchError, match="cannot serve beside other packs"):
        library.add(file, "resized")


def test_a_target_whose_config_has_changed_is_refused(world, tmp_path):
    target = shutil.copytree(world.target, tmp_path / "target")
    library = Library.init(tmp_path / "library", target)
    config = target / "config.json"
    config.write_text(config.read_text().replace("10000.0", "20000.0"))
    with pytest.raises(PackMismatchError, match=r"config\.json is not what it was"):
        library.generate("0123")


# Answers.


def test_every_row_of_a_batch_is_answered_by_its_own_pack(world, library):
    answers = library.generate(MIXED, max_new_tokens=8)
    assert [answer.route.name for answer in answers] == [*NAMES] * 3
    for answer in answers[:3]:
        assert answer.text == reference(world, answer.route.name, answer.prompt)


@pytest.mark.slow
def test_an_answer_does_not_depend_on_its_batch(library):
    together = library.generate(MIXED, max_new_tokens=8)
    alone = [library.generate(prompt, max_new_tokens=8) for prompt in MIXED]
    assert together == alone


def test_what_no_pack_accepts_the_target_answers(world, library):
    answer = library.generate("!?!?;;::!!", max_new_tokens=8)
    assert answer.route.name == "target"
    assert answer.route.scores.keys() == set(NAMES)
    assert answer.text == reference(world, None, "!?!?;;::!!")


def test_an_empty_library_is_its_target(world, tmp_path):
    library = Library.init(tmp_path / "library", world.target)
    answers = library.generate(MIXED[:2], max_new_tokens=8)
    assert [answer.text for answer in answers] == [reference(world, None, p) for p in MIXED[:2]]
    assert library.route(MIXED[:1])[0].scores == {}


@pytest.mark.slow
def test_a_route_by_name_version_or_digest_takes_no_router(world, library):
    entry = library.add(world.plain, "digits", update=True)
    by_name = library.generate("klmn", route="digits", max_new_tokens=8)
    assert by_name == library.generate("klmn", route="digits@2", max_new_tokens=8)
    assert by_name == library.generate("klmn", route=entry.digest[:8], max_new_tokens=8)
    old = library.generate("klmn", route="digits@1", max_new_tokens=8)
    assert old.text == reference(world, "digits", "klmn") != by_name.text
    assert library.generate("klmn", route="target").route.name == "target"
    with pytest.raises(LibraryError, match="no pack 'nobody' here; the packs are digits"):
        library.generate("klmn", route="nobody")


def test_a_prompt_that_cannot_be_continued_gets_a_note(library):
    empty, long, fine = library.generate(["", "0" * 64, "0123"], max_new_tokens=4)
    assert "no tokens" in empty.note
    assert "64 tokens, and the target reads 64" in long.note
    assert (empty.text, long.text, fine.note) == ("", "", None)
    assert empty.route.name == long.route.name == "target"


@pytest.mark.slow
def test_an_answer_ends_where_the_context_does(library):
    short, alone = "0" * 60, library.generate("012345", max_new_tokens=16)
    long, other = library.generate([short, "012345"], max_new_tokens=16)
    assert len(library.live.encode([long.text])[0]) <= 4
    assert other == alone


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["deltas", "probabilities"])
def test_several_packs_may_share_a_prompt(library, mix):
    pair = prompts_of("digits", 1)[0][:6] + prompts_of("upper", 1)[0][:6]
    key = {entry.name: 0.5 for entry in library.packs()[:2]}
    library._router = lambda name, top_k: _Always(key)
    mixed = library.generate([pair, pair], top_k=2, mix=mix, max_new_tokens=8)
    assert mixed[0].route.weights == key
    assert mixed[0].text == mixed[1].text
    library._router = lambda name, top_k: _Always({"digits": 1.0})
    whole = library.generate(pair, top_k=2, mix=mix, max_new_tokens=8)
    assert whole.text == library.generate(pair, route="digits", max_new_tokens=8).text


class _Always:
    def __init__(self, weights):
        self.weights = weights

    def route(self, prompts):
        from graftkit.route import Route

        return [Route(self.weights, {}) for _ in prompts]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": "logits"}, "mix is 'logits'; choose one of deltas, probabilities"),
        ({"max_new_tokens": 0}, "it must be at least 1"),
        ({"router": "oracle"}, "router 'oracle' is unknown; choose one of keys"),
        ({"top_k": 0}, "top_k is 0"),
        ({"router": "spectral", "top_k": 2}, "chooses one pack, asked are 2"),
        ({"router": "classifier"}, "no classifier here yet"),
    ],
)
def test_options_that_cannot_be_are_refused(library, options, message):
    with pytest.raises(ConfigError, match=message):
        library.generate("0123", **options)


@pytest.mark.slow
def test_the_target_is_the_same_after_everything(library):
    before = state_of(library)
    library.generate(MIXED, max_new_tokens=4)
    library.remove("digits")
    library.generate(MIXED, max_new_tokens=4)
    library.live.attachment.detach()
    after = library.live.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# Memory.


@pytest.mark.slow
def test_packs_stay_below_the_limit_and_the_least_recently_used_leave(full):
    free = Library.open(full)
    free.generate(MIXED, max_new_tokens=4)
    sizes = [free.live.attachment.nbytes(index) for index in free.live.memory._indices.values()]
    library = Library.open(full, memory=sum(sorted(sizes)[1:]))
    memory = library.live.memory
    for name in ("digits", "upper", "digits", "lower"):
        library.generate("0123", route=name, max_new_tokens=2)
        assert memory.nbytes <= sum(sorted(sizes)[1:])
    kept = [library.index.find(name).digest for name in ("digits", "lower")]
    assert memory.digests == kept


@pytest.mark.slow
def test_a_batch_that_needs_more_than_the_limit_runs_in_parts(full):
    free = Library.open(full)
    expected = free.generate(MIXED, max_new_tokens=8)
    one = max(free.live.attachment.nbytes(i) for i in free.live.memory._indices.values())
    library = Library.open(full, memory=one)
    assert library.generate(MIXED, max_new_tokens=8) == expected
    assert len(library.live.memory.digests) == 1


def test_a_pack_larger_than_the_limit_is_refused_by_name_and_leaves_memory(full):
    library = Library.open(full, memory="1KB")
    with pytest.raises(ConfigError, match="upper@1 do not fit into 1,000 bytes"):
        library.generate("0123", route="upper")
    assert library.live.memory.digests == []
    assert library.generate("0123", route="target", max_new_tokens=2).text


@pytest.mark.parametrize("memory", ["much", "5%", "1bpp"])
def test_memory_that_is_no_size_is_refused(full, memory):
    with pytest.raises(ConfigError, match="500MB or 2GB"):
        Library.open(full, memory=memory)


@pytest.mark.slow
def test_a_failing_pack_leaves_the_others_at_work(folder, world):
    library = Library.open(folder)
    entry = library.index.find("upper")
    (folder / entry.file).write_bytes(b"damaged")
    with pytest.raises(LibraryError, match="not the file that was added"):
        library.generate("0123", route="upper")
    answer = library.generate("0123", route="digits", max_new_tokens=8)
    assert answer.text == reference(world, "digits", "0123")


# What somebody else does.


def test_a_change_by_somebody_else_is_seen_by_the_next_call(folder):
    library = Library.open(folder)
    prompt = prompts_of("upper", 1, seed=4)[0]
    assert library.generate(prompt, max_new_tokens=2).route.name == "upper"
    digest = library.index.find("upper").digest
    PackFolder(folder).remove("upper")
    assert library.generate(prompt, max_new_tokens=2).route.name != "upper"
    assert digest not in library.live.memory.digests


def test_adding_and_removing_a_pack_leaves_the_scores_of_the_others(folder, world):
    library = Library.open(folder)
    before = library.route(MIXED)
    library.add(world.plain, "plain", prompts_of("lower", seed=3))
    with_more = library.route(MIXED)
    library.remove("plain")
    assert library.route(MIXED) == before
    for old, new in zip(before, with_more, strict=True):
        assert {name: new.scores[name] for name in old.scores} == old.scores


@pytest.mark.slow
def test_one_model_is_loaded_however_much_is_asked(folder, monkeypatch):
    loads = []
    monkeypatch.setattr(
        "graftkit.library.live.load_model", lambda *a: (loads.append(1), load_model(*a))[1]
    )
    library = Library.open(folder)
    library.route(MIXED)
    library.generate(MIXED, max_new_tokens=2)
    library.remove("upper")
    library.generate(MIXED, max_new_tokens=2)
    assert loads == [1]


@pytest.mark.slow
def test_threads_that_share_a_library_get_the_answers_of_one_thread(full):
    library = Library.open(full)
    prompts = [[*prompts_of(name, 2, seed=5)] for name in NAMES]
    expected = [[answer.text for answer in library.generate(p, max_new_tokens=6)] for p in prompts]
    actual = {}

    def work(place):
        for _ in range(3):
            answers = library.generate(prompts[place], max_new_tokens=6)
            actual.setdefault(place, []).append([answer.text for answer in answers])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(NAMES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert actual == {place: [texts] * 3 for place, texts in enumerate(expected)}


def test_a_pack_with_a_key_of_an_absent_encoder_is_named_and_never_chosen(world, tmp_path):
    info = RouterInfo(
        layer=1,
        width=2,
        components=1,
        prompts=20,
        blake3="0" * 64,
        encoder="all-MiniLM-L6-v2 0123456789abcdef",
        method="nearest",
    )
    content = torch.tensor([20.0, -5.0, -5.0]).numpy().tobytes() + b"\x01\x7f"
    keyed = tmp_path / "keyed.skillpack"
    SkillPack.load(world.plain).with_router_key(info, content).save(keyed)
    library = Library.init(tmp_path / "library", world.target)
    library.add(keyed, "keyed")
    (line,) = library.routing_warnings(unread_only=True)
    assert "keyed is never chosen: its router key needs the sentence encoder all-MiniLM" in line
    assert library.route(["0123"])[0].name == "target"
