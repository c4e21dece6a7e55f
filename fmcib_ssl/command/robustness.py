"""How stable features and decisions are when the same lesion is imaged, or pointed at, a little differently.

`fmcib-ssl robustness --help` shows what can be set; docs/robustness.md says more.
"""

from __future__ import annotations

import json
from functools import partial

from pydantic import Field

from fmcib_ssl.command import run_command
from fmcib_ssl.command.evaluate import OTHER_NAMES, Labelled, read_protocol


class Robustness(Labelled):
    """Embed lesions again with the point moved, thicker slices, noise and other kernels; compare with the clean ones.

    fmcib-ssl robustness features=features.parquet output=robust
    fmcib-ssl robustness features=a.parquet,b.parquet label=texture threshold='<5' output=robust

    Without a label the features are compared; with one also how many decisions of a probe flip, and how good they still
    are. Open robust/robustness.md. Stopped or killed, the same command resumes.
    """

    trusted_targets: list[str] = Field([], description="foreign encoders to build, comma-separated")


def run(command: Robustness) -> None:
    """Embed under every condition, measure, write the page."""
    from fmcib_ssl.evaluation import (  # noqa: PLC0415
        check_patients,
        embed_conditions,
        measure_robustness,
        shared_lesions,
        write_robustness,
    )
    from fmcib_ssl.training import environment  # noqa: PLC0415

    tables = {
        name: embed_conditions(files, device=command.device, trusted_targets=command.trusted_targets)
        for name, files in command.feature_files().items()
    }
    # Only lesions that have features under every condition are compared.
    everything = {
        f"{name}, {condition}, draw {number}": table
        for name, by_condition in tables.items()
        for condition, draws in by_condition.items()
        for number, table in enumerate(draws)
    }
    protocol = None
    if command.label is None and command.time is None and command.tables is None:
        lesions = shared_lesions(everything.values())
        notes = [f"{len(lesions)} lesions; without a label features are compared, and no decisions"]
    else:
        protocol, lesions, _, notes = read_protocol(command, everything)
        if (finding := check_patients(protocol.splits, protocol.patients)).found:
            raise ValueError(finding.message)
    print(*(f"note      {note}" for note in notes), sep="\n")
    ids = lesions["lesion_id"]
    features = {
        name: {condition: [table.aligned(ids).features for table in draws] for condition, draws in one.items()}
        for name, one in tables.items()
    }
    clean = {name: one["clean"][0] for name, one in tables.items()}
    voxels = [name for name, table in clean.items() if table.provenance["kind"] == "raw_voxels"]
    result = measure_robustness(features, protocol, voxels=voxels, num_bootstrap=command.num_bootstrap)
    provenance = {
        "arguments": json.loads(command.model_dump_json()),
        "features": {name: table.provenance for name, table in clean.items()},
        **environment(),
    }
    about = {"notes": notes, "provenance": provenance}
    page = write_robustness(result, about, next(iter(clean.values())), ids.iloc[0], command.output)
    print(f"\npage      {page}\nnumbers   {page.with_suffix('.csv')}, {page.with_suffix('.json')}")


main = partial(
    run_command, Robustness, run,
    other_names=OTHER_NAMES, interrupted="stopped; the same command resumes from here",
)  # fmt: skip
