"""What surrounds the parts of a family: its manifest, their side files, and the room they leave."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from graftkit.config import Budget
from graftkit.delta import FLOAT_DTYPES, TENSOR_DIGEST_HEX, TensorInfo
from graftkit.errors import BudgetError
from graftkit.fuse.family_file import Content, FamilyManifest, Member, family_header, write_family
from graftkit.fuse.family_methods import FamilyMethod
from graftkit.fuse.merging import Mixture
from graftkit.packing.assemble import GENERATOR
from graftkit.packing.pairs import match_tensors
from graftkit.skillpack import SkillPack
from graftkit.skillpack.container import build_header, file_entry
from graftkit.skillpack.manifest import FileRecord, Manifest, TargetInfo, TensorRecord, TunedInfo

_WORST_ERROR = 0.0001234  # as many characters as any error takes
_LONGEST = 10**12  # bytes of a part: as many digits as its length ever has in a manifest
_SLACK = 64  # bytes that a larger budget may add to the manifest, which repeats it


class FamilyFrame:
    """Names, method and budget of a family, and the bytes that its parts may take.

    Attributes:
        names: of the skills. lossy: tensors that packs store lossily, by name.
        room: bytes for the shared and all private parts.
        least_part: bytes in which a pack of the target always fits, whatever its deltas are.
    """

    def __init__(
        self,
        mixture: Mixture,
        names: tuple[str, ...],
        method: str,
        rule: FamilyMethod,
        budget: Budget,
    ):
        self.names, self._method, self._rule, self._budget = names, method, rule, budget
        self._target, self._packs = mixture.target, mixture.packs
        pairs = match_tensors(self._target, self._target)
        self.lossy = {pair.name for pair in pairs if pair.lossy}
        changes = [{(f.name, f.blake3) for f in p.manifest.files} for p in self._packs]
        self._alike = set.intersection(*changes)
        self._limit = budget.to_bytes(self._target.nbytes, self._target.parameters)
        self.room = self._limit - self._fixed_bytes()
        self.least_part = self._least_part()

    def check_room(self, needed: int, what: str) -> None:
        """Raises: BudgetError where the parts cannot do with less than `needed` bytes."""
        if needed > self.room:
            raise self.too_small(needed, what)

    def too_small(self, needed: int, what: str) -> BudgetError:
        """What to say where the parts take `needed` bytes."""
        least = needed + self._limit - self.room + _SLACK
        share = 100 * least / self._target.nbytes
        return BudgetError(
            f"budget {self._budget.text} is {self._limit:,} bytes, but {what} of this family take "
            f"{least:,}; ask for at least {least}B ({share:.2f}%)"
        )

    def write(
        self, path: Path, shared: SkillPack, private: Sequence[Content], errors: Iterable[float]
    ) -> None:
        """Write the family. Raises: OutputError."""
        contents: list[Content] = [list(shared.parts())]
        for pack, part in zip(self._packs, private, strict=True):
            contents.append(part)
            contents += [[payload] for payload in self._file_payloads(pack)]
        write_family(path, self._manifest(shared.manifest.target, errors), contents)

    def _manifest(self, target: TargetInfo, errors: Iterable[float]) -> FamilyManifest:
        """The manifest; its digest of the parts is a blank."""
        members = [
            Member(
                name=name,
                tuned=pack.manifest.tuned,
                pack_blake3=pack.digest,
                licence=pack.manifest.licence,
                error=float(f"{error:.4g}"),
                files=tuple(self._own_files(pack)),
            )
            for name, pack, error in zip(self.names, self._packs, errors, strict=True)
        ]
        return FamilyManifest(
            generator=GENERATOR,
            target=target,
            method=self._method,  # type: ignore[arg-type]
            settings=self._rule.model_dump(),
            budget=self._budget.text,
            budget_bytes=self._limit,
            payload_blake3="0" * 64,
            skills=tuple(members),
        )

    def _own_files(self, pack: SkillPack) -> list[FileRecord]:
        """Side files that this pack changes otherwise than the others."""
        return [f for f in pack.manifest.files if (f.name, f.blake3) not in self._alike]

    def _file_payloads(self, pack: SkillPack) -> list[memoryview]:
        own = [f for f in self._own_files(pack) if f.prefix + f.suffix < f.bytes]
        return [pack.payload(file_entry(record.name)) for record in own]

    def _target_info(self) -> TargetInfo:
        """As long as what a pack of this target says of it."""
        known = self._packs[0].manifest.target
        named = {"name": self._target.name, "revision": self._target.revision}
        return known.model_copy(update=named)

    def _fixed_bytes(self) -> int:
        """Bytes of header and side files, at most."""
        manifest = self._manifest(self._target_info(), [_WORST_ERROR] * len(self.names))
        header = family_header(manifest, [_LONGEST] * len(manifest.entries))
        files = [payload for pack in self._packs for payload in self._file_payloads(pack)]
        return len(header) + sum(map(len, files))

    def _least_part(self) -> int:
        infos = self._target.tensors.values()
        longest = max((*self.names, "shared"), key=len)
        manifest = Manifest(
            generator=GENERATOR,
            target=self._target_info(),
            tuned=TunedInfo(name=longest),
            recipe="auto",
            budget=f"{_LONGEST}B",
            budget_bytes=_LONGEST,
            bound_bits_per_parameter=_WORST_ERROR,
            payload_blake3="0" * 64,
            files=tuple(self._packs[0].manifest.files),
            tensors=tuple(self._longest_record(info) for info in infos),
        )
        files = {
            file_entry(f.name): len(self._packs[0].payload(file_entry(f.name)))
            for f in self._packs[0].manifest.files
        }
        sizes = {info.name: _LONGEST for info in infos} | files
        exact = [i for i in infos if i.dtype in FLOAT_DTYPES and i.name not in self.lossy]
        # A tensor stored exactly takes a few bytes more than its own at most.
        stored = sum(info.nbytes + 16 for info in exact)
        return len(build_header(manifest, sizes)) + stored + sum(files.values())

    def _longest_record(self, info: TensorInfo) -> TensorRecord:
        return TensorRecord(
            name=info.name,
            kind="embedding",
            dtype=info.dtype,
            shape=info.shape,
            blake3="0" * TENSOR_DIGEST_HEX,
            codec="lowrank",
            layout="stack_transposed" if len(info.shape) == 3 else "transposed",
            error=_WORST_ERROR,
            tuned_dtype="F32",
            bytes=_LONGEST,
        )
