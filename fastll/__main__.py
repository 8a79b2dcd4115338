"""Entry point of ``python -m fastll``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say how to install the packages it needs."""
    try:
        from fastll.cli import main as command
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"click", "rich"}:
            raise
        sys.exit('python -m fastll needs click and rich: pip install "fastll[cli]"')
    except KeyboardInterrupt:
        sys.exit(130)
    command(prog_name="python -m fastll")


if __name__ == "__main__":
    main()
