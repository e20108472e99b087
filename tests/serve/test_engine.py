"""Many requests on one model, each with the answer that it gets alone."""

import itertools
import random
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny_models import VOCABULARY

from graftkit.attachment import attached
from graftkit.checkpoint import Checkpoint
from graftkit.errors import AttachError, BusyError, ConfigError, UnknownModelError
from graftkit.models.loading import load_model
from graftkit.models.text import generate_greedy, usable_tokenizer
from graftkit.pack import pack_delta
from graftkit.rows import read_rows
from graftkit.serve.engine import Engine, GenerationRequest
from graftkit.serve.sampling import SamplingSettings

MIXTURES = (
    {},
    {"math": 1.0},
    {"code": 1.0},
    {"poem": 1.0},
    {"chat": 1.0},
    {"math": 0.7, "code": 0.3},
    {"poem": 0.5, "chat": 0.5, "math": -0.25},
)


class Reader:
    """Collects an answer."""

    def __init__(self):
        self.parts = []
        self._done = threading.Event()

    def __call__(self, part):
        self.parts.append(part)
        if part.finish is not None:
            self._done.set()

    def wait(self):
        assert self._done.wait(60)
        return self

    @property
    def tokens(self):
        return [token.id for part in self.parts for token in part.tokens]

    @property
    def text(self):
        return "".join(part.text for part in self.parts)

    @property
    def finish(self):
        return self.parts[-1].finish


@contextmanager
def serving(world, packs=None, **options):
    checkpoint = Checkpoint.open(world.target)
    model = load_model(checkpoint, torch.float32)
    with Engine(model, usable_tokenizer(checkpoint), checkpoint, **options) as engine:
        for name in world.packs if packs is None else packs:
            engine.load(name, world.packs[name])
        yield engine


def ask(engine, weights, ids, reader=None, seconds=None, **sampling):
    reader = reader or Reader()
    options = SamplingSettings(**{"max_tokens": 8, **sampling})
    with engine.lease(weights) as lease:
        reader.row = engine.submit(GenerationRequest(lease, ids, options, seconds), reader)
    return reader


def prompts(count, longest=40, seed=0):
    draw = random.Random(seed)
    return [
        [draw.randrange(4, VOCABULARY) for _ in range(draw.randrange(1, longest))]
        for _ in range(count)
    ]


def alone(world, questions, max_tokens=8, ends=2):
    """Greedy tokens of each (mixture, prompt) with its packs attached, one by one."""
    checkpoint = Checkpoint.open(world.target)
    model = load_model(checkpoint, torch.float32)
    names = list(world.packs)
    answers = []
    with attached(model, list(world.packs.values()), mode="side") as attachment:
        for weights, ids in questions:
            attachment.route([{names.index(name): w for name, w in weights.items()}])
            output = generate_greedy(model, [ids], max_tokens, eos_token_id=ends, pad_token_id=0)
            answers.append(output[0].tolist())
    return answers


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "mistral_windowed", "gemma2", "gpt_neox", "qwen2", "mixtral"]
)
def test_32_requests_that_join_at_random_moments_answer_as_they_do_alone(world_of, architecture):
    world = world_of(architecture)
    questions = [(MIXTURES[i % len(MIXTURES)], ids) for i, ids in enumerate(prompts(32))]
    expected = alone(world, questions)
    draw = random.Random(1)
    with serving(world, slots=8, chunk=7) as engine:
        readers = []
        for weights, ids in questions:
            readers.append(ask(engine, weights, ids))
            time.sleep(draw.choice([0, 0, 0.002, 0.01]))
        answers = [reader.wait().tokens for reader in readers]
    right = sum(own == answer for own, answer in zip(expected, answers, strict=True))
    assert right == 32


def test_the_packs_of_a_test_answer_differently(world_of):
    answers = alone(world_of(), [(weights, [40, 41, 42, 43]) for weights in MIXTURES])
    assert len({tuple(answer) for answer in answers}) >= 5


def test_a_long_prompt_does_not_keep_others_waiting(world_of):
    world = world_of()
    with serving(world, packs=["math"], slots=2, chunk=4) as engine:
        widths = []
        run = engine.decoder.run

        def watched(rows):
            widths.append([len(row.tokens) for row in rows])
            return run(rows)

        engine.decoder.run = watched
        first = ask(engine, {"math": 1.0}, [40, 41], max_tokens=40)
        second = ask(engine, {}, list(range(4, 54)), max_tokens=2)
        first.wait(), second.wait()
    chunks = [place for place, width in enumerate(widths) if width == [4]]
    assert len(chunks) >= 12
    # Between two chunks of the long prompt the other row gets a token.
    assert all(later - earlier == 2 for earlier, later in itertools.pairwise(chunks))


