import pytest
import torch
from distill.foreign import ROWS, byte_level, gpt2, llama

from graftkit.distill.config import ModelSource, Transfer
from graftkit.distill.transfer.distributions import (
    DistributionFile,
    collect_distributions,
    distribution_batch,
)
from graftkit.distill.transfer.losses import (
    HiddenSource,
    distribution_loss,
    hidden_batch_loss,
    make_projections,
    pool,
)
from graftkit.rows import Row, encode_row, pad_batch

SOURCE = ModelSource(kind="model", name="source", model="source")
THEIRS, OURS = byte_level(90, special=5), byte_level(20)
KINDS = ["cosine", "mse", "gram"]


def hidden_source(context=128, layers=2, **options):
    settings = ModelSource(**{**SOURCE.model_dump(), **options})
    return HiddenSource(settings, gpt2(THEIRS, context), THEIRS, OURS, layers)


def encode(rows):
    return [encode_row(OURS, row) for row in rows]


def row_losses(source, target, rows, kind, projections):
    encoded = encode(rows)
    ids, mask = pad_batch([row.ids for row in encoded], OURS.pad_token_id)
    states = target(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    batch = source.batch(rows, encoded)
    return hidden_batch_loss(states, source.states(batch), batch, kind, source.pairs, projections)


def test_spans_are_the_prompts_end_and_what_both_tokenizers_cut():
    row = Row("who?", " the sofa")
    batch = hidden_source().batch([row], encode([row]))
    assert batch["hidden_mask"].tolist() == [[True, True, True]]
    start = len(THEIRS.encode(row.prompt))
    assert batch["hidden_source_index"][0].tolist() == [-1] * (start - 1) + [0, 1, 2, -1]
    start = len(OURS.encode(row.prompt))
    assert batch["hidden_index"][0].tolist() == [-1] * (start - 1) + [0, 1, 2, 2, 2, 2, -1]


def test_pooled_states_are_those_of_the_source_run_alone_on_the_row():
    source = hidden_source()
    batch = source.batch(ROWS, encode(ROWS))
    pooled = source.states(batch)
    assert len(pooled) == 2
    for index, row in enumerate(ROWS):
        ids = encode_row(THEIRS, row).ids
        with torch.no_grad():
            states = source.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        alone = batch["hidden_source_index"][index : index + 1, : len(ids)]
        for actual, (layer, _) in zip(pooled, source.pairs, strict=True):
            expected = pool(states[layer], alone, actual.shape[1])
            torch.testing.assert_close(actual[index : index + 1], expected, atol=1e-4, rtol=1e-4)


def test_a_row_beyond_the_sources_context_or_without_tokens_has_no_spans():
    source = hidden_source(context=24)
    rows = [Row("who?", " the cat"), Row("who?", " the cat" * 30), Row("", "")]
    batch = source.batch(rows, encode(rows))
    assert batch["hidden_mask"].any(dim=1).tolist() == [True, False, False]
    projections = make_projections(2, 32, 24, seed=0)
    losses = row_losses(source, llama(OURS), rows, "cosine", projections)
    assert (losses > 0).tolist() == [True, False, False]


def test_a_source_that_chats_pools_the_same_completion():
    source = hidden_source(chat=True)
    source.tokenizer = byte_level(90, special=5)
    source.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    row = Row("who?", " the sofa")
    batch = source.batch([row], encode([row]))
    plain = hidden_source().batch([row], encode([row]))
    assert batch["hidden_ids"].shape[1] > plain["hidden_ids"].shape[1]
    assert torch.equal(batch["hidden_index"], plain["hidden_index"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_counts_the_same_alone_and_in_a_padded_batch(kind):
    source, target = hidden_source(), llama(OURS)
    projections = None if kind == "gram" else make_projections(2, 32, source.width, seed=0)
    with torch.no_grad():
        together = row_losses(source, target, ROWS, kind, projections)
        alone = [row_losses(source, target, [row], kind, projections) for row in ROWS]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_the_target_and_nothing_of_the_source_gets_a_gradient(kind):
    source, target = hidden_source(), llama(OURS)
    projections = None if kind == "gram" else make_projections(2, 32, source.width, seed=0)
    row_losses(source, target, ROWS, kind, projections).mean().backward()
    for layer in target.model.layers:
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in source.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_target_of_another_vocabulary_learns_from_both_signals(tmp_path, kind, divergence):
    source, target = hidden_source(), llama(OURS)
    rows, settings = ROWS[:6], Transfer(top_k=8, divergence=divergence, hidden=kind)
    file = tmp_path / "d"
    collect_distributions(SOURCE, source.model, THEIRS, OURS, rows, settings, file)
    encoded = encode(rows)
    ids, mask = pad_batch([row.ids for row in encoded], OURS.pad_token_id)
    kl = distribution_batch([DistributionFile(file)], range(6), encoded, settings.fusion)
    hidden = source.batch(rows, encoded)
    source_states = source.states(hidden)
    projections = None if kind == "gram" else make_projections(2, 32, source.width, seed=0)
    learned = [*target.parameters(), *(projections.parameters() if projections else ())]
    optimizer = torch.optim.AdamW(learned, lr=5e-3)
    history = []
    for _ in range(20):
        output = target(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        places = kl["kl_mask"]
        names = ("kl_ids", "kl_log_probs", "kl_log_rest")
        expected = (kl[name][places] for name in names)
        divergence_loss = distribution_loss(output.logits[places], *expected, divergence).mean()
        distance = hidden_batch_loss(
            output.hidden_states, source_states, hidden, kind, source.pairs, projections
        ).mean()
        optimizer.zero_grad()
        (divergence_loss + distance).backward()
        optimizer.step()
        history.append((divergence_loss.item(), distance.item()))
    assert history[-1][0] < 0.8 * history[0][0]
    assert history[-1][1] < 0.8 * history[0][1]
