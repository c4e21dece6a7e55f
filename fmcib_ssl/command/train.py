"""Pretrain an encoder: `fmcib-ssl train +experiment=NAME [key=value ...]`; `--help` shows what can be chosen."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from signal import SIGINT

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fmcib_ssl import training
from fmcib_ssl.data import end_with_parent
from fmcib_ssl.io import config_dir, no_world_write
from fmcib_ssl.training import Settings, signals
from fmcib_ssl.types import UserError


def main(arguments: Sequence[str]) -> None:
    """Check the command line, then train what it asks for: one run, or those of a sweep."""
    no_world_write()
    typed = sys.argv

    def task(_: DictConfig) -> float:
        sys.argv = typed  # Hydra knows no verbs, but Lightning starts the other processes with these words
        return run_composed()

    try:
        sys.argv = [typed[0], *training.check_command_line(arguments, config_dir())]
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=training.CONFIG_NAME)(task)()
    except UserError as error:
        sys.exit(f"error: {error}")
    except signals.Stopped as stopped:  # after training
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(signals.EXIT_CODES[SIGINT])
    finally:
        signals.ignore()


def run_composed() -> float:
    """The run whose configuration Hydra has composed; gives the last loss, for sweepers."""
    try:
        job = HydraConfig.get()
        search_path = [o for o in job.overrides.hydra if o.startswith("hydra.searchpath=")]
        composed = training.compose_run(str(job.job.config_name), [*search_path, *job.overrides.task])
        settings = training.read_settings(composed.config)
        signals.listen(starting=True)  # again, because a launcher of sweeps may have taken them over
        if os.environ.get("LOCAL_RANK", "0") != "0":
            end_with_parent()
        training.check_machine(settings, os.environ)
        if composed.dropped and os.environ.get("LOCAL_RANK", "0") == "0":
            logging.getLogger("fmcib_ssl").info("not taken from the experiment: %s", "; ".join(composed.dropped))
        return run(settings)
    except UserError as error:
        sys.exit(f"error: {error}")
    except signals.Stopped as stopped:
        signals.ignore()
        sys.exit(stopped.exit_code if stopped.acted_on else stop_before_training(stopped, settings))


def stop_before_training(stopped: signals.Stopped, settings: Settings) -> int:
    """Ask Slurm for another start, if that is what the signal means; gives the exit code."""
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return stopped.exit_code
    checkpoints = (settings.callbacks or {}).get("checkpoint") or {}
    return training.requeue(stopped.signum, settings.paths.run, ask=checkpoints.get("requeue", True))


def run(settings: Settings) -> float:
    """Pretrain or fine-tune; running out of memory ends the process with a message instead of a traceback."""
    import torch  # noqa: PLC0415  (all that can be is checked before)

    from fmcib_ssl.run import finetune, pretrain  # noqa: PLC0415

    train = pretrain if settings.finetune is None else finetune
    signals.listen()
    try:
        return train(settings)
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        sys.exit(
            "error: data workers hand over batches in shared memory, and /dev/shm is full: lower hardware.num_workers "
            "or data.batch_size, or give the container more, --shm-size 8g (docs/containers.md)"
        )
