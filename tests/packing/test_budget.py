import numpy as np
import pytest
import torch
import transformers

from graftkit.checkpoint import Checkpoint
from graftkit.compress.allocate import SERVABLE_SHARE, MatrixFacts, coding_options
from graftkit.compress.codecs import CodedLowRank, Zero
from graftkit.compress.entropy import LARGEST_CODE
from graftkit.pack import pack_delta
from graftkit.packing.budget import fit_budget


def facts(decay, rows=200, columns=300, weight=1.0):
    energies = np.arange(1, min(rows, columns) + 1, dtype=np.float64) ** -decay
    return MatrixFacts((rows, columns), 1, energies, energies, 1.0, (), weight, np.ones(1))


PACK = {3: facts(1.0), 5: facts(2.5), 8: facts(0.7, weight=0.1)}


class Coder:
    """Stands for the encoder: bytes and errors are off from the expected by a constant each."""

    def __init__(self, pack, bias):
        self.pack, self.bias, self.last = pack, bias, None

    def __call__(self, precisions):
        self.last = dict(precisions)
        return {i: self.measure(i, precision) for i, precision in precisions.items()}

    def measure(self, index, precision):
        if isinstance(precision, Zero):
            return 0, 1.0
        fact = self.pack[index]
        level = precision.level * fact.weight**0.5
        [choice] = [c for c in coding_options(fact, level) if c.precision.codec == precision.codec]
        return round(self.bias * choice.nbytes), choice.error / fact.weight / fact.energies.sum()


@pytest.mark.parametrize("bias", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("room", [3_000, 20_000, 90_000])
def test_the_room_is_filled_from_below_whatever_bytes_come_out(room, bias):
    coder = Coder(PACK, bias)
    best = fit_budget(PACK, room, False, coder)
    total = sum(nbytes for nbytes, _ in coder(best).values())
    assert 0.95 * room <= total <= room
    assert coder.last == best


@pytest.mark.parametrize("excess", [1.0001, 1.004, 1.02])
def test_the_room_is_not_exceeded_where_estimates_are_too_low(excess):
    estimate, coder = Coder(PACK, 1.0), Coder(PACK, excess)
    best = fit_budget(PACK, 20_000, False, coder, estimate)
    total = sum(nbytes for nbytes, _ in coder(best).values())
    assert 0.95 * 20_000 <= total <= 20_000


@pytest.mark.slow
def test_more_room_never_leaves_more_error():
    errors = []
    for room in (2_000, 4_000, 8_000, 16_000, 64_000):
        coder = Coder(PACK, 1.0)
        results = coder(fit_budget(PACK, room, False, coder))
        errors.append(
            sum(e * PACK[i].weight * PACK[i].energies.sum() for i, (_, e) in results.items())
        )
    assert errors == sorted(errors, reverse=True)


def test_no_room_stores_nothing():
    assert set(fit_budget(PACK, 0, False, Coder(PACK, 1.0)).values()) == {Zero()}


def test_a_delta_of_zeros_stores_nothing():
    unchanged = {0: MatrixFacts((4, 4), 1, np.zeros(4), np.zeros(4), 1.0, (), 1.0, np.ones(1))}
    assert fit_budget(unchanged, 1000, False, Coder(unchanged, 1.0)) == {0: Zero()}


def test_servable_packs_hold_factors_of_a_bounded_rank():
    best = fit_budget(PACK, 60_000, True, Coder(PACK, 1.0))
    for precision in best.values():
        assert isinstance(precision, CodedLowRank | Zero)
        if isinstance(precision, CodedLowRank):
            assert precision.rank * 500 <= SERVABLE_SHARE * 200 * 300


def test_room_that_factors_of_a_bounded_rank_cannot_use_does_not_cut_their_codes_off():
    best = fit_budget(PACK, 10_000_000, True, Coder(PACK, 1.0))
    for i, precision in best.items():
        typical = PACK[i].energies[0] ** 0.5 / 200**0.5 / precision.level
        assert typical < LARGEST_CODE / 2


def test_a_flat_delta_is_coded_entry_by_entry_and_a_steep_one_by_factors():
    best = fit_budget(
        {0: facts(0.0), 1: facts(3.0)}, 30_000, False, Coder({0: facts(0.0), 1: facts(3.0)}, 1.0)
    )
    assert best[0].codec in ("dense", "hybrid")
    assert best[1].codec == "lowrank"


def test_one_large_component_does_not_keep_the_rest_from_its_bytes(tmp_path):
    options = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, **heads))
    model.save_pretrained(tmp_path / "target")
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        weight = model.get_parameter(name)
        weight += 30 * torch.outer(torch.randn(256), torch.randn(128)) + torch.randn(256, 128)
    model.save_pretrained(tmp_path / "tuned")
    pack = pack_delta(tmp_path / "target", tmp_path / "tuned", budget="30%", workers=1)
    delta = pack.delta(name, Checkpoint.open(tmp_path / "target").read(name))
    exact = weight.detach() - Checkpoint.open(tmp_path / "target").read(name)
    left = torch.linalg.svd(exact)[0][:, :1]
    rest = exact - left @ (left.T @ exact)
    result = delta - left @ (left.T @ delta)
    assert (result - rest).norm() < 0.05 * rest.norm()
