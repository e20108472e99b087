import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3
from distill.tiny import tiny_llama, write_jsonl
from killing import Forked, killed_at, tree
from transformers import AutoTokenizer

from graftkit.__main__ import main
from graftkit.distill.config import DistillConfig
from graftkit.distill.pipeline import estimate_run, run_distill, stages_of
from graftkit.distill.workspace import StageLog, exclusive_run
from graftkit.errors import ConfigError, OutputError, RowsError, SelectionError
from graftkit.rows import template_digest
from graftkit.skillpack import SkillPack

CONFIGS = Path(__file__).parents[2] / "configs"
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
CONFIG = """
target = "target"
[prompts]
file = "prompts.jsonl"
[[sources]]
kind = "answers"
name = "book"
file = "answers.jsonl"
samples = 3
licence = "CC0-1.0"
[[scores]]
kind = "agreement"
[selection]
gap = [0.1, 1.0]
sft_share = "all"
[sft]
epochs = 2
learning_rate = 1e-2
batch_size = 4
precision = "float32"
[dpo]
learning_rate = 1e-3
batch_size = 4
precision = "float32"
[pack]
recipe = "lossless"
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "target")


@pytest.fixture
def place(tmp_path, target) -> Path:
    """A configuration with everything that it names."""
    shutil.copytree(target, tmp_path / "target")
    return write_inputs(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, target) -> tuple[Path, dict]:
    """A whole run of that configuration, its target named by an absolute path; and its result."""
    place = write_inputs(tmp_path_factory.mktemp("finished"))
    change(place, 'target = "target"', f'target = "{target}"')
    return place, run(place)[0]


@pytest.fixture
def again(finished, tmp_path) -> Path:
    """A copy of the finished run, to go on with."""
    return shutil.copytree(finished[0], tmp_path / "again")


def write_inputs(place: Path) -> Path:
    write_jsonl(place / "prompts.jsonl", [{"prompt": f"say {word}:"} for word in WORDS])
    answers = [
        {"prompt": f"say {word}:", "completion": text}
        for word in WORDS
        for text in (f" {word}!", f" {word}!", " no")
    ]
    write_jsonl(place / "answers.jsonl", answers)
    (place / "run.toml").write_text(CONFIG)
    return place


def run(place: Path, only: str | None = None, out: str = "out"):
    done = []
    result = run_distill(place / "run.toml", place / out, only, lambda step, *_: done.append(step))
    return result, done


def change(place: Path, old: str, new: str) -> None:
    text = (place / "run.toml").read_text()
    assert old in text
    (place / "run.toml").write_text(text.replace(old, new))


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_a_skill_that_was_trained_in_a_chat_template_is_asked_in_it(tmp_path):
    tiny_llama(tmp_path / "target", chat=True)
    write_inputs(tmp_path)
    # Three times the words, for a router key needs 20 prompts.
    words = [f"{word}{i}" for word in WORDS for i in range(3)]
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"say {word}:"} for word in words])
    answers = [
        {"prompt": f"say {word}:", "completion": text}
        for word in words
        for text in (f" {word}!", f" {word}!", " no")
    ]
    write_jsonl(tmp_path / "answers.jsonl", answers)
    change(tmp_path, "[[sources]]", "chat = true\n[[sources]]")
    change(tmp_path, '[dpo]\nlearning_rate = 1e-3\nbatch_size = 4\nprecision = "float32"\n', "")
    (tmp_path / "run.toml").write_text("dpo = false\n" + (tmp_path / "run.toml").read_text())
    run(tmp_path)
    manifest = SkillPack.load(tmp_path / "out" / "skill.skillpack").manifest
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert (manifest.effective_prompt_format, manifest.template_blake3) == (
        "chat",
        template_digest(tokenizer),
    )
    assert manifest.router is not None
    asked = [f"say {word}:" for word in words]
    assert manifest.router.blake3 == blake3(json.dumps(asked).encode()).hexdigest()


def test_a_run_ends_with_everything_that_it_promises(finished):
    place, result = finished
    out = place / "out"
    assert list(result) == ["sample", "score", "select", "sft", "dpo", "pack"]
    assert len(lines(out / "samples.jsonl")) == 24
    rows, pairs = lines(out / "sft.jsonl"), lines(out / "pairs.jsonl")
    assert [row["completion"] for row in rows] == [f" {word}!" for word in WORDS]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        (f" {word}!", " no") for word in WORDS
    ]
    pack = SkillPack.load(out / "skill.skillpack")
    assert pack.manifest.licence == "CC0-1.0"
    assert "8 rows" in pack.manifest.provenance["sft"]
    assert pack.manifest.provenance["source book"] == "answers.jsonl"
    assert (out / "skill.skillpack").stat().st_size == result["pack"]["pack_bytes"]
    assert "8 pairs" in (out / "README.md").read_text()
    assert "CC0-1.0" in (out / "data_card.md").read_text()
    assert lines(out / "dpo_log.jsonl")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_the_model_card_does_not_tell_where_a_local_target_lies(finished, target):
    card = (finished[0] / "out" / "README.md").read_text()
    assert 'base_model: "target"' in card
    assert str(target.parent) not in card
    assert str(finished[0]) not in card


def test_what_is_done_is_not_done_again(again):
    before = {path: path.stat().st_mtime_ns for path in (again / "out").rglob("*")}
    result, steps = run(again)
    assert steps == ["sample", "score", "select", "sft", "dpo", "pack"]
    assert {path: path.stat().st_mtime_ns for path in (again / "out").rglob("*")} == before
    assert list(result) == ["sample", "score", "select", "sft", "dpo", "pack"]


def test_a_stage_is_done_again_when_its_settings_change_and_so_are_those_after_it(again):
    sft = (again / "out" / "sft" / "model.safetensors").read_bytes()
    pack = (again / "out" / "skill.skillpack").read_bytes()
    change(again, "learning_rate = 1e-3", "learning_rate = 2e-2")
    run(again)
    assert (again / "out" / "sft" / "model.safetensors").read_bytes() == sft
    assert (again / "out" / "skill.skillpack").read_bytes() != pack


def test_edited_scores_change_what_is_trained_on(place):
    run(place, "sample")
    run(place, "score")
    scores = lines(place / "out" / "scores.jsonl")
    for score in scores:
        score["passed"] = score["prompt_id"] < 4
    write_jsonl(place / "out" / "scores.jsonl", scores)
    run(place, "select")
    assert len(lines(place / "out" / "sft.jsonl")) == 4


def test_answers_are_never_thrown_away_without_being_asked(place):
    run(place, "sample")
    change(place, "samples = 3", "samples = 2")
    with pytest.raises(ConfigError, match="sampled with other sources, prompts or seed; delete it"):
        run(place)
    assert len(lines(place / "out" / "samples.jsonl")) == 24


def test_answers_of_somebody_else_are_not_written_over(place):
    (place / "out").mkdir()
    (place / "out" / "samples.jsonl").write_text("{}\n")
    with pytest.raises(OutputError, match="holds files that are not of this command"):
        run(place)
    assert (place / "out" / "samples.jsonl").read_text() == "{}\n"


def test_a_run_killed_behind_its_last_answer_does_not_ask_again(place, monkeypatch):
    monkeypatch.setattr(StageLog, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(place, "sample")
    monkeypatch.undo()
    before = (place / "out" / "samples.jsonl").stat().st_mtime_ns
    result, _ = run(place, "sample")
    assert result["sample"]["answers"] == 24
    assert (place / "out" / "samples.jsonl").stat().st_mtime_ns == before


def test_one_stage_alone_needs_those_before_it(place):
    with pytest.raises(ConfigError, match=r"sft.jsonl: missing, and stage sft needs it"):
        run(place, "sft")
    with pytest.raises(ConfigError, match="stage 'train' is none of sample, score"):
        run(place, "train")


@pytest.mark.slow
def test_without_preference_optimisation_sft_writes_the_tuned_model(place):
    change(place, '[dpo]\nlearning_rate = 1e-3\nbatch_size = 4\nprecision = "float32"\n', "")
    change(place, 'target = "target"', 'target = "target"\ndpo = false')
    result, _ = run(place)
    assert list(result) == ["sample", "score", "select", "sft", "pack"]
    assert (place / "out" / "tuned" / "model.safetensors").exists()
    assert not (place / "out" / "pairs.jsonl").exists()


@pytest.mark.slow
def test_the_references_of_a_prompts_file_are_not_read_by_scores_without_reference(again):
    rows = [{"prompt": f"say {word}:", "completion": [7]} for word in WORDS]
    write_jsonl(again / "prompts.jsonl", rows)
    run(again, out="with")
    for name in (
        "samples.jsonl",
        "scores.jsonl",
        "sft.jsonl",
        "pairs.jsonl",
        "tuned/model.safetensors",
    ):
        assert (again / "with" / name).read_bytes() == (again / "out" / name).read_bytes()


def test_a_source_whose_every_answer_fails_is_one_line_and_nothing_is_lost(place):
    change(place, 'kind = "agreement"', 'kind = "exact"')
    change(place, "gap = [0.1, 1.0]", 'pairs = "checked"')
    write_jsonl(
        place / "prompts.jsonl", [{"prompt": f"say {w}:", "completion": " x"} for w in WORDS]
    )
    with pytest.raises(SelectionError, match="no answer is left for SFT") as error:
        run(place)
    assert "exact" in str(error.value)
    assert len(lines(place / "out" / "scores.jsonl")) == 24


def test_a_window_without_pairs_names_the_reasons(place):
    change(place, "gap = [0.1, 1.0]", "gap = [0.9, 1.0]")
    with pytest.raises(SelectionError, match=r"no pair is left for DPO \(gap too small: 8\)"):
        run(place)


def test_a_rule_needs_its_reference(place):
    change(place, 'kind = "agreement"', 'kind = "number"')
    with pytest.raises(RowsError, match=r'prompts\.jsonl:1: key "completion" is missing'):
        run(place)


def test_rows_longer_than_the_target_reads_are_dropped_and_counted(place):
    answers = lines(place / "answers.jsonl")
    answers[0]["completion"] = answers[1]["completion"] = " one!" * 40
    write_jsonl(place / "answers.jsonl", answers)
    for stage in ("sample", "score", "select"):
        run(place, stage)
    card = lines(place / "out" / "data_card.json")[0]
    assert card["sft"]["rows"] == 8
    assert lines(place / "out" / "sft.jsonl")[0]["completion"] == " no"


def test_a_dry_run_counts_and_writes_nothing(place):
    before = sorted(path.name for path in place.iterdir())
    actual = estimate_run(place / "run.toml")
    assert actual["prompts"] == 8
    assert actual["stages"]["sample"]["answers"] == 24
    assert actual["stages"]["sft"]["steps"] == 4
    assert actual["stages"]["dpo"]["memory_bytes"] > actual["stages"]["sft"]["memory_bytes"]
    assert actual["disk_bytes"] > 0
    assert sorted(path.name for path in place.iterdir()) == before


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda f: f.stem)
def test_every_shipped_configuration_is_understood(file):
    config = DistillConfig.read_toml(file)
    assert stages_of(config)[0] == "sample"
    if file.stem == "nursery":
        return
    assert config.prompts.chat
    expected = {"llama-3.1-8b": (5e-6, 8e-7, 10.0), "qwen-2.5-7b": (2e-6, 3e-7, 0.01)}
    if file.stem in expected:
        rates = (config.sft.learning_rate, config.dpo.learning_rate, config.dpo.beta)
        assert rates == expected[file.stem]


@pytest.mark.slow
def test_mixed_pairs_are_trained_with_weighted_rewards(place):
    own = [{"prompt": f"say {w}:", "completion": f" {c}"} for w in WORDS for c in (w, "no", "no")]
    write_jsonl(place / "own.jsonl", own)
    mine = '[[sources]]\nkind = "answers"\nname = "me"\nfile = "own.jsonl"\n'
    change(place, "[[scores]]", mine + "[[scores]]")
    change(place, "gap = [0.1, 1.0]", 'gap = [-1, 1]\npairs = "mixed"\ntarget_source = "me"')
    change(place, "[dpo]", '[dpo]\nloss = "wrpo"\nbeta = 0.1')
    run(place)
    pair = lines(place / "out" / "pairs.jsonl")[0]
    assert (pair["chosen"], pair["chosen_target"], pair["rejected"]) == (" one!", " no", " one")
    assert lines(place / "out" / "dpo_log.jsonl")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_a_second_run_in_the_same_folder_is_refused(place):
    with (
        exclusive_run(place / "out"),
        pytest.raises(OutputError, match="another run is at work here"),
    ):
        run(place)


def test_missing_libraries_are_named_with_what_to_install(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "graftkit.distill.training", None)
    with pytest.raises(ConfigError, match=r"pip install 'graftkit\[distill\]'"):
        run(place)
    assert (place / "out" / "sft.jsonl").exists()


def test_a_launcher_shares_the_trainings_only(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="only sft and dpo share their work"):
        run(place)


@pytest.mark.slow
def test_stages_killed_at_changes_of_files_end_as_undisturbed(place):
    """At every seventh change, and at the last ones."""

    def stages(out: str) -> None:
        for stage in ("sample", "score", "select"):
            run(place, stage, out)

    def results(out: str) -> dict[str, bytes]:
        return {name: text for name, text in tree(place / out).items() if name != "stages.json"}

    stages("whole")
    for count in range(1, 1000, 7):
        out = f"killed-{count}"
        if killed_at(place / out, count, lambda out=out: stages(out)) != -signal.SIGKILL:
            break
        assert Forked(lambda out=out: stages(out)).end() == 0
        assert results(out) == results("whole"), f"killed at change {count}"
    assert count > 14


def test_inputs_do_not_lie_where_a_run_writes(place):
    run(place, "sample")
    rows = (place / "prompts.jsonl").read_bytes()
    (place / "out" / "sft.jsonl").write_bytes(rows)
    change(place, 'file = "prompts.jsonl"', 'file = "out/sft.jsonl"')
    with pytest.raises(OutputError, match="is read by this command"):
        run(place)
    assert (place / "out" / "sft.jsonl").read_bytes() == rows


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(place, monkeypatch, capsys):
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    command = [sys.executable, "-m", "graftkit", "distill", "run.toml", "-o", "out", "--json"]
    full = subprocess.run(command, cwd=place, capture_output=True, text=True, preexec_fn=no_room)
    assert full.returncode == 1
    assert re.fullmatch(r"graftkit: .*cannot be written.*go on\n", full.stderr)
    assert (place / "out" / "sft.jsonl").exists()
    assert not (place / "out" / "sft").exists()
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["graftkit", *command[3:]])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert list(json.loads(capsys.readouterr().out)["stages"]) == [
        *("sample", "score", "select", "sft", "dpo", "pack")
    ]


@pytest.mark.slow
def test_two_processes_train_what_one_does(place):
    change(place, "[sft]", "[sft]\nmicro_batch_size = 2")
    for stage in ("sample", "score", "select"):
        run(place, stage)
    shutil.copytree(place / "out", place / "alone")
    run(place, "sft", out="alone")
    launch = [
        "accelerate",
        "launch",
        "--config_file",
        str(CONFIGS / "accelerate" / "two-cpus.yaml"),
    ]
    command = [*launch, "-m", "graftkit", "distill", "run.toml", "-o", "out", "--only", "sft"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(
        command, cwd=place, env=os.environ | {"PATH": path}, check=True, capture_output=True
    )
    alone, together = (lines(place / out / "sft_log.jsonl") for out in ("alone", "out"))
    assert len(together) == len(alone)
    for one, two in zip(alone[:-1], together[:-1], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=0.02)
