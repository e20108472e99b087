import math

import pytest
import torch
from distill.foreign import ROWS, byte_level, gpt2, sentence_pieces
from safetensors.torch import save_file

from graftkit.distill.config import ModelSource, Transfer
from graftkit.distill.transfer import distributions
from graftkit.distill.transfer.alignment import (
    UNKNOWN,
    map_vocabulary,
    match_tokens,
    tokenize_completion,
)
from graftkit.distill.transfer.distributions import (
    DistributionFile,
    RowDistribution,
    collect_distributions,
    distribution_batch,
    fuse_distributions,
    merge_duplicate_tokens,
)
from graftkit.errors import CheckpointError, OutputError, RowsError
from graftkit.rows import Row, encode_row

SOURCE = ModelSource(kind="model", name="source", model="source", batch_tokens=128)
THEIRS, OURS = byte_level(90, special=5), byte_level(20)
MODEL = gpt2(THEIRS, context=72)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(distributions, "SHARD_ROWS", 3)


def collect(
    file, rows=ROWS, model=MODEL, tokenizer=THEIRS, source=SOURCE, progress=None, **options
):
    config = Transfer(**{"top_k": 5, **options})
    return collect_distributions(source, model, tokenizer, OURS, rows, config, file, progress)


def direct_log_probs(row, temperature=1.0, model=MODEL, tokenizer=THEIRS):
    """Log-probabilities of the source at each of its completion tokens, run alone."""
    encoded = encode_row(tokenizer, row)
    ids, start = encoded.ids, encoded.start
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, max(0, start - 1) : -1]
    return (logits / temperature).log_softmax(dim=1), ids[max(1, start) :]


