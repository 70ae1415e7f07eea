"""One process of a run: `cuda_worker.py CONFIG [flags]`, as the entry point, but for the report at its end.

Processes of one run may share a card: they talk through gloo, since NCCL refuses that.
"""

import os
import sys
from functools import partial

from Core.cli import main
from Core.training import setup
from Core.utils import distributed

if "WORLD_SIZE" in os.environ:
    distributed.InitProcessGroupKwargs = partial(distributed.InitProcessGroupKwargs, backend="gloo")
setup.report = lambda folder: None  # its charts take longer than the run
sys.exit(main(sys.argv[1:]))
