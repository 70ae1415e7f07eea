"""Config files and the flags of Open-Sora v1.2.0's own sampling and training scripts."""

import argparse
import os
from typing import Any

from mmengine import DictAction
from mmengine.config import Config

# Flag -> keywords of `add_argument`. A flag that is given overrides the key of its name in the config file.
_FLAGS: dict[str, dict[str, Any]] = {
    "--seed": dict(type=int, help="seed of everything random"),
    "--batch-size": dict(type=int, help="samples drawn together"),
    "--outputs": dict(help="folder for logs and checkpoints"),
    "--dtype": dict(help="fp32, fp16 or bf16"),
    "--resolution": dict(help="name such as 240p or 720p"),
}
_INFERENCE_FLAGS: dict[str, dict[str, Any]] = {
    "--save-dir": dict(help="folder for the samples"),
    "--start-index": dict(type=int, help="first prompt of the file"),
    "--end-index": dict(type=int, help="prompt of the file to stop before"),
    "--verbose": dict(type=int, help="0 quiet, 1 progress, 2 everything"),
    "--prompt-path": dict(help="file with one prompt a line"),
    "--prompt": dict(nargs="+", help="prompts, each quoted"),
    "--num-frames": dict(help="number of frames, or a duration such as 4s"),
    "--fps": dict(type=int, help="frame rate the model is told"),
    "--save-fps": dict(type=int, help="frame rate of the files"),
    "--frame-interval": dict(type=int, help="every how many frames of the source clip one is modelled"),
    "--image-size": dict(type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels"),
    "--aspect-ratio": dict(help="H:W, for example 9:16"),
    "--loop": dict(type=int, help="clips to chain into a long video"),
    "--condition-frame-length": dict(type=int, help="latent frames a clip takes over from the one before"),
    "--condition-frame-edit": dict(type=float, help="edit ratio of those frames"),
    "--reference-path": dict(nargs="+", help="pictures or videos for each prompt, joined by ;"),
    "--mask-strategy": dict(nargs="+", help="mask strategy for each prompt"),
    "--aes": dict(type=float, help="aesthetic score to ask for"),
    "--flow": dict(type=float, help="motion score to ask for"),
    "--camera-motion": dict(help="camera motion to ask for"),
}
_TRAINING_FLAGS: dict[str, dict[str, Any]] = {"--lr": dict(type=float, help="learning rate")}

# Flags whose key sits inside another one of the config file: (flag, keywords, outer key, inner key).
_NESTED_FLAGS = (("--ckpt-path", dict(help="weights of the denoiser"), "model", "from_pretrained"),)
_NESTED_INFERENCE_FLAGS = (
    ("--num-sampling-steps", dict(type=int, help="Euler steps"), "scheduler", "num_sampling_steps"),
    ("--cfg-scale", dict(type=float, help="guidance scale"), "scheduler", "cfg_scale"),
)


def parse_configs(training=False, argv=None):
    """Read ``CONFIG [flags]`` from the command line into one mmengine Config, flags over file.

    Args:
        training: offer the flags of training instead of those of sampling.
        argv: arguments; None takes the process's own.

    Raises:
        FileNotFoundError: no such config file.
        ValueError: a flag sets a part of a key that the file lacks.
    """
    nested = _NESTED_FLAGS if training else _NESTED_FLAGS + _NESTED_INFERENCE_FLAGS
    args = vars(_build_parser(training, nested).parse_args(argv))
    path, options = args.pop("config"), args.pop("cfg_options")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"config file {path!r} does not exist; give the path of an mmengine config file"
        )
    config = Config.fromfile(path)
    if options:
        config.merge_from_dict(options)
    for flag, _, outer, inner in nested:
        value = args.pop(_key(flag))
        if value is None:
            continue
        if outer not in config:
            raise ValueError(
                f"{flag} sets {outer}.{inner}, but {path!r} has no {outer!r}; add it to the file"
            )
        config[outer][inner] = value
    for key, value in args.items():
        if value is not None:
            config[key] = value
    return config


def _build_parser(training, nested):
    parser = argparse.ArgumentParser()
    parser.add_argument("config", metavar="CONFIG", help="mmengine config file")
    flags = _FLAGS | (_TRAINING_FLAGS if training else _INFERENCE_FLAGS)
    flags |= {flag: keywords for flag, keywords, *_ in nested}
    for flag, keywords in flags.items():
        parser.add_argument(flag, **keywords)
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="any config key"
    )
    return parser


def _key(flag):
    return flag.removeprefix("--").replace("-", "_")
