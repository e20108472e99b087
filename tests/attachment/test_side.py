import pytest
import torch
import transformers
from attachment.packs import RANK, exact_pack, low_rank_pack
from attachment.test_attach import logits
from tiny_models import inputs, make_pair

from graftkit.attachment import attached
from graftkit.attachment.rows import choose_rows, put_entries, take_entries
from graftkit.attachment.side import SidePacks
from graftkit.attachment.updates import DenseUpdate, LowRankUpdate, RowUpdate, make_update
from graftkit.errors import AttachError
from graftkit.models import load_model
from graftkit.pack import pack_delta


def test_a_real_low_rank_pack_runs_by_its_factors(tmp_path):
    options = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, **heads)).eval()
    model.save_pretrained(tmp_path / "target")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                rows, columns = parameter.shape
                parameter += 0.01 * torch.randn(rows, 2) @ torch.randn(2, columns)
    model.save_pretrained(tmp_path / "tuned")
    pack = pack_delta(tmp_path / "target", tmp_path / "tuned", budget="8%", workers=1)
    ranked = [record for record in pack.manifest.tensors if record.codec == "lowrank"]
    assert ranked
    assert all(record.error < 0.001 for record in ranked)
    target = load_model(tmp_path / "target")
    with attached(target, pack):
        merged = logits(target)
    with attached(target, pack, mode="side") as attachment:
        torch.testing.assert_close(logits(target), merged, rtol=1e-4, atol=1e-5)
        modules = attachment._backend._modules.values()
        updates = [
            update for deltas in modules for update in getattr(deltas, "weights", {}).values()
        ]
        assert sum(isinstance(update, LowRankUpdate) for update in updates) == len(ranked)


def test_a_side_pack_of_factors_takes_their_bytes_and_not_those_of_the_target(tmp_path):
    target, _ = make_pair(tmp_path, "llama", torch.float32)
    model, pack = load_model(target), low_rank_pack(target)
    with attached(model, pack, mode="side") as attachment:
        assert isinstance(attachment._backend, SidePacks)
        path = attachment._backend._modules["model.layers.0.mlp.up_proj"]
        assert path.weights[0].nbytes == 4 * RANK * (64 + 32)


def test_several_packs_wait_until_rows_are_routed(tmp_path):
    target, tuned = make_pair(tmp_path, "llama")
    model, pack = load_model(target), exact_pack(target, tuned)
    with attached(model, [pack, pack], mode="side") as attachment:
        with pytest.raises(AttachError, match="call route"):
            logits(model)
        attachment.route([0, 1, None])
        with pytest.raises(AttachError, match="3 rows are routed but the batch has 4"):
            logits(model)
        for wrong in ([], [2], [-1], [True], ["0"]):
            with pytest.raises(AttachError):
                attachment.route(wrong)
        attachment.route([0, 1, None, 1])
        logits(model)
    with (
        attached(model, pack) as attachment,
        pytest.raises(AttachError, match="serves every row"),
    ):
        attachment.route([0])


