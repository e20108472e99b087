"""What PEFT makes of an adapter on disk, found out by loading it there onto an empty model.

PEFT rewrites some adapters as it loads them: on models whose experts transformers stacks, targets
called gate_proj, up_proj or down_proj become parameters of the experts, also where a dense layer
has that name; on Mamba models it refuses out_proj. What is lost so it says in a warning at most.
And beside a layer whose weight another module reads, an adapter does nothing.
"""

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from graftkit.attachment.coverage import ChangedWeight, ReadWatch
from graftkit.attachment.probe import Probe, Unrunnable
from graftkit.delta import Checkpoint
from graftkit.errors import ConfigError
from graftkit.interop.adapter import CONFIG, KEY_PREFIX, WEIGHTS
from graftkit.models.loading import empty_model, quiet


def loadable_modules(
    target: Checkpoint, modules: Iterable[str], config: dict[str, Any]
) -> set[str]:
    """Those of the live modules whose LoRA weights arrive and count when PEFT loads them all.

    Args:
        config: the adapter's, with any target_modules.
    Raises: ConfigError where PEFT is not installed.
    """
    names = sorted(set(modules) - _read_past(_weightless(empty_model(target)), modules))
    loaded = _loaded(target, names, config)
    if loaded is None:
        # PEFT refuses some of them, and goes by the last part of a name.
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(name.rpartition(".")[2], []).append(name)
        parts = [_loaded(target, group, config) or set() for group in groups.values()]
        loaded = set().union(*parts)
    # What arrives alone has to arrive together, too.
    while loaded and (again := _loaded(target, sorted(loaded), config) or set()) != loaded:
        loaded = again
    return loaded


def _read_past(model: Any, modules: Iterable[str]) -> set[str]:
    """Modules whose weights the model reads without calling them, as far as random inputs tell."""
    watched = {name: model.get_submodule(name) for name in modules}
    watch = ReadWatch(
        [ChangedWeight(name, module.weight, module) for name, module in watched.items()]
    )
    try:
        probe = Probe(model)
        watch.start()
        try:
            probe.run(0)
        finally:
            watch.stop()
    except Unrunnable:
        return set()
    return set(watch.missed)


def _loaded(target: Checkpoint, names: list[str], config: dict[str, Any]) -> set[str] | None:
    """The modules of a random adapter whose weights PEFT holds afterwards; None if it refuses."""
    try:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ConfigError(
            "an exported adapter is checked by loading it in PEFT, which is not installed; "
            "pip install peft"
        ) from error
    model = _weightless(empty_model(target))
    written = {name: _random_factors(model.get_submodule(name)) for name in names}
    tensors = {
        f"{KEY_PREFIX}{name}.lora_{letter}.weight": value
        for name, factors in written.items()
        for letter, value in zip("AB", factors, strict=True)
    }
    with TemporaryDirectory(prefix="graftkit-") as folder:
        save_file(tensors, Path(folder) / WEIGHTS)
        settings = {**config, "r": 1, "lora_alpha": 1, "target_modules": names}
        (Path(folder) / CONFIG).write_text(json.dumps(settings))
        try:
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                held = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)
        except (ValueError, RuntimeError, KeyError, TypeError, NotImplementedError):
            return None
    found = {}
    for name, module in held.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            found[name] = (module.lora_A["default"].weight, module.lora_B["default"].weight)
    return {name for name, factors in written.items() if _same(factors, found.get(name))}


def _weightless(model: Any) -> Any:
    """The model with zeros that take no memory: PEFT puts an adapter on its layer's device."""
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                zeros = torch.zeros((), dtype=value.dtype).expand(value.shape)
                module._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = torch.zeros(value.shape, dtype=value.dtype)
    return model


def _random_factors(module: Any) -> tuple[Tensor, Tensor]:
    rows, columns = module.weight.shape
    if not hasattr(module, "out_features"):  # Conv1D holds (in, out)
        rows, columns = columns, rows
    return torch.randn(1, columns), torch.randn(rows, 1)


def _same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor] | None) -> bool:
    return other is not None and all(
        not b.is_meta and a.shape == b.shape and torch.equal(a, b.float())
        for a, b in zip(one, other, strict=True)
    )