def test_sampling_with_a_seed_repeats_itself_and_other_seeds_do_not(world_of):
    with serving(world_of(), packs=["math"]) as engine:
        options = {"temperature": 1.5, "max_tokens": 12}
        drawn = [
            ask(engine, {"math": 1.0}, [50, 51], seed=seed, **options) for seed in (1, 1, 2, 3)
        ]
        first, same, *others = [reader.wait().tokens for reader in drawn]
    assert first == same
    assert any(other != first for other in others)


def test_top_k_1_and_a_tiny_top_p_are_greedy(world_of):
    with serving(world_of(), packs=[]) as engine:
        greedy = ask(engine, {}, [50, 51]).wait().tokens
        for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-9}):
            own = ask(engine, {}, [50, 51], **{"temperature": 1.0, "seed": 5, **options})
            assert own.wait().tokens == greedy


def test_a_stop_text_ends_the_answer_before_it(world_of):
    with serving(world_of(), packs=[]) as engine:
        whole = ask(engine, {}, [50, 51, 52], max_tokens=20).wait()
        stop = whole.text[3:5]
        short = ask(engine, {}, [50, 51, 52], max_tokens=20, stop=(stop, "never")).wait()
    assert len(whole.text) > 6
    assert short.text == whole.text[: whole.text.index(stop)]
    assert short.finish == "stop"
    assert all(stop not in part.text for part in short.parts)


def test_log_probabilities_are_those_of_the_model(world_of):
    world = world_of()
    checkpoint = Checkpoint.open(world.target)
    model = load_model(checkpoint, torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([[50, 51, 52]])).logits[0, -1].log_softmax(-1)
    with serving(world, packs=[]) as engine:
        [part, *_] = ask(engine, {}, [50, 51, 52], logprobs=3).wait().parts
    [token] = part.tokens
    values, ids = expected.topk(3)
    assert [id_ for id_, _ in token.top] == ids.tolist()
    torch.testing.assert_close(torch.tensor([v for _, v in token.top]), values)
    assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)


def test_one_request_whose_reader_fails_leaves_the_others_alone(world_of):
    world = world_of()
    questions = [({"math": 1.0}, ids) for ids in prompts(4)]

    def broken(part):
        raise OSError("the reader is gone")

    with serving(world) as engine:
        with engine.lease({"code": 1.0}) as lease:
            engine.submit(GenerationRequest(lease, [60, 61], SamplingSettings(8)), broken)
        readers = [ask(engine, *question) for question in questions]
        answers = [reader.wait().tokens for reader in readers]
        assert engine.is_running
    assert answers == alone(world, questions)


def test_a_pass_that_fails_for_one_row_is_run_again_for_the_others(world_of):
    world = world_of()
    questions = [(MIXTURES[i], ids) for i, ids in enumerate(prompts(4))]
    with serving(world) as engine:
        run = engine.decoder.run

        def failing(rows):
            if any(list(row.tokens)[:1] == [7] and row.start == 0 for row in rows):
                raise RuntimeError("a bad row")
            return run(rows)

        engine.decoder.run = failing
        bad = ask(engine, {}, [7, 8, 9])
        readers = [ask(engine, *question) for question in questions]
        answers = [reader.wait().tokens for reader in readers]
        assert bad.wait().finish == "error"
        assert bad.parts[-1].error == "RuntimeError"
    assert answers == alone(world, questions)


def test_a_request_is_cancelled_and_another_is_too_late(world_of):
    with serving(world_of(), packs=["math"]) as engine:
        reader = Reader()
        reader_row = ask(engine, {"math": 1.0}, [40, 41], reader, max_tokens=50).row
        reader_row.cancel()
        assert reader.wait().finish == "cancelled"
        assert ask(engine, {}, [40], seconds=-1.0).wait().finish == "timeout"
        assert ask(engine, {}, [40, 41]).wait().finish == "length"


def test_a_full_queue_is_said_at_once(world_of):
    with serving(world_of(), packs=[], slots=1, queue=1) as engine:
        gate = threading.Event()
        blocked = threading.Thread(target=engine.call, args=(gate.wait,))
        blocked.start()
        time.sleep(0.05)
        first = ask(engine, {}, [40])
        with pytest.raises(BusyError, match="1 requests wait"):
            ask(engine, {}, [41])
        gate.set()
        blocked.join()
        assert first.wait().finish == "length"


