"""Pretrain an encoder: `python train.py +experiment=NAME [key=value ...]`; `--help` shows what can be chosen."""

import os
import sys
from pathlib import Path
from signal import SIGINT

from fmcib_ssl import signals

signals.listen()  # before anything slow is imported: a signal is never too early

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from fmcib_ssl.config import CONFIG_NAME, check_command_line, read_settings  # noqa: E402
from fmcib_ssl.preflight import check_machine  # noqa: E402
from fmcib_ssl.safety import no_world_write  # noqa: E402
from fmcib_ssl.settings import ConfigError, Settings  # noqa: E402
from fmcib_ssl.training.requeue import requeue  # noqa: E402

CONFIG_DIR = Path(__file__).resolve().parent / "configs"


def queue_again(stopped: signals.Stopped, settings: Settings | None = None) -> None:
    """Ask Slurm for another start, if the signal that means it came before training began."""
    checkpoints = {} if settings is None else (settings.callbacks or {}).get("checkpoint") or {}
    if not stopped.acted_on and checkpoints.get("requeue", True) and os.environ.get("SLURM_PROCID", "0") == "0":
        requeue(stopped.signum)
    stopped.acted_on = True


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=CONFIG_NAME)
def main(config: DictConfig) -> float:
    """Train; the return value is the last loss, for sweepers."""
    signals.listen()  # a launcher of sweeps may have taken them over
    try:
        settings = read_settings(config)
        check_machine(settings, os.environ)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    try:
        return run(settings)
    except signals.Stopped as stopped:
        queue_again(stopped, settings)
        sys.exit(stopped.exit_code)  # nothing for whoever has launched it to report


def run(settings: Settings) -> float:
    """Do what is asked for; mistakes of the user end the process with a message."""
    from fmcib_ssl.run import UserError, train  # noqa: PLC0415  (imports torch: all that can be is checked before)

    try:
        if settings.finetune is not None:
            from fmcib_ssl.finetune_run import finetune  # noqa: PLC0415

            return finetune(settings)
        return train(settings)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    no_world_write()
    try:
        check_command_line(sys.argv[1:], CONFIG_DIR)
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    except signals.Stopped as stopped:
        queue_again(stopped)
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(signals.EXIT_CODES[SIGINT])
