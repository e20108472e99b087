"""What one tiny model shows of graftkit: each cell is right, refused, WRONG or CRASH."""

import copy
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tiny_architectures import NotBuilt, class_names, move, tiny_model
from tiny_inputs import ROWS, Inputs, answers, find_inputs
from torch import Tensor
from transformers import PreTrainedModel

import graftkit as gk
from graftkit.attachment import attach
from graftkit.errors import GraftError

CELLS = ("pack", "merge", "merged", "side", "rows", "generate", "one matrix", "export")
FAR = 0.01
"""Share of the way from the target to the tuned model by which an answer may be off."""
STEP = 0.02
"""Standard deviation of the move of every parameter; about half of what they are drawn with."""
Answers = dict[str, Tensor]
Cell = dict[str, str]
ROUTES = ([0, None, 0], [None, 0, None])


class Wrong(Exception):
    """A check failed; the message says what the model did."""


class Pair:
    """One model type on disk in two states, and how both answer. Raises: NotBuilt."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.model, self.inputs = _built(name)
        self.class_name = type(self.model).__name__
        self.parameters = sum(value.numel() for value in self.model.parameters())
        self.cls = type(self.model)
        self.save("target")
        move(self.model, 1, STEP)
        self.save("tuned")
        try:
            self.target, self.tuned = self.load("target"), self.load("tuned")
        except Exception as error:
            raise NotBuilt(f"not loaded again: {type(error).__name__}: {error}") from error
        lost = differing(self.model, self.tuned, parameters_only=True)
        if lost:
            raise NotBuilt(f"{lost} is not loaded as it was saved")
        self.model.load_state_dict(self.target.state_dict())
        self.base, self.want = answers(self.target, self.inputs), answers(self.tuned, self.inputs)
        self.tolerance = FAR + 10 * self._shaken()

    def save(self, part: str) -> None:
        """The model as it is now into folder/part. Raises: NotBuilt."""
        try:
            self.model.save_pretrained(self.folder / part)
        except Exception as error:
            raise NotBuilt(f"not saved: {type(error).__name__}: {error}") from error

    def load(self, part: str) -> PreTrainedModel:
        """The model of folder/part in float32, as transformers loads it."""
        model: PreTrainedModel = self.cls.from_pretrained(self.folder / part, dtype=torch.float32)
        return model.eval()

    def pack(self, tuned: str = "tuned") -> gk.SkillPack:
        """The lossless pack of one of the tuned folders."""
        folders = (self.folder / "target", self.folder / tuned)
        return gk.pack_delta(*folders, recipe="lossless", workers=1)

    def check_untouched(self) -> None:
        """Raises: Wrong when the target is not bit for bit as its folder."""
        changed = differing(self.model, self.target)
        if changed:
            raise Wrong(f"after detach, {changed} is not the target's")
        if any(not torch.equal(value, self.base[key]) for key, value in self.again().items()):
            raise Wrong("after detach, the target answers otherwise")

    def again(self) -> Answers:
        """The target's answers now."""
        return answers(self.target, self.inputs)

    def _shaken(self) -> float:
        """How far rounding alone moves the answers: discrete choices can turn over."""
        model = copy.deepcopy(self.tuned)
        with torch.no_grad():
            for value in model.parameters():
                if value.is_floating_point():
                    value.mul_(1 + 1e-6)
        return far(answers(model, self.inputs), self.want, self.base)


def _built(name: str) -> tuple[PreTrainedModel, Inputs]:
    """The first class of a model type for which inputs can be made. Raises: NotBuilt."""
    reasons = []
    for class_name in class_names(name):
        try:
            model = tiny_model(name, class_name)
            return model, find_inputs(model)
        except NotBuilt as error:
            reasons.append(f"{class_name}: {error}")
    raise NotBuilt(reasons[0] if reasons else "transformers maps it to no class")


def far(got: Answers, want: Answers, base: Answers, rows: list[int] | None = None) -> float:
    """Largest distance of `got` from `want`, as a share of the way from `base` to `want`."""
    if got.keys() != want.keys():
        return float("inf")
    chosen = list(range(ROWS)) if rows is None else rows
    worst = 0.0
    for key, value in want.items():
        if got[key].shape != value.shape:
            return float("inf")
        way = (value - base[key])[chosen].abs().max() if value.shape == base[key].shape else 0.0
        way = max(float(way), 1e-3 * float(value[chosen].abs().max()), 1e-12)
        worst = max(worst, float((got[key] - value)[chosen].abs().max()) / way)
    return worst


