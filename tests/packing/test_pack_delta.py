"""From two checkpoints to a pack and back, on every architecture."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import architectures, make_pair

from graftkit.checkpoint import Checkpoint, tensor_digest
from graftkit.errors import BudgetError
from graftkit.fuse import merge_packs
from graftkit.models.calibration import CovarianceStore
from graftkit.pack import pack_delta
from graftkit.packing import pairs
from graftkit.skillpack import SkillPack


class Pairs(dict[str, tuple[Path, Path]]):
    """Target and tuned of an architecture, bf16; saved when they are first asked for."""

    def __init__(self, factory: pytest.TempPathFactory):
        super().__init__()
        self.factory = factory

    def __missing__(self, name: str) -> tuple[Path, Path]:
        self[name] = make_pair(self.factory.mktemp(name), name, torch.bfloat16)
        return self[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(tmp_path_factory)


@pytest.fixture
def _lossy_from_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lossy codecs work on the tiny matrices of the test models."""
    monkeypatch.setattr(pairs, "SMALLEST_LOSSY", 256)


def digests(folder: Path) -> dict[str, str]:
    checkpoint = Checkpoint.open(folder)
    return {name: tensor_digest(checkpoint.read(name)) for name in checkpoint.tensors}


def file_bytes(pack: SkillPack, path: Path) -> bytes:
    pack.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("architecture", architectures())
