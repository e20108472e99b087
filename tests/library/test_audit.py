import pytest
import torch
from library.conftest import NAMES, prompts_of
from tiny_models import build, lossless_pack, save_tokenizer

from graftkit import SkillPack, fuse_packs
from graftkit.checkpoint import Checkpoint
from graftkit.errors import ConfigError
from graftkit.library import Library
from graftkit.library.live import PackMemory

PROMPTS = [prompts_of(name, 1, seed=8)[0] for name in NAMES] + ["!?;;" * 2]


def test_energy_and_changes_are_those_of_the_decoded_delta(full, world):
    actual = Library.open(full).audit("digits")
    target, pack = Checkpoint.open(world.target), SkillPack.load(world.packs["digits"])
    deltas = {name: pack.delta(name, target.read(name)) for name in target.tensors}
    total = sum(float(delta.double().square().sum()) for delta in deltas.values())
    assert actual.energy == pytest.approx(total)
    shares = [change["energy_share"] for change in actual.numbers()["kinds"].values()]
    assert sum(shares) == pytest.approx(1)
    layers = actual.numbers()["layers"]
    assert list(layers) == ["", "0", "1"]
    first = [delta for name, delta in deltas.items() if ".layers.0." in name]
    assert layers["0"]["moved"] == sum(int(delta.count_nonzero()) for delta in first)
    rows = actual.vocabulary["lm_head.weight"]
    assert (rows["rows"], rows["moved"]) == (96, 96)
    energy = deltas["lm_head.weight"].square().sum(dim=1).sort(descending=True).values
    assert energy[: rows["most"]].sum() >= 0.9 * energy.sum() > energy[: rows["most"] - 1].sum()


def test_a_head_that_training_untied_is_audited_and_served(tmp_path):
    target, tuned = tmp_path / "target", tmp_path / "tuned"
    model = build("llama_tied", torch.float32)
    model.save_pretrained(target)
    save_tokenizer(target)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
    model.save_pretrained(tuned)
    file = tmp_path / "untied.skillpack"
    lossless_pack(target, tuned).save(file)
    library = Library.init(tmp_path / "library", target)
    library.add(file, "untied")
    assert library.audit("untied").kinds.keys() == {"head"}
    assert library.generate("0123", route="untied", max_new_tokens=4).route.name == "untied"


@pytest.mark.slow
def test_other_packs_are_compared_and_a_fused_one_is_known(folder, world, tmp_path):
    library = Library.open(folder)
    file = tmp_path / "fused.skillpack"
    files = [folder / library.index.find(name).file for name in ("digits", "upper")]
    fuse_packs(world.target, files, file, recipe="lossless", workers=1)
    library.add(file, "fused")
    overlaps = library.audit("digits").overlaps
    assert overlaps.keys() == {"upper@1", "lower@1", "fused@1"}
    assert overlaps["fused@1"].contains
    assert not overlaps["upper@1"].contains
    assert overlaps["fused@1"].total.cosine == pytest.approx(0.7, abs=0.1)
    assert abs(overlaps["upper@1"].total.cosine) < 0.1


def test_a_pack_compared_with_itself_overlaps_entirely(folder, world):
    library = Library.open(folder)
    library.add(world.packs["digits"], "again", prompts_of("digits", seed=2))
    overlap = library.audit("digits").overlaps["again@1"]
    assert overlap.total.cosine == pytest.approx(1)
    assert all(value == pytest.approx(1) for value in overlap.numbers()["kinds"].values())


@pytest.mark.slow
def test_after_removal_a_library_is_one_that_never_had_the_pack(folder):
    library = Library.open(folder)
    before = library.index
    proof = library.prove_removal("upper", PROMPTS)
    assert proof.holds
    assert proof.prompts == proof.changed_by_pack == 4
    assert library.index == before


def test_after_removal_in_use_logits_tokens_routes_and_files_are_equal_bit_for_bit(
    folder, world, tmp_path
):
    had = Library.open(folder)
    had.generate(PROMPTS, max_new_tokens=8)  # all packs are in memory now
    had.remove("upper")
    never = Library.init(tmp_path / "never", world.target)
    for name in ("digits", "lower"):
        never.add(world.packs[name], name)
    assert had.route(PROMPTS) == never.route(PROMPTS)
    for one, other in zip(had.packs(), never.packs(), strict=True):
        assert one.model_copy(update={"added": other.added}) == other
    files = [
        {file.name: file.read_bytes() for file in (library.path / "packs").iterdir()}
        for library in (had, never)
    ]
    assert files[0] == files[1]
    assert had.generate(PROMPTS, max_new_tokens=16) == never.generate(PROMPTS, max_new_tokens=16)
    for prompt in PROMPTS:
        assert torch.equal(_logits(had, prompt), _logits(never, prompt))


@pytest.mark.slow
def test_a_trace_that_stays_behind_is_found(folder, monkeypatch):
    def forget_nothing(self, digests):
        rows = [{self._indices[digest]: 1.0} for digest in self._indices if digest not in digests]
        monkeypatch.setattr(PackMemory, "route", lambda self, mixtures: _stay(self, rows, mixtures))

    def _stay(memory, rows, mixtures):
        memory._attachment.route((rows * len(mixtures))[: len(mixtures)])

    monkeypatch.setattr(PackMemory, "keep", forget_nothing)
    proof = Library.open(folder).prove_removal("upper", PROMPTS[:2])
    assert not proof.logits
    assert not proof.holds


def test_a_proof_needs_prompts(full):
    with pytest.raises(ConfigError, match="no prompts"):
        Library.open(full).prove_removal("upper", [])


def _logits(library: Library, prompt: str) -> torch.Tensor:
    live = library.live
    live.use(library.mixture(library.route([prompt])[0]))
    with torch.no_grad():
        return live.model(input_ids=torch.tensor(live.encode([prompt]))).logits
