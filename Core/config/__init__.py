"""The configuration: files and flags in, one typed, validated object out."""

from Core.utils.errors import ConfigError

from .load import build_config, load_config
from .schema import BASE, Config

__all__ = ["BASE", "Config", "ConfigError", "build_config", "load_config"]