def test_a_lossless_pack_merges_to_the_tuned_checkpoint_bit_for_bit(
    architecture: str, folders: Pairs, tmp_path: Path
) -> None:
    target, tuned = folders[architecture]
    pack_delta(target, tuned, recipe="lossless", workers=1).save(tmp_path / "x.skillpack")
    merge_packs(target, tmp_path / "x.skillpack", tmp_path / "merged")
    assert digests(tmp_path / "merged") == digests(tuned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lossless_holds_for_every_float_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    target, tuned = make_pair(tmp_path, "qwen2", dtype)
    merge_packs(target, pack_delta(target, tuned, recipe="lossless"), tmp_path / "merged")
    assert digests(tmp_path / "merged") == digests(tuned)


def test_lossless_holds_where_target_and_tuned_have_different_dtypes(tmp_path: Path) -> None:
    target, _ = make_pair(tmp_path / "bf16", "llama", torch.bfloat16)
    _, tuned = make_pair(tmp_path / "fp32", "llama", torch.float32)
    merge_packs(target, pack_delta(target, tuned, recipe="lossless"), tmp_path / "merged")
    assert digests(tmp_path / "merged") == digests(tuned)


@pytest.mark.usefixtures("_lossy_from_tiny")
@pytest.mark.parametrize("recipe", ["auto", "graftllm"])
@pytest.mark.parametrize("architecture", architectures(quick=("llama", "gpt2")))
def test_a_lossy_pack_keeps_its_budget_and_most_of_the_delta(
    architecture: str, recipe: str, folders: Pairs, tmp_path: Path
) -> None:
    target, tuned = folders[architecture]
    pack = pack_delta(target, tuned, recipe=recipe, budget="60%", workers=1)
    pack.save(tmp_path / "x.skillpack")
    size = (tmp_path / "x.skillpack").stat().st_size
    assert size == pack.pack_bytes
    assert size <= Checkpoint.open(target).nbytes * 0.6
    before, after = Checkpoint.open(target), Checkpoint.open(tuned)
    lost = energy = 0.0
    for record in pack.manifest.tensors:
        delta = after.read(record.name).float() - before.read(record.name).float()
        decoded = pack.delta(record.name, before.read(record.name))
        energy += float(delta.square().sum())
        lost += float((decoded - delta).square().sum())
    assert lost < 0.6 * energy


@pytest.mark.slow
@pytest.mark.usefixtures("_lossy_from_tiny")
@pytest.mark.parametrize("recipe", ["auto", "graftllm", "lossless"])
def test_the_same_inputs_give_the_same_bytes_whatever_the_workers(
    recipe: str, folders: Pairs, tmp_path: Path
) -> None:
    target, tuned = folders["mixtral"]
    budget = None if recipe == "lossless" else "40%"
    files = [
        file_bytes(
            pack_delta(target, tuned, recipe=recipe, budget=budget, workers=workers),
            tmp_path / f"{i}.skillpack",
        )
        for i, workers in enumerate((1, 1, 2))
    ]
    assert files[0] == files[1] == files[2]


@pytest.fixture(scope="module")
def half(folders: Pairs, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A pack of half the target's size, in one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "SMALLEST_LOSSY", 256)
        pack = pack_delta(*folders["llama"], recipe="auto", budget="50%", workers=1)
    return file_bytes(pack, tmp_path_factory.mktemp("half") / "x.skillpack")


@pytest.mark.slow
@pytest.mark.usefixtures("_lossy_from_tiny")
@pytest.mark.parametrize("step", ["exact tensors", "measuring", "compressing"])
def test_an_interrupted_pack_goes_on_and_gives_the_same_bytes(
    step: str, half: bytes, folders: Pairs, tmp_path: Path
) -> None:
    target, tuned = folders["llama"]
    work = tmp_path / "work"

    def interrupt(at: str, done: int, total: int) -> None:
        if at == step and done == total // 2 and done:
            raise KeyboardInterrupt

    options = {"recipe": "auto", "budget": "50%", "workers": 1, "work_dir": work}
    with pytest.raises(KeyboardInterrupt):
        pack_delta(target, tuned, progress=interrupt, **options)
    finished = {file.name: file.stat().st_mtime_ns for file in work.glob("*.json")}
    assert finished
    resumed = pack_delta(target, tuned, **options)
    assert all((work / name).stat().st_mtime_ns == time for name, time in finished.items())
    assert file_bytes(resumed, tmp_path / "resumed") == half


@pytest.mark.slow
def test_finished_steps_of_another_job_are_not_used(folders: Pairs, tmp_path: Path) -> None:
    target, tuned = folders["llama"]
    work = tmp_path / "work"
    pack_delta(target, target, recipe="lossless", work_dir=work)
    second = pack_delta(target, tuned, recipe="lossless", work_dir=work)
    fresh = pack_delta(target, tuned, recipe="lossless")
    assert file_bytes(second, tmp_path / "a") == file_bytes(fresh, tmp_path / "b")


def test_a_pack_of_a_model_and_itself_changes_nothing(folders: Pairs, tmp_path: Path) -> None:
    target, _ = folders["llama"]
    pack = pack_delta(target, target, budget="50%")
    assert {record.codec for record in pack.manifest.tensors} == {"zero"}
    merge_packs(target, pack, tmp_path / "merged")
    assert digests(tmp_path / "merged") == digests(target)


def test_a_pack_needs_neither_the_tuned_checkpoint_nor_its_own_work_folder(
    tmp_path: Path,
) -> None:
    target, tuned = make_pair(tmp_path, "llama")
    expected = digests(tuned)
    pack = pack_delta(target, tuned, recipe="lossless", work_dir=tmp_path / "work")
    shutil.rmtree(tuned)
    shutil.rmtree(tmp_path / "work")
    pack.save(tmp_path / "x.skillpack")
    merge_packs(target, tmp_path / "x.skillpack", tmp_path / "merged")
    assert digests(tmp_path / "merged") == expected


@pytest.mark.slow
def test_a_budget_too_small_for_the_norms_says_what_would_do(
    folders: Pairs, tmp_path: Path
) -> None:
    target, tuned = folders["qwen3"]
    with pytest.raises(BudgetError, match=r"ask for at least \d+B") as caught:
        pack_delta(target, tuned, budget="0.1%")
    least = str(caught.value).split("at least ")[1].split("B")[0]
    pack = pack_delta(target, tuned, budget=f"{least}B")
    assert pack.pack_bytes <= int(least)


@pytest.mark.usefixtures("_lossy_from_tiny")
@pytest.mark.parametrize(
    "shares",
    [(30, 60, 100), pytest.param((30, 35, 45, 60, 80, 100), marks=pytest.mark.slow)],
    ids=["few budgets", "many budgets"],
)
def test_no_budget_is_ever_exceeded_and_more_of_it_is_used(
    shares: tuple[int, ...], folders: Pairs
) -> None:
    target, tuned = folders["llama_tied"]
    size = Checkpoint.open(target).nbytes
    least = 0
    for share in shares:
        pack = pack_delta(target, tuned, budget=f"{share}%", recipe="auto")
        assert pack.pack_bytes <= size * share / 100
        assert pack.pack_bytes >= least
        least = pack.pack_bytes


@pytest.mark.slow
def test_covariances_of_calibration_lower_the_error_in_the_output(
    shared: Path, tmp_path: Path
) -> None:
    target, tuned = shared / "nursery/target", shared / "nursery/inflect_spa"
    rows = (shared / "data/llm/inflect_spa/train.jsonl").read_text().splitlines()[:120]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    options = {"recipe": "graftllm", "budget": "4%"}
    free = pack_delta(target, tuned, **options)
    measured = pack_delta(
        target, tuned, calibration=tmp_path / "rows.jsonl", work_dir=tmp_path / "work", **options
    )
    assert measured.manifest.calibration is not None
    assert measured.manifest.calibration.rows == 120
    store = CovarianceStore(tmp_path / "work/activations")
    before, after = Checkpoint.open(target), Checkpoint.open(tuned)
    errors = []
    for pack in (free, measured):
        total = 0.0
        for module in ("model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj"):
            name = f"{module}.weight"
            weight = before.read(name)
            lost = pack.delta(name, weight) - (after.read(name).float() - weight.float())
            covariance = store.get(module)
            scale = len(pack.payload(name)) / weight.numel()
            total += float(((lost @ covariance) * lost).sum()) * scale
        errors.append(total)
    assert errors[1] < errors[0]
