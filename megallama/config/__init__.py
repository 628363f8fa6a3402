"""What a run is: a frozen, validated config. Imports no torch, so a fault shows at once."""

from megallama.config.load import check_supported, config_to_yaml, load_config, parse_config
from megallama.config.schema import Config
from megallama.errors import ConfigError

__all__ = [
    "Config",
    "ConfigError",
    "check_supported",
    "config_to_yaml",
    "load_config",
    "parse_config",
]