def differing(one: torch.nn.Module, other: torch.nn.Module, parameters_only: bool = False) -> str:
    """The first tensor in which two models of one class differ; empty when there is none."""
    states = [
        dict(model.named_parameters()) if parameters_only else model.state_dict()
        for model in (one, other)
    ]
    for key in states[0].keys() | states[1].keys():
        first, second = states[0].get(key), states[1].get(key)
        if first is None or second is None or not torch.equal(first, second):
            return str(key)
    return ""


def check_type(name: str, folder: Path, quick: bool = False) -> dict[str, Any]:
    """Every cell of one model type. Raises: NotBuilt."""
    pair = Pair(name, folder)
    record: dict[str, Any] = {
        "class": pair.class_name,
        "parameters": pair.parameters,
        "inputs": sorted(pair.inputs),
        "tolerance": round(pair.tolerance, 4),
        "effect": round(far(pair.base, pair.want, pair.base), 3),
    }
    packs: list[gk.SkillPack] = []
    cells: dict[str, Cell] = {"pack": _cell(lambda: _pack(pair, packs))}
    if packs:
        [pack] = packs
        cells["merge"] = _cell(lambda: _merge(pair, pack))
        cells["merged"] = _cell(lambda: _merged(pair, pack))
        cells |= _beside(pair, pack)
        if not quick:
            cells["one matrix"] = _cell(lambda: _one_matrix(pair))
        cells["export"] = _cell(lambda: _export(pair, pack))
    return record | {"cells": cells}


def _beside(pair: Pair, pack: gk.SkillPack) -> dict[str, Cell]:
    """The cells of one attachment beside the model."""
    checks = {"side": _side, "rows": _rows, "generate": _generate}
    handles: list[gk.Attachment] = []
    attaching = _cell(lambda: handles.append(attach(pair.target, [pack], mode="side")) or "")
    if not handles:
        return dict.fromkeys(checks, attaching)
    [handle] = handles
    cells = {name: _cell(lambda check=check: check(pair, handle)) for name, check in checks.items()}
    handle.detach()
    after = _cell(lambda: pair.check_untouched() or "")
    return cells if after["verdict"] == "right" else cells | {"side": after}


def _cell(check: Callable[[], str]) -> Cell:
    try:
        said = check()
        return {"verdict": "–" if said.startswith("–") else "right", "detail": said.strip("– ")}
    except Wrong as error:
        return {"verdict": "WRONG", "detail": _short(error)}
    except GraftError as error:
        text = str(error).strip()
        if not text or "\n" in text:
            return {"verdict": "WRONG", "detail": f"refused in several lines: {_short(error)}"}
        return {"verdict": "refused", "detail": f"{type(error).__name__}: {_short(error)}"}
    except Exception as error:
        places = traceback.extract_tb(error.__traceback__)
        ours = [p for p in places if "graftkit" in p.filename] or list(places)
        where = f"{Path(ours[-1].filename).name}:{ours[-1].name}"
        return {"verdict": "CRASH", "detail": f"{type(error).__name__} in {where}: {_short(error)}"}


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _pack(pair: Pair, packs: list[gk.SkillPack]) -> str:
    packs.append(pair.pack())
    return ""


def _merge(pair: Pair, pack: gk.SkillPack) -> str:
    gk.merge_packs(pair.folder / "target", pack, pair.folder / "merged")
    merged = pair.load("merged")
    changed = differing(merged, pair.tuned)
    if changed:
        raise Wrong(f"{changed} of the merged checkpoint is not the tuned model's")
    got = answers(merged, pair.inputs)
    if any(not torch.equal(value, pair.want[key]) for key, value in got.items()):
        raise Wrong("the merged checkpoint does not answer as the tuned model")
    return ""


def _merged(pair: Pair, pack: gk.SkillPack) -> str:
    with gk.attached(pair.target, pack):
        got = pair.again()
    pair.check_untouched()
    if any(not torch.equal(value, pair.want[key]) for key, value in got.items()):
        away = far(got, pair.want, pair.base)
        if away > pair.tolerance:
            raise Wrong(f"{away:.1%} of the delta away from the tuned model")
    return ""


def _side(pair: Pair, handle: gk.Attachment) -> str:
    away = far(pair.again(), pair.want, pair.base)
    if away > pair.tolerance:
        raise Wrong(f"{away:.1%} of the delta away from the tuned model")
    return ""