def test_two_packs_for_two_targets_are_refused_together(tmp_path):
    first, second = make_pair(tmp_path, "llama")
    packs = [exact_pack(first, second), exact_pack(second, first)]
    with (
        pytest.raises(Exception, match="other values than the target"),
        attached(load_model(first), packs, mode="side"),
    ):
        pass


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss", "bert"])
def test_a_row_does_not_depend_on_the_packs_of_other_rows(pair_of, architecture):
    target, _, exact = pair_of(architecture)
    model = load_model(target)
    packs = [low_rank_pack(target, seed=3), exact]
    with attached(model, packs, mode="side") as attachment:
        results = []
        for others in (None, 0, 1):
            attachment.route([0, others, 1, others])
            results.append(logits(model)[[0, 2]])
        for actual in results[1:]:
            torch.testing.assert_close(actual, results[0], rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_is_served_row_by_row(pair_of):
    target, _, exact = pair_of("gpt2")
    model, packs = load_model(target), [exact, low_rank_pack(target)]
    batch = inputs(rows=2)
    batch["attention_mask"][0, :3] = 0
    with attached(model, packs[1]):
        expected = model.generate(**batch, max_new_tokens=4, do_sample=False)[1]
    with attached(model, packs, mode="side") as attachment:
        attachment.route([0, 1])
        actual = model.generate(**batch, max_new_tokens=4, do_sample=False)[1]
    assert torch.equal(actual, expected)


def test_an_exception_in_a_tuned_module_puts_its_parameter_back(tmp_path):
    target, tuned = make_pair(tmp_path, "llama", torch.float32)
    model = load_model(target)
    norm = model.model.layers[1].input_layernorm
    original = norm.weight
    with attached(model, exact_pack(target, tuned), mode="side"):
        with pytest.raises(TypeError):
            norm(torch.ones(1, 2, 32), "one argument too many")
        assert norm.weight is original
        norm(torch.ones(1, 2, 32))
        assert norm.weight is original


def test_every_form_of_an_update_computes_the_same_matrix():
    torch.manual_seed(0)
    factors = torch.randn(12, 2), torch.randn(2, 8)
    matrix = factors[0] @ factors[1]
    sparse = torch.zeros(12, 8)
    sparse[[2, 7]] = matrix[[2, 7]]
    x, ids = torch.randn(3, 5, 8), torch.randint(12, (3, 5))
    for update, expected, form in (
        (make_update(factors, None, x), matrix, LowRankUpdate),
        (make_update(None, matrix, x), matrix, DenseUpdate),
        (make_update(None, sparse, x), sparse, RowUpdate),
        (
            make_update((torch.randn(3, 3), torch.zeros(3, 3)), None, x),
            torch.zeros(3, 3),
            RowUpdate,
        ),
    ):
        assert isinstance(update, form)
        torch.testing.assert_close(update.dense(), expected)
        if expected.shape[1] == 8:
            torch.testing.assert_close(update.project(x), x @ expected.T)
            torch.testing.assert_close(update.look_up(ids), expected[ids])


def test_entries_belong_to_rows_in_runs_of_equal_length():
    cpu = torch.device("cpu")
    rows = choose_rows([0, 1], [None, 1, None, 1])
    shares = rows.shares(8, cpu)
    assert [(share.pack, share.weight) for share in shares] == [(1, 1.0)]
    assert shares[0].entries.tolist() == [2, 3, 6, 7]
    assert dict(rows.groups(4, cpu))[0].tolist() == [0, 2]
    (share,) = choose_rows([0, 1], [None, 0, 0]).shares(3, cpu)
    assert share.entries == slice(1, 3)
    with pytest.raises(AttachError, match="5 entries for 3 rows"):
        choose_rows([0], [None, 0, 0]).shares(5, cpu)


def test_rows_with_other_weights_of_one_pack_share_its_product():
    rows = choose_rows([0, 1], [{0: 0.5, 1: 0.25}, None, 0, {0: 0.5}])
    first, second = rows.shares(8, torch.device("cpu"))
    assert first.entries.tolist() == [0, 1, 4, 5, 6, 7]
    assert first.scale(torch.ones(6, 2))[:, 0].tolist() == [0.5, 0.5, 1, 1, 0.5, 0.5]
    assert (second.entries, second.weight) == (slice(0, 2), 0.25)


def test_only_tensors_of_the_batch_are_cut_and_filled():
    x, shared = torch.arange(8).view(4, 2), torch.ones(1, 2)
    cut = take_entries({"x": (x, shared), "cache_position": x[:, 0], "n": 3}, 4, slice(1, 3))
    assert cut["x"][0].tolist() == [[2, 3], [4, 5]]
    assert cut["x"][1] is shared
    assert cut["cache_position"].shape == (4,)
    filled = put_entries(
        (x, None), (torch.zeros(2, 2), None), lambda whole: (whole.clone(), slice(1, 3))
    )
    assert filled[0].tolist() == [[0, 1], [0, 0], [0, 0], [6, 7]]
    assert filled[1] is None
