"""`hydra/sweeper=optuna`: Hydra looks for plugins in this package alone; the rest is `fmcib_ssl/training/sweep.py`."""

import sys
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """A sweep by Optuna; the arguments are those of `fmcib_ssl.training.sweep.Sweep`."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take from Hydra what to run, and how it is configured."""
        self.hydra_context, self.task, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep that a command line asks for; an error of the user's is one line, and exit code 1."""
        try:
            from fmcib_ssl.training.sweep import Sweep, SweepError  # noqa: PLC0415  (Optuna: an extra, and slow)
        except ImportError as error:
            sys.exit(f"error: hydra/sweeper=optuna needs Optuna: pip install 'fmcib_ssl[sweep]' ({error})")
        try:
            Sweep(**self.arguments).run(arguments, self.hydra_context, self.task, self.config)
        except SweepError as error:
            sys.exit(f"error: {error}")
