"""Which tensor of a target's checkpoint an adapter means by the name of a module.

Adapters name modules of the live model. Their weights have other names on disk where a class has
renamed them, one name for two modules where they are tied, and no name of their own where they are
part of a stack.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from graftkit.delta import Checkpoint
from graftkit.interop.experts import Stack
from graftkit.models.architecture import ModuleKind, TensorRole, tensor_roles, tied_names
from graftkit.models.embeddings import input_embeddings, output_embeddings
from graftkit.models.loading import empty_model
from graftkit.models.views import View, checkpoint_views, find_views, live_names
from graftkit.packing.pairs import Pair


@dataclass(frozen=True)
class Place:
    """A tensor of the model: on disk under `name`, or an alias of the tensor `base` there."""

    name: str
    base: str | None = None


class Places:
    """The places of a target. Raises: CheckpointError as `tensor_roles`.

    Attributes:
        tied: alias -> owner for names that share a parameter; an alias may be on disk too.
    """

    def __init__(self, target: Checkpoint):
        self.target, self.tied = target, tied_names(target)
        self._roles, self._model = tensor_roles(target), empty_model(target)
        self._by_parameter: dict[str, list[str]] = {}
        for name, role in self._roles.items():
            self._by_parameter.setdefault(role.parameter, []).append(name)

    def find(self, parameters: list[str]) -> dict[str, Place | None]:
        """The place of every parameter that an adapter names, None where there is none."""
        live = live_names(self._model, parameters)
        return {name: self._place(name, live[name]) for name in parameters}

    def place(self, name: str) -> Place:
        """The place of a tensor on disk or of an alias."""
        return Place(name, None if name in self.target.tensors else self.tied[name])

    def pair(self, place: Place) -> Pair:
        """A tensor as the target has it, and as the result will: same dtype, same shape."""
        info = self.target.tensors[place.base or place.name]
        return Pair(place.name, self._role(place), info, info, place.base)

    def vocabulary(self) -> list[str]:
        """Tensors on disk that have a row for every token: the input embedding, and the head."""
        modules = (input_embeddings(self._model), output_embeddings(self._model))
        ids = {id(module.weight) for module in modules if module is not None}
        state = self._model.state_dict(keep_vars=True)
        return [name for name, role in self._roles.items() if id(state.get(role.parameter)) in ids]

    def stacks(self, module: str) -> list[Stack]:
        """The 3-D parameters of a live module, where every part of them is one tensor on disk."""
        found = []
        for parameter, names in self._by_parameter.items():
            shape = self._shapes.get(parameter, ())
            if parameter.rpartition(".")[0] != module or len(shape) != 3:
                continue
            transposed = self._roles[names[0]].transposed
            experts, rows, columns = shape
            sides = (columns, rows) if transposed else (rows, columns)
            placed = find_views(self._model, self._views, names)
            known = {name: view for name, view in placed.items() if view is not None}
            if len(known) == len(names):
                found.append(Stack(parameter, experts, *sides, transposed, known))
        return found

    @cached_property
    def _views(self) -> dict[str, View]:
        return checkpoint_views(self._model)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        state = self._model.state_dict(keep_vars=True)
        return {name: tuple(parameter.shape) for name, parameter in state.items()}

    def _place(self, name: str, live: str | None) -> Place | None:
        if name in self.target.tensors or name in self.tied:
            return self.place(name)
        found = self._by_parameter.get(live or "", [])
        return Place(found[0]) if len(found) == 1 else None

    def _role(self, place: Place) -> TensorRole:
        if place.base is None:
            return self._roles[place.name]
        owner = self._roles[place.base]
        head = owner.kind is ModuleKind.EMBEDDING
        return replace(owner, name=place.name, kind=ModuleKind.HEAD if head else owner.kind)
