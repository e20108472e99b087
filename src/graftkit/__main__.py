"""`graftkit` and `python -m graftkit`: a GraftError becomes one line on stderr and exit 1."""

import sys

from graftkit.errors import GraftError


def main() -> None:
    """Run the command line."""
    from graftkit.cli import app

    try:
        app()
    except GraftError as error:
        line = " ".join(str(error).split())
        print(f"graftkit: {line}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("graftkit: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
