"""Names of number types, and the log."""

import logging
import os

import torch

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp64": torch.float64,
    "float64": torch.float64,
}


def to_torch_dtype(dtype):
    """The torch.dtype a config names ("bf16", "float32", …); a torch.dtype is returned as it is.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def create_logger(logging_dir=None):
    """The package's logger: the first process prints (and writes), the others are silent.

    A second call replaces the handlers of the first, so that no line is written twice. The rank is read
    from the environment variable RANK, which every launcher sets; without it there is one process.

    Args:
        logging_dir: folder in which log.txt is appended to as well; made if missing.
    """
    logger = logging.getLogger("opensora")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    for handler in _make_handlers(logging_dir):
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


def _make_handlers(logging_dir):
    if int(os.environ.get("RANK", 0)) != 0:
        return [logging.NullHandler()]
    if logging_dir is None:
        return [logging.StreamHandler()]
    os.makedirs(logging_dir, exist_ok=True)
    log_file = os.path.join(logging_dir, "log.txt")
    return [logging.StreamHandler(), logging.FileHandler(log_file, encoding="utf-8")]
