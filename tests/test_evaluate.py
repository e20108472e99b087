import math
from dataclasses import replace

import pytest
import tiny_models
import torch
import transformers
from tiny_models import lossless_pack
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from graftkit import evaluate
from graftkit.errors import CheckpointError, CheckpointMismatchError, RowsError
from graftkit.evaluate import compare, exact_match, token_fidelity
from graftkit.models import load_model, load_tokenizer
from graftkit.rows import Row, encode_row, read_rows

ROWS = [Row("ab", " cde"), Row("hello there", " x"), Row("q", " r"), Row("abcdefgh", " ijkl")]


def make_tokenizer(eos=True):
    """One token a character; ids 0 to 3 are special."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, "\n": 95}
    vocabulary |= {chr(32 + index): 4 + index for index in range(91)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = ["pad_token", "unk_token", *["eos_token"] * eos]
    special = {name: f"<{name[:3]}>" for name in names}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def answered_rows(model, tokenizer, prompts):
    """Rows whose completion is what the model says by itself, one prompt at a time, unpadded.

    Random models never say EOS, so the sixth token of each answer becomes a stop token.
    """
    answers = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
        answers.append(model.generate(ids, generation_config=config)[0, ids.shape[1] :].tolist())
    stops = {answer[-1] for answer in answers}
    model.generation_config.eos_token_id = sorted(stops)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        end = next(place for place, token in enumerate(answer) if token in stops) + 1
        rows.append(Row(prompt, tokenizer.decode(answer[:end], skip_special_tokens=True)))
    return rows


class ScriptedModel(torch.nn.Module):
    """Says the same text after every prompt: enough of a model for `exact_match`."""

    device = torch.device("cpu")

    def __init__(self, text, tokenizer, eos=2):
        super().__init__()
        self.config = transformers.LlamaConfig(max_position_embeddings=64)
        self.generation_config = GenerationConfig(eos_token_id=eos)
        self.ids = tokenizer.encode(text)
        self.seen = []

    def generate(self, input_ids, attention_mask, generation_config, stopping_criteria):
        self.seen.append((input_ids, attention_mask, generation_config))
        for token in [*self.ids, 2, 0][: generation_config.max_new_tokens]:
            column = torch.full((len(input_ids), 1), token)
            input_ids = torch.cat([input_ids, column], dim=1)
            if all(stopping_criteria[0](input_ids, None)):
                break
        return input_ids


def reference_divergences(tuned, packed, tokenizer, rows):
    """KL of every completion token, one row at a time in float64."""
    values = []
    for row in rows:
        encoded = encode_row(tokenizer, row)
        ids, start = encoded.ids, encoded.start
        with torch.no_grad():
            p, q = (
                torch.log_softmax(model(torch.tensor([ids])).logits[0, start - 1 : -1].double(), -1)
                for model in (tuned, packed)
            )
        values.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(values)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral"])
def test_divergence_in_padded_batches_is_that_of_single_rows(architecture):
    tuned, packed = (tiny_models.build(architecture, seed=seed) for seed in (0, 1))
    tokenizer = make_tokenizer()
    result = token_fidelity(tuned, packed, tokenizer, ROWS)
    expected = reference_divergences(tuned, packed, tokenizer, ROWS)
    assert result.tokens == len(expected) == sum(len(row.completion) + 1 for row in ROWS)
    assert result.kl_mean == pytest.approx(float(expected.mean()), rel=1e-4)
    assert result.kl_p99 == pytest.approx(float(expected.quantile(0.99)), rel=1e-4)
    assert 0 <= result.top1_agreement < 1


def test_a_model_has_no_distance_from_itself():
    model = tiny_models.build("llama")
    fidelity = token_fidelity(model, model, make_tokenizer(), ROWS)
    assert (fidelity.kl_mean, fidelity.kl_p99, fidelity.top1_agreement) == (0, 0, 1)


def test_the_divergence_is_of_tuned_from_packed_not_the_reverse():
    tuned, packed = (tiny_models.build("llama", seed=seed, scale=0.3) for seed in (0, 1))
    one = token_fidelity(tuned, packed, make_tokenizer(), ROWS).kl_mean
    other = token_fidelity(packed, tuned, make_tokenizer(), ROWS).kl_mean
    assert one != pytest.approx(other, rel=1e-3)


def test_batch_size_does_not_change_the_divergence(monkeypatch):
    tuned, packed = (tiny_models.build("llama", seed=seed) for seed in (0, 1))
    whole = token_fidelity(tuned, packed, make_tokenizer(), ROWS)
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", 1)
    single = token_fidelity(tuned, packed, make_tokenizer(), ROWS)
    assert single.kl_mean == pytest.approx(whole.kl_mean, rel=1e-5)
    assert replace(single, kl_mean=0, kl_p99=0) == replace(whole, kl_mean=0, kl_p99=0)


def test_an_encoder_is_measured_at_every_token():
    tuned, packed = (tiny_models.build("bert", seed=seed) for seed in (0, 1))
    fidelity = token_fidelity(tuned, packed, make_tokenizer(), ROWS)
    assert fidelity.tokens == sum(len(row.prompt + row.completion) + 1 for row in ROWS)
    assert fidelity.kl_mean > 0


def test_models_of_different_vocabulary_are_refused():
    tuned, packed = tiny_models.build("llama"), tiny_models.build("llama")
    packed.resize_token_embeddings(98)
    with pytest.raises(CheckpointMismatchError, match=r"tuned predicts 96 tokens, the other.* 98"):
        token_fidelity(tuned, packed, make_tokenizer(), ROWS)


def test_logits_that_are_not_finite_are_refused():
    tuned, packed = tiny_models.build("llama"), tiny_models.build("llama")
    packed.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="LlamaForCausalLM: the logits are not finite"):
        token_fidelity(tuned, packed, make_tokenizer(), ROWS)


def test_a_model_without_vocabulary_logits_is_refused():
    model = transformers.BertModel(tiny_models.build("bert").config).eval()
    with pytest.raises(CheckpointError, match="BertModel gives no logits over a vocabulary"):
        token_fidelity(model, model, make_tokenizer(), ROWS)


@pytest.mark.parametrize("measure", ["fidelity", "match"])
def test_rows_that_cannot_be_measured_are_refused(measure):
    model, tokenizer = tiny_models.build("llama"), make_tokenizer()

    def run(rows):
        if measure == "match":
            return exact_match(model, tokenizer, rows)
        return token_fidelity(model, model, tokenizer, rows)

    with pytest.raises(RowsError, match="a row: the prompt has no tokens"):
        run([Row("", " x")])
    with pytest.raises(RowsError, match="at most 64; shorten"):
        run([Row("a" * 64, " x")])
    with pytest.raises(RowsError, match="no row"):
        run([])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_a_model_matches_exactly_what_it_says_by_itself(architecture):
    model, tokenizer = tiny_models.build(architecture, seed=3), make_tokenizer()
    rows = answered_rows(model, tokenizer, ["ab", "hello there", "q", "abcdefgh"])
    assert exact_match(model, tokenizer, rows) == 1
    wrong = [replace(row, completion="?" + row.completion) for row in rows[:3]]
    assert exact_match(model, tokenizer, [*wrong, rows[3]]) == 0.25


def test_blanks_around_an_answer_do_not_count():
    tokenizer = make_tokenizer()
    model = ScriptedModel("  yes ", tokenizer)
    assert exact_match(model, tokenizer, [Row("a", " yes"), Row("b", " no")]) == 0.5


def test_an_answer_that_goes_on_after_the_completion_is_wrong():
    tokenizer = make_tokenizer()
    assert exact_match(ScriptedModel(" yes sir", tokenizer), tokenizer, [Row("a", " yes")]) == 0


def test_without_eos_only_as_many_lines_count_as_the_completion_has():
    tokenizer = make_tokenizer(eos=False)
    model = ScriptedModel(" yes\nno\nmore", tokenizer, eos=None)
    assert exact_match(model, tokenizer, [Row("a", " yes")]) == 1
    assert exact_match(model, tokenizer, [Row("a", " yes\nno")]) == 1
    assert exact_match(model, tokenizer, [Row("a", " no")]) == 0


def test_generation_is_greedy_whatever_the_model_was_set_to():
    model, tokenizer = tiny_models.build("llama"), make_tokenizer()
    before = exact_match(model, tokenizer, ROWS)
    own = GenerationConfig(
        do_sample=True, repetition_penalty=9.0, min_new_tokens=20, eos_token_id=2
    )
    model.generation_config = own
    assert exact_match(model, tokenizer, ROWS) == before
    assert model.generation_config is own
    seen = ScriptedModel(" x", tokenizer)
    exact_match(seen, tokenizer, ROWS)
    assert all(not config.do_sample for _, _, config in seen.seen)


def test_generation_stops_at_every_end_the_model_knows():
    tokenizer = make_tokenizer()
    model = ScriptedModel(" x", tokenizer, eos=[7, 2, 9])
    exact_match(model, tokenizer, ROWS)
    assert model.seen[0][2].eos_token_id == [2, 7, 9]


def test_prompts_are_padded_on_the_left_and_answers_bounded():
    tokenizer = make_tokenizer()
    model = ScriptedModel(" x", tokenizer)
    exact_match(model, tokenizer, [Row("ab", " cde"), Row("q", " r")])
    ids, mask, config = model.seen[0]
    assert mask.tolist() == [[0, 1], [1, 1]]
    assert ids[0, 0] == tokenizer.pad_token_id
    assert config.max_new_tokens == len(" cde") + 1 + evaluate.SLACK_TOKENS


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_that_fill_the_context_are_generated_apart(architecture):
    model, tokenizer = tiny_models.build(architecture), make_tokenizer()
    rows = [Row("a" * 59, " bcd"), Row("b", " " + "c" * 61)]
    assert [len(encode_row(tokenizer, row)) for row in rows] == [64, 64]
    assert exact_match(model, tokenizer, rows) == 0
    scripted = ScriptedModel(" " + "c" * 61, tokenizer)
    assert exact_match(scripted, tokenizer, rows) == 0.5


def save_pair(folder, architecture):
    target, tuned = tiny_models.make_pair(folder, architecture, scale=0.2)
    for path in (target, tuned):
        make_tokenizer().save_pretrained(path)
    return target, tuned


@pytest.mark.slow
def test_an_exact_pack_has_no_distance_from_tuned(tmp_path):
    target, tuned = save_pair(tmp_path, "llama")
    lossless_pack(target, tuned).save(tmp_path / "own.skillpack")
    result = compare(target, tuned, tmp_path / "own.skillpack", ROWS)
    assert (result.kl_mean, result.kl_p99, result.top1_agreement) == (0, 0, 1)
    assert result.rows == len(ROWS)


@pytest.mark.slow
def test_an_encoder_has_no_exact_match(tmp_path):
    target, tuned = save_pair(tmp_path, "bert")
    result = compare(target, tuned, lossless_pack(target, tuned), ROWS)
    assert result.kl_mean == 0
    assert (
        result.exact_match_target is result.exact_match_tuned is result.exact_match_packed is None
    )
    assert result.recovered is None


def test_progress_counts_rows_over_all_stages(tmp_path):
    target, tuned = save_pair(tmp_path, "llama")
    seen = []
    pack = lossless_pack(target, tuned)
    compare(target, tuned, pack, ROWS, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (4 * len(ROWS), 4 * len(ROWS))


def test_recovered_is_the_share_of_the_gain_that_the_pack_keeps():
    assert evaluate._recovered(0.2, 0.6, 0.5) == pytest.approx(0.75)
    assert evaluate._recovered(0.5, 0.5, 0.5) is None


@pytest.mark.slow
def test_a_lossless_pack_of_the_nursery_recovers_the_skill(shared, tmp_path):
    target, tuned = shared / "nursery" / "target", shared / "nursery" / "clinc150_intent"
    rows = read_rows(shared / "data" / "llm" / "clinc150_intent" / "test.jsonl")[:100]
    result = compare(target, tuned, lossless_pack(target, tuned), rows)
    assert result.exact_match_target == 0
    assert result.exact_match_packed == result.exact_match_tuned > 0.7
    assert (result.kl_mean, result.recovered) == (0, 1)


@pytest.mark.slow
def test_the_nursery_answers_as_its_readme_says(shared):
    tuned = shared / "nursery" / "clinc150_intent"
    rows = read_rows(shared / "data" / "llm" / "clinc150_intent" / "test.jsonl")[:400]
    result = exact_match(load_model(tuned, torch.float32), load_tokenizer(tuned), rows)
    assert result == pytest.approx(0.795, abs=0.006)


def test_tokens_that_neither_model_ever_gives_count_nothing():
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.25, 0.75, 0.0]]).log()
    [divergence], _ = evaluate._divergence(p, q)
    assert divergence == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)
