"""``vader export``: an adapter in the formats of other programs."""

import logging
from collections.abc import Sequence
from pathlib import Path

from Core.commands.startup import Parser, importing
from Core.generation.formats import FORMATS
from Core.utils.exit_codes import exit_code

HELP = """Writes an adapter in another format. ADAPTER is a run's or checkpoint's adapter/, or an adapter of PEFT,
diffusers, ComfyUI or kohya, or the reference's peft_model_<step>.pt."""


def main(argv: Sequence[str]) -> int:
    parser = Parser("export", HELP, "ADAPTER OUT [flags]")
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

    def write() -> None:
        with importing():
            from Core.generation.export import export
            from Core.generation.publish import push

        if args.public and not args.push:
            raise ValueError("--public goes with --push")
        written = export(
            args.adapter, args.out, args.format, args.config, args.with_base_adapters, args.results, args.push
        )
        logging.info("wrote %s", ", ".join(map(str, written)))
        if args.push:
            logging.info("pushed %s", push(args.out, args.push, public=args.public))

    return exit_code(write)
