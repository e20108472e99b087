"""The command line: what it prints, what it refuses, what it leaves behind."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file
from tiny_models import make_pair


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny target and its tuned copy."""
    return make_pair(tmp_path_factory.mktemp("models"), "llama", torch.bfloat16)


@pytest.fixture(scope="module")
def pack_file(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lossless pack of the pair."""
    file = tmp_path_factory.mktemp("packs") / "x.skillpack"
    assert run("pack", *models, "-o", file, "--recipe", "lossless") == 0
    return file


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail with one line on stderr; returns that line."""
    capsys.readouterr()
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("graftkit: ")
    return lines[0]


def test_pack_prints_one_json_object_with_the_sizes_of_the_file(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "x.skillpack"
    assert run("pack", *models, "-o", output, "--budget", "95%", "--json") == 0
    actual = json.loads(capsys.readouterr().out)
    assert actual["pack_bytes"] == output.stat().st_size <= actual["budget_bytes"]
    assert actual["ratio"] == actual["pack_bytes"] / actual["target_bytes"]
    for key in ("bits_per_parameter", "bound_bits_per_parameter", "seconds", "peak_rss_bytes"):
        assert actual[key] > 0
    expected = {"name", "kind", "codec", "rank", "bits_per_parameter", "relative_error"}
    assert all(expected <= tensor.keys() for tensor in actual["tensors"])
    assert [file.name for file in tmp_path.iterdir()] == ["x.skillpack"]


def test_a_dry_run_gives_the_numbers_and_writes_nothing(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("pack", *models, "-o", tmp_path / "x.skillpack", "--budget", "95%", "--json")
    assert run(*arguments, "--dry-run") == 0
    planned = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments) == 0
    assert json.loads(capsys.readouterr().out)["pack_bytes"] == planned["pack_bytes"]


def test_inspect_needs_no_model_and_names_every_tensor(
    pack_file: Path, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", pack_file) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in load_file(models[0] / "model.safetensors"))
    assert run("inspect", pack_file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["pack_bytes"] == pack_file.stat().st_size


def test_verify_accepts_the_target_and_decodes_everything(
    pack_file: Path, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", pack_file, "--target", models[0], "--full", "--json") == 0
    assert json.loads(capsys.readouterr().out)["decoded"] is True


def test_merge_writes_the_tuned_weights_and_refuses_a_folder_in_use(
    pack_file: Path,
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("merge", models[0], pack_file, "-o", tmp_path / "m") == 0
    merged, tuned = (load_file(f / "model.safetensors") for f in (tmp_path / "m", models[1]))
    assert all(torch.equal(merged[name], tuned[name]) for name in tuned)
    assert "not an empty folder" in refused(
        capsys, "merge", models[0], pack_file, "-o", tmp_path / "m"
    )


def test_merging_with_weight_zero_gives_the_target(
    pack_file: Path, models: tuple[Path, Path], tmp_path: Path
) -> None:
    assert run("merge", models[0], pack_file, "--weights", "0", "-o", tmp_path / "m") == 0
    merged, target = (load_file(f / "model.safetensors") for f in (tmp_path / "m", models[0]))
    assert all(torch.equal(merged[name], target[name]) for name in target)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("0%", "is zero"),
        ("200%", "more than the target"),
        ("5 apples", "not understood"),
        ("-3MB", "not understood"),
        ("nan%", "not understood"),
        ("", "not understood"),
        ("0.01%", "ask for at least"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(
    budget: str,
    says: str,
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refused(capsys, "pack", *models, "-o", tmp_path / "x.skillpack", f"--budget={budget}")
    assert says in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        (b'{"prompt": "a"}\n', '"completion" is missing'),
        (b'{"prompt": "a", "completion": " b"}\nnot json\n', ":2: not JSON"),
        (b'{"prompt": 3, "completion": " b"}\n', "expected a string"),
        (b"\xff\xfe\n", "not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_a_calibration_file_that_cannot_be_used_is_refused(
    content: bytes | None,
    says: str,
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = tmp_path / "rows.jsonl"
    if content is not None:
        rows.write_bytes(content)
    output = tmp_path / "out" / "x.skillpack"
    output.parent.mkdir()
    assert says in refused(capsys, "pack", *models, "-o", output, "--calibration", rows)
    assert list(output.parent.iterdir()) == []


@pytest.mark.slow
def test_a_calibration_row_longer_than_the_context_is_refused(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "word " * 2000, "completion": " x"}) + "\n")
    nursery, output = shared / "nursery", tmp_path / "out.skillpack"
    line = refused(
        capsys,
        *("pack", nursery / "target", nursery / "nl_regex", "-o", output, "--calibration", rows),
    )
    assert "rows.jsonl:1" in line
    assert "reads at most 1024" in line
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def other_architecture(tuned: Path, folder: Path) -> str:
    make_pair(folder / "other", "gpt2")
    return str(folder / "other/tuned")


def other_shape(tuned: Path, folder: Path) -> str:
    copy = copy_of(tuned, folder / "copy")
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7, dtype=torch.bfloat16)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return str(copy)


def missing_tensor(tuned: Path, folder: Path) -> str:
    copy = copy_of(tuned, folder / "copy")
    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return str(copy)


def missing_shard(tuned: Path, folder: Path) -> str:
    copy = copy_of(tuned, folder / "copy")
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
    index["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"
    save_file(weights, copy / "model-00001-of-00002.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(copy)


def not_a_number(tuned: Path, folder: Path) -> str:
    copy = copy_of(tuned, folder / "copy")
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return str(copy)


def pickled(tuned: Path, folder: Path) -> str:
    copy = copy_of(tuned, folder / "copy")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    return str(copy)


def truncated(tuned: Path, folder: Path) -> str:
    copy = copy_of(tuned, folder / "copy")
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    return str(copy)


def no_config(tuned: Path, folder: Path) -> str:
    copy = copy_of(tuned, folder / "copy")
    (copy / "config.json").write_text("{ not json")
    return str(copy)


def nothing_there(tuned: Path, folder: Path) -> str:
    return str(folder / "absent")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (other_architecture, "a gpt2 model, but the target"),
        (other_shape, "model.norm.weight is [7]"),
        (missing_tensor, "lacks tensor model.norm.weight"),
        (missing_shard, "model-00002-of-00002.safetensors: this shard is listed"),
        (not_a_number, "model.layers.1.mlp.up_proj.weight holds NaN"),
        (pickled, "pytorch_model.bin: a pickle"),
        (truncated, "not a complete safetensors file"),
        (no_config, "config.json: cannot be read"),
        (nothing_there, "missing; expected a Hugging Face model directory"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_tuned_model_that_does_not_fit_is_refused_and_nothing_is_written(
    damage: object,
    says: str,
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tuned = damage(models[1], tmp_path)  # type: ignore[operator]
    (tmp_path / "out").mkdir()
    output = tmp_path / "out/x.skillpack"
    assert says in refused(capsys, "pack", models[0], tuned, "-o", output)
    assert list(output.parent.iterdir()) == []


def test_a_pack_for_another_target_is_refused_with_the_first_differing_tensor(
    pack_file: Path,
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = copy_of(models[0], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        weights[name] = weights[name] * 2
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    for arguments in (
        ("verify", pack_file, "--target", other),
        ("merge", other, pack_file, "-o", tmp_path / "merged"),
    ):
        assert "model.layers.1.mlp.up_proj.weight has other values" in refused(capsys, *arguments)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("place", ["/proc/x.skillpack", "absent/x.skillpack", "."])
def test_an_output_that_cannot_be_written_is_refused(
    place: str,
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(capsys, "pack", *models, "-o", place)
    assert list(tmp_path.iterdir()) == []


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "graftkit", *map(str, arguments)]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    arguments = command("pack", *models, "-o", tmp_path / "x.skillpack", "--recipe", "lossless")
    done = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=no_room)
    assert done.returncode == 1
    assert re.fullmatch(r"graftkit: .*cannot be written \(File too large\).*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_pack_goes_on_where_it_stopped(shared: Path, tmp_path: Path) -> None:
    nursery, output = shared / "nursery", tmp_path / "x.skillpack"
    pair = (nursery / "target", nursery / "clinc150_intent")
    arguments = ("pack", *pair, "-o", output, "--budget", "4%", "--workers", 1)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command(*arguments), env=environment, stderr=subprocess.DEVNULL)
    folder = tmp_path / "x.skillpack.partial"
    while killed.poll() is None and len(list(folder.glob("tensor-*.json"))) < 12:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    finished = {file: file.stat().st_mtime_ns for file in folder.glob("tensor-*.json")}
    assert finished
    assert not output.exists()
    assert run(*arguments) == 0
    resumed = output.read_bytes()
    assert not folder.exists()
    output.unlink()
    assert run(*arguments) == 0
    assert output.read_bytes() == resumed


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("--workers", 0, "at least 1"), ("--seed", -1, "at least 0"), ("--recipe", "x", "unknown")],
)
def test_a_setting_out_of_range_is_refused(
    option: str,
    value: object,
    says: str,
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refused(capsys, "pack", *models, "-o", tmp_path / "x.skillpack", option, value)
    assert says in line


def test_a_wrong_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pack", "--no-such-option") == 2


def test_help_names_every_command_and_loads_no_heavy_library() -> None:
    code = (
        "import sys; sys.argv = ['graftkit', '--help']\n"
        "from graftkit.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('heavy:', [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name in ("demo", "pack", "inspect", "verify", "compare", "merge", "generate"):
        assert re.search(rf"\b{name}\b", done.stdout)
    assert "heavy: []" in done.stdout
