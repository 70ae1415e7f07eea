"""``python -m Core``, and the file that the launchers start: the ``vader`` command of this copy of the package."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Started by its path: the folder of Core in place of Core, which is absent with PYTHONSAFEPATH.
    if not __package__:
        own = Path(__file__).resolve().parent
        sys.path[:] = [str(own.parent), *(path for path in sys.path if Path(path).resolve() != own)]
    from Core.commands.main import main

    sys.exit(main())
