"""The real benchmark without its model: stages, splits of rows, and tables of what stages left."""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "real"


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of benchmarks/real, which import each other by their short names."""
    from importlib import import_module

    names = ("stages", "tasks", "frontier", "report")
    saved = {name: sys.modules.pop(name, None) for name in (*names, "ledger")}
    monkeypatch.syspath_prepend(str(BENCHMARK))
    path = list(sys.path)
    yield SimpleNamespace(**{name: import_module(name) for name in names})
    sys.path[:] = path
    for name, module in saved.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of every skill: 5,000 that are numbered, and 400 test rows."""
    for name in ("clinc150_intent", "nl_regex", "snips_function_call"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for file, count in (("train", 5_000), ("test", 400)):
            rows = ({"prompt": f"{file} {i}", "completion": f" {i}"} for i in range(count))
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "data" / name / f"{file}.jsonl").write_text(text)
    return tmp_path / "data"


def setup(real: Any, work: Path) -> Any:
    work.mkdir(exist_ok=True)
    return real.stages.Setup(work, work, None, None)


def test_a_stage_writes_under_another_name_and_is_renamed_at_the_end(real: Any, tmp_path: Path):
    def make(out: Path) -> None:
        assert out.parent == tmp_path / "work"
        assert not (out.parent / "one").exists()
        out.write_text("made")

    stages = [real.stages.Stage("one", make)]
    real.stages.run_stage(setup(real, tmp_path / "work"), lambda _: stages, "one", 1)
    assert (tmp_path / "work" / "one").read_text() == "made"


def test_a_stage_that_fails_leaves_nothing_under_its_name_and_is_made_again(
    real: Any, tmp_path: Path
):
    attempts = []

    def make(out: Path) -> None:
        out.mkdir()
        (out / "half").write_text("half")
        attempts.append(out)
        if len(attempts) == 1:
            raise RuntimeError("interrupted")

    where = setup(real, tmp_path / "work")
    stages = [real.stages.Stage("one", make)]
    with pytest.raises(RuntimeError, match="interrupted"):
        real.stages.run_stage(where, lambda _: stages, "one", 1)
    assert not (tmp_path / "work" / "one").exists()
    real.stages.run_stage(where, lambda _: stages, "one", 1)
    assert (tmp_path / "work" / "one" / "half").is_file()


def test_stages_run_in_order_and_those_that_wait_for_a_failed_one_are_named(
    real: Any, tmp_path: Path
):
    where = setup(real, tmp_path / "work")
    program = (
        "import pathlib, sys; name = sys.argv[-1]; work = pathlib.Path(sys.argv[1]);"
        "sys.exit(1) if name == 'bad' else (work / name).write_text(str(len(list(work.iterdir()))))"
    )
    command = [sys.executable, "-c", program, str(where.work)]
    stage = real.stages.Stage
    stages = [
        *(stage("first", print), stage("bad", print), stage("waits", print, ("bad",))),
        stage("last", print, ("first",)),
    ]
    failed = real.stages.run_pending(where, lambda _: stages, "*", command)
    assert failed == ["bad", "waits"]
    assert sorted(path.name for path in where.work.iterdir()) == ["first", "last"]
    assert (where.work / "first").read_text() < (where.work / "last").read_text()


def test_what_is_there_is_not_made_again(real: Any, tmp_path: Path):
    where = setup(real, tmp_path / "work")
    (where.work / "one").write_text("kept")
    stages = [real.stages.Stage("one", print)]
    command = [sys.executable, "-c", "import sys; sys.exit(1)"]
    assert real.stages.run_pending(where, lambda _: stages, "*", command) == []
    assert (where.work / "one").read_text() == "kept"


def test_no_row_has_two_roles(real: Any, data: Path):
    for skill in real.tasks.SKILLS:
        split = real.tasks.split_rows(data, skill)
        parts = [split.train, split.validation, split.unused, split.test]
        prompts = [{row["prompt"] for row in part} for part in parts]
        assert sum(map(len, prompts)) == len(set().union(*prompts))
        assert [len(part) for part in parts[:2]] == [skill.row_count, 200]
        assert len(split.test) == 300


