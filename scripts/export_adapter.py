"""Export a trained adapter: export_adapter.py ADAPTER OUT [--to peft|diffusers|comfyui|hub|… --config CONFIG].

ADAPTER: a run's or checkpoint's `adapter/`, or an adapter of PEFT, diffusers, ComfyUI or kohya, or the reference's
peft_model_<step>.pt.
"""

import argparse
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.generation.export import FORMATS, export  # noqa: E402
from Core.generation.publish import push  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="adapter folder or file")
    parser.add_argument("out", type=Path, help="output path; must not exist")
    parser.add_argument(
        "--format",
        "--to",
        choices=FORMATS,
        default="peft",
        help="peft: a folder that PEFT loads; safetensors: the same as one file; diffusers: a folder for "
        "`load_lora_weights`; comfyui, kohya: one file in their layout; merged: full weights of the adapted model, in "
        "the Hub's layout, for `model.from_pretrained`; hub: a folder with a model card, to share",
    )
    parser.add_argument(
        "--config",
        help="config file naming the base model; an adapter in a run's folder needs it only for merged",
    )
    parser.add_argument(
        "--with-base-adapters", action="store_true", help="merged: include the config's base_adapters"
    )
    parser.add_argument(
        "--results", type=Path, help="hub: evaluation.json for the table of gains (default: that of the run)"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="hub: upload the folder as this repository")
    parser.add_argument(
        "--public",
        action="store_true",
        help="with --push: a new repository is open to everybody, not private",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if args.public and not args.push:
            raise ValueError("--public goes with --push")
        written = export(
            args.adapter, args.out, args.format, args.config, args.with_base_adapters, args.results, args.push
        )
        logging.info("wrote %s", ", ".join(map(str, written)))
        if args.push:
            logging.info("pushed %s", push(args.out, args.push, public=args.public))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
