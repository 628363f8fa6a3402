"""What a run is: a frozen, validated config. Imports no torch, so a fault shows at once."""

from megallama.config.load import config_to_yaml, load_config, parse_config
from megallama.config.schema import Config
from megallama.errors import ConfigError

__all__ = [
    "Config",
    "ConfigError",
    "config_to_yaml",
    "load_config",
    "parse_config",
]
