"""Pretrain an encoder: `python train.py +experiment=NAME [key=value ...]`; `--help` shows what can be chosen."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from fmcib_ssl.config import CONFIG_NAME, check_command_line, read_settings
from fmcib_ssl.settings import ConfigError

CONFIG_DIR = Path(__file__).resolve().parent / "configs"


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=CONFIG_NAME)
def main(config: DictConfig) -> float:
    """Train; the return value is the last loss, for sweepers."""
    from fmcib_ssl.run import UserError, train  # noqa: PLC0415  (imports torch: the command line is checked before)

    try:
        return train(read_settings(config))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    try:
        check_command_line(sys.argv[1:], CONFIG_DIR)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    main()
