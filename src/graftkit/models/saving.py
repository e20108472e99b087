"""A live model's weights, written as the checkpoint they were loaded from."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from graftkit.delta import DTYPES, FLOAT_DTYPES, Checkpoint
from graftkit.errors import CheckpointError
from graftkit.files import writing
from graftkit.models.views import checkpoint_views, find_views, is_unused
from graftkit.sharded import write_checkpoint
from graftkit.side_files import written_files
from graftkit.work import WorkFolder


class CheckpointWriter:
    """Writes weights of a model with the names, layouts, dtypes and side files of `origin`.

    Args:
        model: loaded from `origin`; only its names and shapes are looked at, so that it may be
            sharded or wrapped afterwards.
    """

    def __init__(self, model: Any, origin: Checkpoint):
        self.model, self.origin = model, origin
        self.views = find_views(model, checkpoint_views(model), list(origin.tensors))

    def write(self, state: Mapping[str, Tensor], folder: Path) -> None:
        """Write a folder; it appears whole or not at all, and takes the place of an older one.

        Args:
            state: parameters and buffers by the model's own names, whole.
        Raises: CheckpointError where a tensor on disk is put together from several; OutputError.
        """
        work = WorkFolder(folder.with_name(f"{folder.name}.writing"))
        names = sorted(self.origin.tensors)
        called = self.origin.name
        note = f"Trained by graftkit from {called}. What follows is the card of {called}."
        files = written_files(self.origin.path, {}, note)
        work.open_empty()
        result = work.path / "result"
        try:
            with writing(folder):
                write_checkpoint(result, names, lambda n: self._tensor(n, state), files, _nothing)
                if folder.exists():  # at no time half of it is there
                    os.replace(folder, work.path / "replaced")
                os.replace(result, folder)
        finally:
            work.remove()

    def _tensor(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        view = self.views[name]
        dtype = self.origin.tensors[name].dtype
        if view is None:
            if not is_unused(self.model, name):
                raise CheckpointError(
                    f"{self.origin.path}: {name} is no part of one parameter of "
                    f"{type(self.model).__name__}, so what it learned cannot be written; save the "
                    "model with a current transformers first"
                )
            return self.origin.read(name)
        tensor = view.tensor(state[view.parameter]).cpu()
        return tensor.to(DTYPES[dtype]) if dtype in FLOAT_DTYPES else self.origin.read(name)


def _nothing(done: int) -> None:
    pass
