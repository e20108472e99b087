"""The process of an answer: it runs the code, then does what the tests ask for, over a wire.

    python -c SOURCE DESCRIPTOR FOLDER WALLS READABLE, with the code on standard input

Nothing of the tests is here but the arguments of their calls, and no verdict is written here.
sandbox.py gives this source to a fresh interpreter.
"""

import builtins
import json
import os
import sys
import types
from typing import Any

from graftkit.distill.scores.fence import enclose
from graftkit.distill.scores.wire import Wire


def main() -> None:
    """Serve one answer, and end the process whatever else runs in it."""
    descriptor, folder, walls, readable = sys.argv[1:]
    with open(0, encoding="utf-8", closefd=False) as file:
        source = json.load(file)
    os.dup2(2, 0)  # /dev/null
    os.dup2(2, 1)
    program = types.ModuleType("__main__")
    names = vars(program)
    names["__builtins__"] = vars(builtins)

    def load() -> None:
        exec(compile(source, "<answer>", "exec"), names)

    def name(wanted: str) -> Any:
        return names[wanted]

    wire = Wire(int(descriptor), lambda *_: True, lambda: os._exit(0), load=load, name=name)
    sys.modules["__main__"] = program
    del sys.argv[1:]
    enclose(folder, json.loads(walls), json.loads(readable))
    wire.serve()
