"""Merges at the ends of what weights and numbers allow: the right sum, or a refusal by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import lossless_pack, one_layer_llama

from graftkit.errors import ConfigError, GraftError
from graftkit.fuse import merge_packs, methods
from graftkit.fuse.continual import project_out
from graftkit.fuse.methods import METHODS
from graftkit.fuse.sequential import merge_in_turn

CONFIG, SHAPES = one_layer_llama(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=1,
    num_key_value_heads=1,
    vocab_size=20,
)
UP = "model.layers.0.mlp.up_proj.weight"
ADDS = [name for name, kind in METHODS.items() if not kind.averages]
AVERAGES = [name for name, kind in METHODS.items() if kind.averages]


class Skills:
    """A target and lossless packs: `one`, `other`, and `opposite`, which takes `one` back."""

    def __init__(self, folder, dtype, scale):
        self.target, self.folder = folder / "target", folder
        generator, most = torch.Generator().manual_seed(0), torch.finfo(dtype).max
        weights = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
        deltas = [
            {n: scale * torch.randn(s, generator=generator).double() for n, s in SHAPES.items()}
            for _ in range(2)
        ]
        deltas.append({name: -delta for name, delta in deltas[0].items()})
        self.weights = weights
        self.write(self.target, weights)
        self.packs = []
        for index, own in enumerate(deltas):
            name = folder / f"tuned-{index}"
            tuned = {n: (w.double() + own[n]).clamp(-most, most) for n, w in weights.items()}
            self.write(name, {n: t.to(dtype) for n, t in tuned.items()})
            self.packs.append(lossless_pack(self.target, name))
        self.one, self.other, self.opposite = self.packs

    def write(self, folder, tensors):
        CONFIG.save_pretrained(folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def merged(self, packs, **options):
        out = self.folder / f"merged-{len(list(self.folder.iterdir()))}"
        merge_packs(self.target, packs, out, **options)
        return load_file(out / "model.safetensors")

    def in_turn(self, packs, method):
        out = self.folder / f"merged-{len(list(self.folder.iterdir()))}"
        merge_in_turn(self.target, packs, out, method, state=self.folder / "state")
        return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def skills(tmp_path_factory):
    return Skills(tmp_path_factory.mktemp("skills"), torch.float32, 0.01)


@pytest.fixture
def large(tmp_path):
    """Deltas whose sums leave float16."""
    return Skills(tmp_path, torch.float16, 6e4)


@pytest.mark.parametrize("method", ADDS)
def test_weights_of_zero_give_the_target_where_deltas_are_added(method, skills):
    merged = skills.merged([skills.one, skills.other], weights=[0, 0], method=method)
    assert all(torch.equal(merged[name], weight) for name, weight in skills.weights.items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "weights",
    [[float("nan"), 1], [float("inf"), 1], [1e7, 1], [1], [], [1, 1, 1], ["a", 1], [10**400, 1]],
    ids=str,
)
def test_weights_that_are_none_are_refused_in_one_line(method, weights, skills):
    with pytest.raises(ConfigError, match="weights") as refused:
        skills.merged([skills.one, skills.other], weights=weights, method=method)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", AVERAGES)
@pytest.mark.parametrize("weights", [[0, 0], [-1, 1], [-0.0, 0.0]], ids=str)
def test_weights_without_a_mean_are_refused_where_deltas_are_averaged(method, weights, skills):
    with pytest.raises(ConfigError, match="have no mean"):
        skills.merged([skills.one, skills.other], weights=weights, method=method)


@pytest.mark.parametrize("method", AVERAGES)
@pytest.mark.parametrize("factor", [2.0**-1060, 2.0**-140, 2.0**19])
def test_only_proportions_count_where_deltas_are_averaged(method, factor, skills):
    packs = [skills.one, skills.other]
    plain = skills.merged(packs, weights=[1.0, 0.5], method=method)
    scaled = skills.merged(packs, weights=[factor, factor / 2], method=method)
    assert all(torch.equal(scaled[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_a_density_that_keeps_nothing_gives_the_target(method, skills):
    merged = skills.merged([skills.one], method=method, settings={"density": 1e-300})
    assert all(torch.equal(merged[name], weight) for name, weight in skills.weights.items())


@pytest.mark.parametrize("method", [*METHODS, "opcm", "kif"])
def test_sums_beyond_the_dtype_are_refused_by_the_tensors_name(method, large):
    for packs in ([large.one, large.other], [large.one, large.opposite]):
        said = _refusal_or_finite(large, packs, method)
        assert said is None or any(name in said for name in SHAPES)
        (large.folder / "state").unlink(missing_ok=True)


def _refusal_or_finite(skills, packs, method):
    merge = skills.merged if method in METHODS else skills.in_turn
    try:
        merged = merge(packs, method=method)
    except GraftError as error:
        return str(error)
    assert all(tensor.isfinite().all() for tensor in merged.values())
    return None


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_opposite_packs_cancel(method, skills):
    merged = skills.merged([skills.one, skills.opposite], method=method)
    for name, weight in skills.weights.items():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-44, 1e-25, 1e25, 3e38])
def test_projecting_holds_where_float32_squares_vanish_or_overflow(scale):
    generator = torch.Generator().manual_seed(0)
    merged = (torch.rand(6, 5, generator=generator).double() * scale).float()
    left = project_out(merged, merged)
    size = float(merged.abs().max())
    assert left.isfinite().all()
    assert float(left.abs().max()) <= max(1e-4 * size, 3e-45)


@pytest.mark.slow
def test_a_running_sum_beyond_float32_is_refused_by_the_tensors_name(tmp_path):
    skills = Skills(tmp_path, torch.float32, 1e38)
    with pytest.raises(ConfigError, match="weight: the sum of the packs is beyond"):
        skills.in_turn([*skills.packs[:2], *_copies(skills, 6)], "opcm")
    assert not (tmp_path / "state").exists()


def _copies(skills, count):
    """Packs of the first one's delta; another name makes each another pack."""
    return [
        type(skills.one)(
            skills.one.manifest.model_copy(update={"licence": f"copy {index}"}),
            {name: skills.one.payload(name) for name in skills.one.manifest.payload_order},
        )
        for index in range(count)
    ]


def test_what_is_dropped_is_zero_whatever_the_density():
    dropped = methods.drop(torch.ones(100, 100), 1e-300, "key")
    assert not dropped.any()
