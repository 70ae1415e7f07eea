"""Train a LoRA adapter by reward gradient, or generate videos: train_t2v_lora.py CONFIG [flags]."""

import sys
from pathlib import Path

OPEN_SORA = Path(__file__).resolve().parents[1]
# The packages of this checkout, wherever the script is started and whether or not they are installed.
sys.path[:0] = [str(OPEN_SORA), str(OPEN_SORA.parent)]

from Core.utils.process import end_with_launcher, quiet_interrupt  # noqa: E402

end_with_launcher()
with quiet_interrupt():
    from Core.cli import main

if __name__ == "__main__":
    sys.exit(main())
