"""A pack taken apart, and put together again with something wrong in it.

It is the tiny model of the golden files, packed when tests start.
"""

import importlib.util
import json
import struct
import tempfile
from pathlib import Path

import torch
from blake3 import blake3

from graftkit.checkpoint import Checkpoint
from graftkit.skillpack import SkillPack

ROOT = Path(__file__).parents[2]
_TEMPORARY = tempfile.TemporaryDirectory(prefix="graftkit-forge-")


def load_tool(name):
    """A module of tools/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fresh():
    folder = Path(_TEMPORARY.name) / "tiny-v2"
    load_tool("write_golden").write_files(folder)
    return folder


FOLDER = _fresh()
PACK = FOLDER / "tiny.skillpack"


class Forgery:
    """Parts of a pack. Digests, sizes and offsets are made to fit whatever the parts say."""

    def __init__(self):
        content = PACK.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        self.manifest = json.loads(header.pop("__metadata__")["manifest"])
        data = content[8 + length :]
        self.payloads = {}
        start = 0
        for record in self.manifest["tensors"]:
            if "bytes" in record:
                self.payloads[record["name"]] = data[start : start + record["bytes"]]
                start += record["bytes"]
        del header["tensors"]
        self.payloads |= {
            name: data[slice(*entry["data_offsets"])] for name, entry in header.items()
        }
        self.manifest_text = None
        self.sealed = True

    def record(self, name):
        return next(record for record in self.manifest["tensors"] if record["name"] == name)

    def set_payload(self, name, payload):
        """Put another payload in, under a correct digest."""
        self.payloads[name] = bytes(payload)
        self.record(name)["bytes"] = len(payload)

    def change_shape(self, name, shape, **fields):
        """Give a record another shape, and the target the number of parameters that fits."""
        record = self.record(name)
        record.update(fields)
        before, after = (torch.Size(s).numel() for s in (record["shape"], shape))
        self.manifest["target"]["parameters"] += after - before
        record["shape"] = list(shape)

    def header(self):
        if self.sealed and "payload_blake3" in self.manifest:
            whole = blake3(b"".join(self.payloads.values())).hexdigest()
            self.manifest["payload_blake3"] = whole
        text = self.manifest_text
        if text is None:
            text = json.dumps(self.manifest)
        digest = blake3(text.encode("utf-8", "surrogatepass")).hexdigest()
        metadata = {"format": "skillpack", "version": "2", "manifest": text}
        header = {"__metadata__": metadata | {"manifest_blake3": digest}}
        offset = 0
        for name, size in self._entries():
            offsets = [offset, offset + size]
            header[name] = {"dtype": "U8", "shape": [size], "data_offsets": offsets}
            offset = offsets[1]
        return header

    def _entries(self):
        sizes = {name: len(payload) for name, payload in self.payloads.items()}
        rest = [
            (name, size)
            for name, size in sizes.items()
            if name.startswith("file:") or name == "router"
        ]
        together = sum(sizes.values()) - sum(size for _, size in rest)
        return [("tensors", together), *rest] if together else rest

    def build(self, header=None):
        """The bytes of the file; `header`: an object or JSON text in place of the right one."""
        header = self.header() if header is None else header
        text = header if isinstance(header, str) else json.dumps(header)
        encoded = text.encode("utf-8", "surrogatepass")
        encoded += b" " * (-len(encoded) % 8)
        return struct.pack("<Q", len(encoded)) + encoded + b"".join(self.payloads.values())

    def open(self, folder, header=None):
        """Write the file and load it."""
        path = folder / "forged.skillpack"
        path.write_bytes(self.build(header))
        return SkillPack.load(path)


def target_of(record):
    """The tiny target's tensor for a record."""
    if record.target_name is None:
        return torch.zeros(record.shape, dtype=torch.bfloat16)
    return Checkpoint.open(FOLDER / "target").read(record.target_name)


def read_everything(path):
    """Open a pack and decode all it holds, as its users do."""
    pack = SkillPack.load(path)
    target = Checkpoint.open(FOLDER / "target")
    decoded = {r.name: pack.decode(r.name, target_of(r)) for r in pack.manifest.tensors}
    return decoded, pack.side_files(target)
