"""Several models on several tasks, with baselines, intervals, leakage, robustness, and a ranking that says its doubts.

`fmcib-ssl suite --help` shows what can be set; docs/suite.md says more.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from fmcib_ssl.command import run_command, weights_file
from fmcib_ssl.command.embed import WITHOUT_WEIGHTS
from fmcib_ssl.io import Command, config_dir


class Suite(Command):
    """Compare models on tasks, beside size, statistics and random weights; one page, `suite.html`, and its numbers.

    fmcib-ssl suite models=runs/mine,theirs=fmcib.safetensors tasks=luna16_malignancy tables=/data output=suite

    Tasks are those of configs/task, or YAML files like them. Stopped or killed, the same command resumes; what is
    embedded is kept for a run with further models or tasks.
    """

    models: list[str] = Field(
        list(WITHOUT_WEIGHTS),
        description="run folders or encoders, NAME=PATH to name one; random: weights of their networks; "
        "random:resnet18; hu_statistics, raw_voxels; the size is always there",
    )
    tasks: list[str] = Field(min_length=1, description="names of configs/task, or FILE.yaml")
    tables: Path = Field(description="folder of the tasks' tables")
    images: Path | None = Field(None, description="folder of the tasks' folders of scans; null: that of the tables")
    output: Path = Field(description="folder for features, results and the page")
    patients: Literal["mean", "max", "attention"] | None = Field(
        None, description="pool lesions, instead of a task's own"
    )
    robustness: bool = Field(True, description="false: do not embed lesions moved, in thick slices, removed, shuffled")
    num_bootstrap: PositiveInt = Field(2000, description="resamples of the patients for the intervals")
    num_workers: NonNegativeInt = Field(0, description="processes, each with one model or task at a time")
    seed: NonNegativeInt = Field(0, description="of folds, resamples and random weights")
    device: str | None = Field(None, description="for encoders; null: a GPU if there is one")
    trusted_targets: list[str] = Field([], description="foreign encoders to build, comma-separated")


def run(command: Suite) -> None:
    """Embed, evaluate, rank, write the page."""
    from fmcib_ssl import evaluation  # noqa: PLC0415

    named = [model.rpartition("=") for model in command.models if not model.startswith("random:")]
    files = {
        name or name_of(Path(path)): weights_file(Path(path)) for name, _, path in named if path not in WITHOUT_WEIGHTS
    }
    baselines = [path for _, _, path in named if path in WITHOUT_WEIGHTS]
    networks = {}
    for model in command.models:
        if model.startswith("random:"):
            from fmcib_ssl.training import encoder_spec  # noqa: PLC0415

            network = model.removeprefix("random:")
            networks[network] = encoder_spec(network)
    tasks = {Path(name).stem: evaluation.load_task(name, config_dir() / "task") for name in command.tasks}
    if command.patients is not None:
        tasks = {name: task.model_copy(update={"patients": command.patients}) for name, task in tasks.items()}
    options: dict[str, Any] = {"seed": command.seed, "trusted_targets": command.trusted_targets}
    suite = evaluation.Suite(
        models=evaluation.contenders(files, baselines, networks, **options),
        tasks=tasks,
        images=command.images or command.tables,
        **{key: getattr(command, key) for key in ("tables", "output", "robustness", "num_bootstrap", "num_workers")},
        device=command.device,
        **options,
    )
    results, ranking = evaluation.run_suite(suite)
    page = evaluation.write_suite(results, tasks, ranking, command.output / "suite.html")
    print(f"\n{ranking.verdict}\npage      {page}\nnumbers   {command.output / 'results.json'}")


def name_of(path: Path) -> str:
    """Of a run its folder's, of a file its own, unless that says nothing."""
    return path.parent.name if path.stem == "encoder" else path.stem if path.is_file() else path.name


main = partial(run_command, Suite, run, interrupted="stopped; the same command resumes from here")
