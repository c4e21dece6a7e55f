"""Write the volumes of a MedMNIST 3D file as scans, and their table with the official splits and labels.

`fmcib-ssl import-medmnist --help` shows what can be set; docs/medmnist.md says more.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pydantic import Field, PositiveFloat

from fmcib_ssl.command import run_command
from fmcib_ssl.io import Command


class ImportMedMNIST(Command):
    """Write the volumes of a MedMNIST 3D file as scans, and their table, for prepare, train and embed.

    fmcib-ssl import-medmnist file=nodulemnist3d.npz output=data/nodulemnist3d
    """

    file: Path = Field(description="nodulemnist3d.npz, organmnist3d.npz, adrenalmnist3d.npz, or ..._64.npz")
    output: Path = Field(description="folder for scans/ and lesions.csv; scans that are there are kept")
    window_hu: tuple[float, float] | None = Field(
        default=None, description="HU of the grey values 0 and 255, such as -1024,400; null: see docs/medmnist.md"
    )
    edge_mm: PositiveFloat = Field(
        default=50.0, description="edge of a volume; an encoder's patch of 50 voxels of 1 mm is filled by 50"
    )


def run(command: ImportMedMNIST) -> None:
    """Import, say what to do next."""
    from fmcib_ssl.data import DATASETS, import_medmnist  # noqa: PLC0415  (the help waits for no library)

    table = import_medmnist(command.file, command.output, window_hu=command.window_hu, edge_mm=command.edge_mm)
    task = DATASETS[command.file.stem.partition("_")[0]].task
    print(f"volumes   {len(table)} in {command.output}")
    print(
        f"next      fmcib-ssl embed checkpoint=ENCODER annotations={command.output / 'lesions.csv'} "
        "output=features.parquet"
    )
    options = f"label=label task={task} split=split group=null size=null"
    print(f"          fmcib-ssl evaluate features=features.parquet {options} output=results")


main = partial(run_command, ImportMedMNIST, run)