def test_batches_hold_every_training_row_once(real: Any, data: Path):
    skill = real.tasks.SKILLS[0]
    rows = real.tasks.split_rows(data, skill).train
    batches = list(real.tasks.batches_of_rows(rows))
    assert [len(batch) for batch in batches] == [24] * (skill.row_count // 24)
    seen = sorted(row["prompt"] for batch in batches for row in batch)
    assert seen == sorted(row["prompt"] for row in rows)
    assert batches == list(real.tasks.batches_of_rows(rows))
    assert batches != list(real.tasks.batches_of_rows(rows, seed=1))


def test_held_out_documents_are_not_trained_on(real: Any, tmp_path: Path):
    (tmp_path / "base").mkdir()
    texts = [f"document {i}" for i in range(25)]
    with gzip.open(tmp_path / "base" / "techdoc-train.txt.gz", "wt") as stream:
        stream.write("\n<|endoftext|>\n".join(texts))
    train, held_out = real.tasks.split_documents(tmp_path)
    assert held_out == ["document 0", "document 10", "document 20"]
    assert sorted(train + held_out) == sorted(texts)


def test_every_cell_has_its_own_stages(real: Any, tmp_path: Path):
    where = setup(real, tmp_path / "work")
    cells = [*real.frontier.first_cells(""), *real.frontier.other_cells("")]
    names = [stage.name for stage in real.frontier.cell_stages(where, iter(cells))]
    assert len(names) == len(set(names))
    assert len({cell.key for cell in cells}) == len(cells)
    tagged = [*real.frontier.first_cells("old"), *real.frontier.other_cells("old")]
    same = {cell.key for cell in cells} & {cell.key for cell in tagged}
    own = {cell.key for cell in cells if cell.method in real.frontier.OWN}
    assert not same & own  # another version of graftkit makes other packs, and the same baselines


def write(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))


def score(exact: float, kl: float) -> dict[str, Any]:
    distance = {"kl_mean": kl, "kl_p99": kl, "top1": 0.9, "tokens": 10}
    names = dict.fromkeys(("own", "books", "python"), distance)
    return {"pair": "clinc150", "exact_match": exact, **names}


def results(real: Any, work: Path) -> None:
    """What stages leave for one skill: a pack, one that does not fit, a lossless one, a LoRA."""
    write(work / "target" / "model.safetensors", {})
    (work / "target" / "model.safetensors").write_bytes(bytes(1_000))
    for name, exact, kl in (("target", 0.0, 3.0), ("tuned", 0.8, 0.0), ("auto-1%", 0.76, 0.1)):
        write(work / f"score-clinc150-{name}.json", score(exact, kl))
    record = {
        "pair": "clinc150", "method": "auto", "budget": "1%", "seed": 0, "tag": "", "bytes": 10,
        "cpu_seconds": 5.0, "wall_seconds": 6.0, "peak_bytes": 7_000_000,
        "sources": real.frontier.source_digest(),
    }  # fmt: skip
    write(work / "pack-clinc150-auto-1%" / "pack.json", record)
    lossless = {**record, "method": "lossless", "budget": None, "bytes": 200, "restored": True}
    write(work / "pack-clinc150-lossless" / "pack.json", {**lossless, "sources": "older"})
    refused = {k: v for k, v in record.items() if k != "bytes"}
    refused |= {"method": "svd", "refused": "one rank does not fit"}
    write(work / "pack-clinc150-svd-1%" / "pack.json", refused)
    adapter = work / "lora-clinc150-r4-0.001"
    log = {"rank": 4, "rate": 1e-3, "seed": 0, "cpu_seconds": 9.0, "peak_bytes": 8}
    write(adapter / "training.json", log)
    (adapter / "adapter_model.safetensors").write_bytes(bytes(60))
    write(work / "score-lora-clinc150-r4-0.001.json", score(0.6, 0.2))


def table(file: Path) -> list[dict[str, str]]:
    import csv

    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_tables_hold_what_the_stages_left(real: Any, tmp_path: Path):
    pytest.importorskip("matplotlib")
    results(real, tmp_path / "work")
    files = real.report.write_report(tmp_path / "work", tmp_path / "docs")
    folder = tmp_path / "docs" / "results" / "real"
    assert tmp_path / "docs" / "figures" / "real-frontier.png" in files
    rows = {row["method"]: row for row in table(folder / "frontier.csv")}
    assert rows["auto"]["recovered"] == "0.95"
    assert rows["auto"]["share %"] == "1"
    assert rows["svd"]["refused"] == "one rank does not fit"
    assert rows["LoRA, trained"]["bytes"] == "60"
    [equal] = [r for r in table(folder / "equal-accuracy.csv") if r["method"] == "auto"]
    assert equal["ratio"] == "6"
    [reach] = table(folder / "reach.csv")
    assert (reach["recovered"], reach["reached"]) == ("0.95", "no")  # of one skill of three
    [lossless] = table(folder / "lossless.csv")
    assert lossless["version"].endswith("(old)")
