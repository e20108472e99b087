"""`graftkit` and `python -m graftkit`: a GraftError becomes one line on stderr and exit 1."""

import os
import sys

from graftkit.errors import GraftError, printable


def main() -> None:
    """Run the command line."""
    # Before torch is loaded: its threads must sleep while they wait for each other. Spinning, on
    # cores that other work shares, made the demo 15 times slower (docs/lab-log.md, 2026-11-22).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from graftkit.cli import app

    try:
        app()
    except GraftError as error:
        line = printable(" ".join(str(error).split()))
        print(f"graftkit: {line}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(
            "graftkit: interrupted; pack, distill and vision graft go on where they were when they "
            "are run again",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
