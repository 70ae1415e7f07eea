"""One process of a distributed run: `rank_worker.py FOLDER CONFIG [flags]`.

Trains as the entry point does, in float64, then writes the adapter this process holds to
FOLDER/rank_<n>.safetensors.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from Core.backbones import base
from Core.cli import main
from Core.training.trainer import Trainer

folder, *argv = sys.argv[1:]
fit = Trainer.fit


def fit_and_keep(trainer: Trainer) -> None:
    fit(trainer)
    save_file(dict(trainer.named_parameters), Path(folder) / f"rank_{trainer.distributed.rank}.safetensors")


Trainer.fit = fit_and_keep
base.DTYPES["fp32"] = torch.float64
sys.exit(main(argv))
