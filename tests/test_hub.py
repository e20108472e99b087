"""Models and packs from the Hub: the real client, a cache folder and a server on this machine."""

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_models import lossless_pack, make_pair

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache: Path, repository: str, folder: Path) -> None:
    """Lay `folder` out as the Hub's client keeps a downloaded snapshot."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(COMMIT)
    snapshot = place / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())


def run_python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


@pytest.mark.slow
def test_target_tuned_and_pack_are_found_by_their_hub_ids(tmp_path: Path) -> None:
    target, tuned = make_pair(tmp_path, "llama")
    cache, packs = tmp_path / "cache", tmp_path / "packs"
    packs.mkdir()
    lossless_pack(target, tuned).save(packs / "skill.skillpack")
    for repository, folder in (("me/base", target), ("me/tuned", tuned), ("me/skill", packs)):
        fill_cache(cache, repository, folder)
    code = """
import graftkit as gk
pack = gk.pack_delta("me/base", "me/tuned@main", recipe="lossless")
print(pack.manifest.target.name, pack.manifest.target.revision, pack.manifest.tuned.name)
print(gk.SkillPack.from_pretrained("me/skill").pack_bytes > 0)
try:
    gk.SkillPack.from_pretrained("me/absent")
except Exception as error:
    print(type(error).__name__)
"""
    done = run_python(code, {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"})
    assert done.stdout.split() == ["me/base", COMMIT, "me/tuned", "True", "GraftError"], done.stderr


class _Hub(BaseHTTPRequestHandler):
    """The four calls of an upload, as huggingface_hub makes them."""

    files: dict[str, bytes] = {}  # noqa: RUF012  (one server, one test)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.answer({"url": "https://huggingface.co/me/skill", "id": "me/skill"})
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
            ]
            self.answer({"files": modes})
        elif "/commit/main" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[entry["value"]["path"]] = content
            answer = {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": "https://huggingface.co/me/skill/commit/1",
            }
            self.answer(answer)
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        self.answer({"id": "me/skill", "sha": COMMIT, "siblings": []})

    def answer(self, content: dict[str, object]) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def hub() -> Iterator[str]:
    """Address of a server that takes uploads."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_an_uploaded_pack_is_the_file_that_save_writes(hub: str, tmp_path: Path) -> None:
    target, tuned = make_pair(tmp_path, "llama")
    lossless_pack(target, tuned).save(tmp_path / "x.skillpack")
    code = f"""
import graftkit as gk
print(gk.SkillPack.load({str(tmp_path / "x.skillpack")!r}).push_to_hub("me/skill"))
"""
    environment = {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path / "home")}
    done = run_python(code, environment)
    assert done.returncode == 0, done.stderr
    assert _Hub.files["skill.skillpack"] == (tmp_path / "x.skillpack").read_bytes()