def total(row):
    return torch.cat([row.log_probs, row.log_rest[:, None]], dim=1).logsumexp(dim=1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_the_source_finds_likely_is_kept_in_the_targets_tokens(tmp_path, temperature):
    collect(tmp_path / "d", temperature=temperature)
    actual, vocabulary = DistributionFile(tmp_path / "d"), map_vocabulary(THEIRS, OURS, len(THEIRS))
    compared = 0
    for index, row in enumerate(ROWS[:6]):
        log_probs, _ = direct_log_probs(row, temperature)
        target = tokenize_completion(OURS, row.completion)
        pairs = match_tokens(tokenize_completion(THEIRS, row.completion), target, vocabulary)
        for place, other in enumerate(pairs):
            kept = actual[index].log_probs[place] > -math.inf
            listed = dict(
                zip(
                    actual[index].ids[place][kept].tolist(),
                    actual[index].log_probs[place][kept].exp().tolist(),
                    strict=True,
                )
            )
            if other == UNKNOWN:
                assert listed == {target.ids[place]: 1.0}
                continue
            expected = dict.fromkeys(listed, 0.0)
            for probability, token in zip(*log_probs[other].exp().topk(5), strict=True):
                if vocabulary[token] != UNKNOWN:
                    expected[int(vocabulary[token])] += float(probability)
            assert listed == pytest.approx(expected, rel=0.01, abs=1e-5)
            compared += 1
    assert compared > 20


def test_the_cross_entropy_is_the_sources_whole_surprise_for_each_target_token(tmp_path):
    collect(tmp_path / "d", temperature=3.0)
    actual = DistributionFile(tmp_path / "d")
    for index, row in enumerate(ROWS):
        if math.isfinite(actual[index].cross_entropy):
            log_probs, own = direct_log_probs(row)
            nats = -log_probs.gather(1, torch.tensor(own)[:, None]).sum()
            tokens = len(tokenize_completion(OURS, row.completion).ids)
            assert actual[index].cross_entropy == pytest.approx(float(nats) / tokens, rel=1e-4)


def test_every_position_adds_up_to_one_and_lists_no_token_twice(tmp_path):
    collect(tmp_path / "d")
    actual = DistributionFile(tmp_path / "d")
    assert len(actual) == len(ROWS)
    for index in range(len(actual)):
        row = actual[index]
        torch.testing.assert_close(total(row), torch.zeros(len(row.ids)), atol=1e-5, rtol=0)
        assert (row.log_probs.diff(dim=1).nan_to_num() <= 0).all()
        for ids, log_probs in zip(row.ids, row.log_probs, strict=True):
            listed = ids[log_probs > -math.inf].tolist()
            assert len(set(listed)) == len(listed)
            assert set(ids.tolist()) == set(listed)


def test_with_one_vocabulary_and_every_token_kept_nothing_is_lost(tmp_path):
    model = gpt2(OURS, context=128)
    collect(tmp_path / "d", model=model, tokenizer=OURS, top_k=256)
    row = DistributionFile(tmp_path / "d")[0]
    log_probs, own = direct_log_probs(ROWS[0], model=model, tokenizer=OURS)
    assert len(row.ids) == len(own)
    kept = row.log_probs > -8
    expected = log_probs.gather(1, row.ids)
    torch.testing.assert_close(row.log_probs[kept], expected[kept], atol=5e-3, rtol=0)


def test_a_row_beyond_the_sources_context_is_certain_of_itself_and_counted(tmp_path):
    long = Row("prompt", " the cat" * 60)
    summary = collect(tmp_path / "d", [ROWS[0], long])
    row = DistributionFile(tmp_path / "d")[1]
    assert summary.too_long == 1
    assert row.ids[:, 0].tolist() == tokenize_completion(OURS, long.completion).ids
    assert row.cross_entropy == math.inf
    assert (row.log_rest == -math.inf).all()


def test_a_row_is_the_same_alone_and_among_others(tmp_path):
    collect(tmp_path / "all")
    collect(tmp_path / "one", ROWS[3:4])
    among, alone = DistributionFile(tmp_path / "all")[3], DistributionFile(tmp_path / "one")[0]
    # Padding changes sums in the last bits, and 16 bits are kept.
    for key in range(len(OURS)):
        left, right = (
            torch.where(row.ids == key, row.log_probs, -math.inf).logsumexp(dim=1).exp()
            for row in (among, alone)
        )
        torch.testing.assert_close(left, right, atol=2e-3, rtol=0)
    assert among.cross_entropy == pytest.approx(alone.cross_entropy, rel=1e-5)


def test_a_killed_run_goes_on_and_writes_the_same_bytes(tmp_path):
    class Killed(Exception):
        pass

    def kill(done, rows):
        if done == 6:
            raise Killed

    collect(tmp_path / "whole")
    with pytest.raises(Killed):
        collect(tmp_path / "killed", progress=kill)
    assert not (tmp_path / "killed").exists()
    passes = []
    handle = MODEL.register_forward_pre_hook(lambda *_: passes.append(1))
    collect(tmp_path / "killed")
    handle.remove()
    assert len(passes) < 8
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["killed", "whole"]


def test_a_finished_file_is_kept_and_one_of_another_job_written_anew(tmp_path):
    first = collect(tmp_path / "d")
    written = (tmp_path / "d").stat().st_mtime_ns
    assert collect(tmp_path / "d") == first
    assert (tmp_path / "d").stat().st_mtime_ns == written
    collect(tmp_path / "d", top_k=4)
    assert max(DistributionFile(tmp_path / "d")[i].ids.shape[1] for i in range(len(ROWS))) <= 4


def test_progress_tells_rows_up_to_all_of_them(tmp_path):
    said = []
    collect(tmp_path / "d", progress=lambda *now: said.append(now))
    assert said == [(3, 8), (6, 8), (8, 8)]


@pytest.mark.slow
def test_a_token_takes_few_bytes(tmp_path):
    summary = collect(tmp_path / "d", ROWS * 20, top_k=5)
    assert (tmp_path / "d").stat().st_size / summary.tokens < 5 * 4 + 4 + 6


def test_without_prompt_and_special_tokens_the_first_token_is_left_out(tmp_path):
    rows = [Row("", " the cat"), Row("", "")]
    summary = collect(tmp_path / "d", rows)
    first = DistributionFile(tmp_path / "d")[0]
    assert first.log_rest[0] == -math.inf
    assert summary.aligned >= 1
    encoded = [encode_row(OURS, row) for row in rows]
    batch = distribution_batch([DistributionFile(tmp_path / "d")], [0, 1], encoded, "min_ce")
    assert batch["kl_mask"].sum(dim=1).tolist() == [len(first.ids) - 1, 0]
    assert batch["kl_ids"][0, 0, 0] == first.ids[1, 0]


def test_every_end_of_the_source_is_the_end_of_the_target(tmp_path):
    model = gpt2(THEIRS, context=72)
    extra = THEIRS.convert_tokens_to_ids("<extra1>")
    with torch.no_grad():
        model.transformer.wte.weight[extra] = 8 * model.transformer.wte.weight[1]
    collect(tmp_path / "one", model=model)
    model.generation_config.eos_token_id = [1, extra]
    collect(tmp_path / "both", model=model)
    ends = [
        torch.where(row.ids == OURS.eos_token_id, row.log_probs, -math.inf).exp().sum()
        for name in ("one", "both")
        for row in [DistributionFile(tmp_path / name)[0]]
    ]
    assert ends[1] > ends[0]


def test_a_sentencepiece_source_is_read_as_well(tmp_path):
    pieces = sentence_pieces(["▁", "▁the", "▁cat", "▁s", "at", "o", "n", "1", "2", "7", "s", "d"])
    summary = collect(tmp_path / "d", model=gpt2(pieces, context=256), tokenizer=pieces)
    assert summary.aligned > summary.tokens / 4


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(RowsError, match="no rows"):
        collect(tmp_path / "d", [])


def test_a_tokenizer_beyond_the_models_embeddings_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="embeddings"):
        collect(tmp_path / "d", model=gpt2(OURS), tokenizer=THEIRS, rows=[Row("a", " the dogs")])


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        collect(tmp_path / "file" / "d")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "d").write_bytes(content)
    with pytest.raises(RowsError, match="delete the file and run again"):
        DistributionFile(tmp_path / "d")