def test_a_pack_that_is_unloaded_ends_its_requests_first(world_of):
    world = world_of()
    [expected] = alone(world, [({"math": 1.0}, [40, 41])], max_tokens=30)
    with serving(world, packs=["math"]) as engine:
        reader = ask(engine, {"math": 1.0}, [40, 41], max_tokens=30)
        engine.unload("math")
        with pytest.raises(UnknownModelError, match="math"):
            ask(engine, {"math": 1.0}, [40])
        assert reader.wait().tokens == expected
        assert engine.call(lambda: dict(engine._attachment.packs)) == {}


def test_a_replaced_pack_answers_new_requests_and_the_old_one_those_before(world_of):
    world = world_of()
    questions = [({"math": 1.0}, [40, 41]), ({"code": 1.0}, [40, 41])]
    expected = alone(world, questions, max_tokens=20)
    with serving(world, packs=["math"]) as engine:
        old = ask(engine, {"math": 1.0}, [40, 41], max_tokens=20)
        with pytest.raises(ConfigError, match="served already"):
            engine.load("math", world.packs["code"])
        engine.load("math", world.packs["code"], replace=True)
        new = ask(engine, {"math": 1.0}, [40, 41], max_tokens=20)
        assert [old.wait().tokens, new.wait().tokens] == expected
        assert len(engine.call(lambda: dict(engine._attachment.packs))) == 1


def test_packs_come_and_go_while_requests_run(world_of):
    world = world_of()
    questions = [({"math": 1.0}, ids) for ids in prompts(24, seed=5)]
    expected = alone(world, questions)
    with serving(world, packs=["math"], slots=4) as engine:
        readers = [ask(engine, *question) for question in questions]
        for name in ("code", "poem", "chat", "code"):
            engine.load(name, world.packs[name])
            ask(engine, {name: 1.0}, [40, 41])
            engine.unload(name)
        assert [reader.wait().tokens for reader in readers] == expected


def test_closing_ends_what_still_runs_and_leaves_the_target_as_it_was(world_of):
    world = world_of()
    checkpoint = Checkpoint.open(world.target)
    model = load_model(checkpoint, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = Engine(model, usable_tokenizer(checkpoint), checkpoint)
    engine.load("math", world.packs["math"])
    reader = ask(engine, {"math": 1.0}, [40, 41], max_tokens=50)
    engine.close()
    assert reader.wait().finish == "cancelled"
    assert not engine.is_running
    with pytest.raises(BusyError):
        ask(engine, {}, [40])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_prompts_that_cannot_be_continued_are_refused(world_of):
    with serving(world_of(), packs=[]) as engine:
        with pytest.raises(ConfigError, match="no tokens"):
            ask(engine, {}, [])
        with pytest.raises(ConfigError, match="64 in all"):
            ask(engine, {}, [5] * 64)


def test_a_model_that_cannot_be_served_is_refused(world_of):
    world = world_of("bert")
    checkpoint = Checkpoint.open(world.target)
    with pytest.raises(AttachError, match="cannot be served"):
        Engine(load_model(checkpoint), usable_tokenizer(checkpoint), checkpoint)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_32_requests_over_real_packs_answer_as_they_do_alone(shared):
    nursery = shared / "nursery"
    skills = ("clinc150_intent", "cmudict_g2p", "inflect_spa", "nl_regex")
    packs = {
        name: pack_delta(nursery / "target", nursery / skill, budget="5%")
        for name, skill in zip(("math", "code", "poem", "chat"), skills, strict=True)
    }
    world = SimpleNamespace(target=nursery / "target", packs=packs)
    tokenizer = usable_tokenizer(Checkpoint.open(world.target))
    texts = [
        row.prompt
        for skill in skills
        for row in read_rows(shared / f"data/llm/{skill}/test.jsonl")[:8]
    ]
    questions = [
        (MIXTURES[i % len(MIXTURES)], list(tokenizer.encode(text))) for i, text in enumerate(texts)
    ]
    expected = alone(world, questions, max_tokens=16, ends=tokenizer.eos_token_id)
    draw = random.Random(2)
    with serving(world, chunk=16) as engine:
        readers = []
        for weights, ids in questions:
            readers.append(ask(engine, weights, ids, max_tokens=16))
            time.sleep(draw.choice([0, 0.01, 0.05]))
        answers = [reader.wait().tokens for reader in readers]
    right = sum(own == answer for own, answer in zip(expected, answers, strict=True))
    assert right == 32
