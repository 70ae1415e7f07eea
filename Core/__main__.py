"""``python -m Core``, and the file that the launchers start: the ``vader`` command of this copy of the package."""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # started by its path: the folder of Core takes the place of Core itself
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from Core.commands.main import main

    sys.exit(main())