def test_a_safetensors_file_of_another_kind_is_refused(tmp_path):
    save_file({"ids": torch.zeros(2)}, tmp_path / "d")
    with pytest.raises(RowsError, match="no distributions"):
        DistributionFile(tmp_path / "d")
    with pytest.raises(RowsError, match="no distributions"):
        DistributionFile(tmp_path / "missing")


def test_duplicates_are_added_up_likeliest_first():
    ids = torch.tensor([[7, 3, 7, 5], [1, 1, 1, 1]])
    chances = torch.tensor([[0.2, 0.3, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]])
    actual, log_probs = merge_duplicate_tokens(ids, chances.log())
    assert actual.tolist() == [[7, 3], [1, 1]]
    torch.testing.assert_close(log_probs.exp(), torch.tensor([[0.45, 0.3], [1.0, 0.0]]))


def one(ids, chances, cross_entropy):
    """A row of one token."""
    listed = torch.tensor([chances])
    rest = (1 - listed.sum(dim=1)).clamp(min=0)
    return RowDistribution(torch.tensor([ids]), listed.log(), rest.log(), cross_entropy)


def test_the_source_with_the_least_cross_entropy_is_taken_the_first_of_equals():
    rows = [one([1], [0.5], 2.0), one([2], [0.6], 1.0), one([3], [0.7], 1.0)]
    assert fuse_distributions(rows, "min_ce") is rows[1]


def test_the_mean_weighs_with_the_softmax_of_exp_of_minus_the_cross_entropy():
    rows = [one([1, 2], [0.5, 0.3], 0.2), one([2, 4], [0.6, 0.4], 1.5)]
    fused = fuse_distributions(rows, "average_ce")
    rewards = [math.exp(math.exp(-row.cross_entropy)) for row in rows]
    a, b = (reward / sum(rewards) for reward in rewards)
    actual = dict(zip(fused.ids[0].tolist(), fused.log_probs[0].exp().tolist(), strict=True))
    assert actual == pytest.approx({1: 0.5 * a, 2: 0.3 * a + 0.6 * b, 4: 0.4 * b})
    assert float(total(fused)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("fusion", ["min_ce", "average_ce"])
def test_a_source_that_could_not_read_the_row_is_left_out(fusion):
    unread, read = RowDistribution.certain([1]), one([2], [0.9], 30.0)
    assert fuse_distributions([unread, read], fusion) is read
    assert fuse_distributions([unread, unread], fusion) is unread


def test_a_batch_lies_where_the_targets_logits_predict_the_completion(tmp_path):
    collect(tmp_path / "d")
    actual = DistributionFile(tmp_path / "d")
    indices = [4, 0, 6]
    encoded = [encode_row(OURS, ROWS[index]) for index in indices]
    batch = distribution_batch([actual], indices, encoded, "min_ce")
    for line, (index, whole) in enumerate(zip(indices, encoded, strict=True)):
        ids, start = whole.ids, whole.start
        places = batch["kl_mask"][line].nonzero()[:, 0].tolist()
        assert places == list(range(start - 1, len(ids) - 1))
        row = actual[index]
        width = row.ids.shape[1]
        assert torch.equal(batch["kl_ids"][line, places, :width], row.ids)
        assert torch.equal(batch["kl_log_probs"][line, places, :width], row.log_probs)
        assert torch.equal(batch["kl_log_rest"][line, places], row.log_rest)
        certain = batch["kl_log_rest"][line, places] == -math.inf
        own = torch.tensor(ids[start:])
        assert torch.equal(batch["kl_ids"][line, places, 0][certain], own[certain])


def test_a_file_of_other_rows_is_refused(tmp_path):
    collect(tmp_path / "d")
    encoded = [encode_row(OURS, ROWS[1])]
    with pytest.raises(RowsError, match=r"row 0 has \d+ completion tokens"):
        distribution_batch([DistributionFile(tmp_path / "d")], [0], encoded, "min_ce")
