"""Write a column that says which side of a split, or which fold, each lesion belongs to.

`fmcib-ssl split --help` shows what can be set.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pydantic import Field, NonNegativeInt, model_validator

from fmcib_ssl.command import run_command
from fmcib_ssl.io import Command, write_atomically


class Split(Command):
    """Write a table with a column `split` (or `fold`): by patient, stratified, a function of the seed.

    fmcib-ssl split annotations=lesions.csv output=split.csv labels=malignancy
    fmcib-ssl split annotations=lesions.csv output=folds.csv folds=5 group=image_path

    Prepare the new table, or train on one side with data.select={split: train}.
    """

    annotations: Path = Field(description="the table of lesions")
    output: Path = Field(description="the table to write; may be the same file")
    shares: str = Field(default="train:0.7,val:0.15,test:0.15", description="sides and their shares")
    folds: NonNegativeInt = Field(
        default=0, description="if above 0, that many folds, numbered from 0, instead of sides"
    )
    group: str = Field(default="PatientID", description="rows with the same value stay together")
    labels: tuple[str, ...] = Field(default=(), description="columns to stratify by, commas between them")
    column: str | None = Field(default=None, description="name of the new column; split or fold by default")
    seed: NonNegativeInt = Field(default=0, description="another seed, another split")

    @model_validator(mode="after")
    def _readable_shares(self) -> Split:
        self.parsed_shares()
        return self

    def parsed_shares(self) -> dict[str, float]:
        """The sides and their shares."""
        pairs = [part.partition(":") for part in self.shares.split(",")]
        try:
            return {name.strip(): float(share) for name, _, share in pairs}
        except ValueError:
            raise ValueError(f"shares={self.shares}: write train:0.7,val:0.15,test:0.15") from None


def run(command: Split) -> None:
    """Read the table, write it with one column more, show what each side holds."""
    import pandas as pd  # noqa: PLC0415  # the help waits for no library

    from fmcib_ssl.data import (  # noqa: PLC0415
        AnnotationsError,
        assign_folds,
        assign_splits,
        describe_splits,
        read_table,
        require_columns,
    )

    column = command.column or ("fold" if command.folds else "split")
    rows = read_table(command.annotations, text=(command.group,))
    require_columns(command.annotations, rows, (command.group, *command.labels))
    if column in rows:
        raise AnnotationsError(f"{command.annotations} has a column {column!r} already; name another with column=")
    sides: pd.Series[str] | pd.Series[int]
    if command.folds:
        sides = assign_folds(rows, command.folds, command.group, command.labels, command.seed)
    else:
        sides = assign_splits(rows, command.parsed_shares(), command.group, command.labels, command.seed)
    as_it_stands = read_table(command.annotations, text=[str(name) for name in rows])
    write_atomically(command.output, as_it_stands.assign(**{column: sides}).to_csv(index=False))
    with pd.option_context("display.width", 200, "display.max_columns", 50, "display.precision", 3):
        print(describe_splits(rows, sides, command.group, command.labels))


main = partial(run_command, Split, run)