def _rows(pair: Pair, handle: gk.Attachment) -> str:
    away = []
    for route in ROUTES:
        handle.route(route)
        got = pair.again()
        for row, choice in enumerate(route):
            sides = (pair.base, pair.want) if choice == 0 else (pair.want, pair.base)
            away.append(far(got, sides[1], sides[0], [row]))
    if max(away) > pair.tolerance:
        shares = ", ".join(f"{share:.1%}" for share in away)
        raise Wrong(f"rows of {ROUTES} are {shares} of the delta away from their own model")
    return ""


def _generate(pair: Pair, handle: gk.Attachment) -> str:
    if not pair.target.can_generate() or "input_ids" not in pair.inputs:
        return "– generates no text"
    handle.route([None])
    try:
        base, want = (_written(model, pair.inputs) for model in (pair.target, pair.tuned))
    except GraftError:
        raise
    except Exception as error:
        return f"– transformers does not generate: {type(error).__name__}: {_short(error)}"
    for route in ROUTES:
        handle.route(route)
        got = _written(pair.target, pair.inputs)
        for row, choice in enumerate(route):
            if got[row].tolist() != (want if choice == 0 else base)[row].tolist():
                raise Wrong(f"row {row} of {route} writes other tokens than its own model")
    return ""


def _written(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        tokens = model.generate(
            # Some classes write into their inputs.
            **{k: copy.deepcopy(v) for k, v in inputs.items() if not k.startswith("decoder")},
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            num_beams=1,
            use_cache=True,
        )
    if not isinstance(tokens, Tensor):
        tokens = tokens.sequences
    if tokens.shape[0] != ROWS:
        raise ValueError(f"{list(tokens.shape)} tokens for {ROWS} rows")
    return tokens


def _one_matrix(pair: Pair) -> str:
    """Only one matrix moves: a weight that is read without a call of its module shows here."""
    said = []
    for index, name in enumerate(_matrices(pair)):
        part = f"moved-{index}"
        model = copy.deepcopy(pair.model)
        move(model, 2, 0.1, name)
        model.save_pretrained(pair.folder / part)
        want = answers(model, pair.inputs)
        one = pair.pack(part)
        try:
            with gk.attached(pair.target, one, mode="side"):
                got = pair.again()
        except GraftError as error:
            if "\n" in str(error).strip():
                raise Wrong(f"{name}: refused in several lines: {_short(error)}") from error
            said.append(f"{name}: {_short(error)}")
            continue
        pair.check_untouched()
        away = far(got, want, pair.base)
        if away > pair.tolerance:
            raise Wrong(f"only {name} moved: {away:.1%} of its effect away")
    if said:
        raise GraftError(said[0])
    return ""


def _matrices(pair: Pair) -> list[str]:
    """Two matrices of different kinds, drawn by the type's name."""
    kinds: dict[str, str] = {}
    for name, value in pair.target.named_parameters():
        if value.ndim > 1 and value.is_floating_point():
            kinds.setdefault(".".join(p for p in name.split(".") if not p.isdigit()), name)
    generator = torch.Generator().manual_seed(zlib.crc32(pair.name.encode()))
    order = torch.randperm(len(kinds), generator=generator).tolist()
    names = list(kinds.values())
    return [names[index] for index in order[:2]]


def _export(pair: Pair, pack: gk.SkillPack) -> str:
    export = gk.export_lora(pack, pair.folder / "target", pair.folder / "lora")
    base = copy.deepcopy(pair.model)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    adapted = PeftModel.from_pretrained(base, str(pair.folder / "lora"))
    live = answers(adapted.get_base_model(), pair.inputs)
    merged = adapted.merge_and_unload()
    after, tuned = merged.state_dict(), pair.tuned.state_dict()
    for module in export.modules:
        key = f"{module.module}.weight"
        delta = tuned[key] - before[key]
        error = float((after[key] - tuned[key]).norm() / delta.norm().clamp_min(1e-12))
        if abs(error - module.relative_error) > 0.01:
            raise Wrong(f"{key}: {error:.3f} away, the export says {module.relative_error:.3f}")
    carried = {f"{module.module}.weight" for module in export.modules}
    moved = [k for k in after if k not in carried and not torch.equal(after[k], before.get(k))]
    tied = {after[key].data_ptr() for key in carried}
    if any(after[key].data_ptr() not in tied for key in moved):
        raise Wrong(f"{moved[0]} is changed, and the export does not name it")
    away = far(live, answers(merged, pair.inputs), pair.base)
    if away > pair.tolerance:
        raise Wrong(f"PEFT's live adapter is {away:.1%} of the delta away from the merged one")
    return f"{len(export.modules)} modules, {len(export.left_out)} left out"
