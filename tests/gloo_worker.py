"""One process of a run whose processes share a card: `gloo_worker.py CONFIG [flags]`, as the entry point."""

import sys
from functools import partial

from Core.cli import main
from Core.utils import distributed

distributed.InitProcessGroupKwargs = partial(distributed.InitProcessGroupKwargs, backend="gloo")
sys.exit(main(sys.argv[1:]))
