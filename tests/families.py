"""Tiny pipelines of every family of diffusers, by name."""

import functools

from pipelines import save_wan
from pipelines_cogvideox import save_cogvideox
from pipelines_hunyuan import save_hunyuan
from pipelines_ltx import save_ltx
from pipelines_modelscope import save_modelscope

MAKERS = {
    "wan": save_wan,
    "wan a14b": functools.partial(save_wan, kind="a14b"),
    "ltx": save_ltx,
    "hunyuan_video15": save_hunyuan,
    "cogvideox": save_cogvideox,
    "modelscope": save_modelscope,
}
FAMILIES = [name for name in MAKERS if name != "wan a14b"]
# What some of them need in place of the defaults of ``config_for``.
KEYS = {"hunyuan_video15": {"max_sequence_length": 40}, "modelscope": {"max_sequence_length": 77}}
