"""What stands beside the features that are evaluated: random weights, raw voxels, and the lesion's size alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from fmcib_ssl.evaluation.feature_table import FeatureTable
from fmcib_ssl.evaluation.frozen_probes import Inputs
from fmcib_ssl.types import Preprocessing

Array = npt.NDArray[Any]
MakeBaselines = Callable[[FeatureTable], Mapping[str, FeatureTable]]

#: Components to which raw voxels are reduced before a probe.
NUM_COMPONENTS = 64
BASELINE_KINDS = frozenset({"random_weights", "raw_voxels"})


@dataclass
class Contestants:
    """Everything that is evaluated on the same lesions.

    Attributes:
        inputs: what is scored, the user's tables first.
        compared: pairs of names: features, and what they should be ahead of.
        missing: baselines that could not be made: `features`, `reason`.
        voxels: normalised patches, flattened, and how they were cut, where there are any.
    """

    inputs: list[Inputs] = field(default_factory=list)
    compared: list[tuple[str, str]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    voxels: tuple[Array, Preprocessing] | None = None


def gather(
    tables: Mapping[str, FeatureTable],
    lesions: pd.DataFrame,
    size: Sequence[str] = (),
    make_baselines: MakeBaselines | None = None,
) -> Contestants:
    """The user's tables, their baselines, the size alone, and each table together with the size.

    Args:
        tables: features by name; a table that itself is of random weights or raw voxels is not made again.
        lesions: the rows to evaluate, with `lesion_id`.
        size: columns with the lesion's size, such as a diameter.
        make_baselines: opens a table's patches again; `embedding.baseline_tables`. None: no baselines are made.
    """
    ids = lesions["lesion_id"].tolist()
    found = Contestants()
    own = {name: table.aligned(ids) for name, table in tables.items()}
    encoders = [name for name, table in own.items() if table.origin.get("kind") not in BASELINE_KINDS] or list(own)
    others: dict[str, FeatureTable] = {name: table for name, table in own.items() if name not in encoders}
    given = {str(table.origin.get("kind")) for table in own.values()}
    if make_baselines is not None:
        for name in encoders:
            for baseline, table in _made(
                name, own[name], make_baselines, ids, given=given, missing=found.missing
            ).items():
                if not any(_equal(other, table) for other in others.values()):
                    others[baseline if baseline not in others else f"{baseline} ({name})"] = table
    for name, table in {**{name: own[name] for name in encoders}, **others}.items():
        found.inputs.append(_inputs(name, table))
        if found.voxels is None and table.origin.get("kind") == "raw_voxels" and table.origin.get("preprocessing"):
            found.voxels = table.features, Preprocessing.from_dict(table.origin["preprocessing"])
    found.compared += [(name, other) for name in encoders for other in others]
    found.compared += [(a, b) for i, a in enumerate(encoders) for b in encoders[i + 1 :]]
    _add_size(found, encoders, lesions, size)
    return found


def _made(
    name: str,
    table: FeatureTable,
    make_baselines: MakeBaselines,
    ids: list[str],
    *,
    given: Collection[str],
    missing: list[dict[str, str]],
) -> dict[str, FeatureTable]:
    """The baselines of one table that the user has not given; why one is not there goes to `missing`."""
    kinds = {"random weights": "random_weights", "raw voxels": "raw_voxels"}
    wanted = [title for title, kind in kinds.items() if kind not in given]
    reason = "the table does not say what builds its encoder"
    made: dict[str, FeatureTable] = {}
    if wanted and (table.origin.get("encoder") or "raw voxels" in wanted):
        try:
            made = {title: found.aligned(ids) for title, found in make_baselines(table).items() if title in wanted}
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error)
    missing += [{"features": f"{title} of {name}", "reason": reason} for title in wanted if title not in made]
    return made


def _inputs(name: str, table: FeatureTable) -> Inputs:
    if table.origin.get("kind") != "raw_voxels":
        return Inputs(name, table.features.astype(np.float64))
    return Inputs(name, compact(table.features), NUM_COMPONENTS)


def compact(x: Array) -> Array:
    """Rows in a basis of their span: distances stay, so a PCA sees the same, and columns are no more than rows."""
    if x.shape[1] <= len(x):
        return x.astype(np.float64)
    centered = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centered @ centered.T)
    basis: Array = vectors * np.sqrt(np.clip(values, 0, None))
    return basis[:, ::-1]


def _equal(a: FeatureTable, b: FeatureTable) -> bool:
    return a.features.shape == b.features.shape and bool(np.array_equal(a.features, b.features))


def _add_size(found: Contestants, encoders: Sequence[str], lesions: pd.DataFrame, size: Sequence[str]) -> None:
    columns = ", ".join(size)
    alone = f"size ({columns})"
    if not size:
        found.missing.append({"features": "size", "reason": "no column was named: size=diameter_mm, or a volume"})
        return
    if absent := [name for name in size if name not in lesions]:
        reason = f"there is no column {', '.join(map(repr, absent))}; name the lesion's diameter or volume with size="
        found.missing.append({"features": alone, "reason": reason})
        return
    values = lesions[list(size)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    if not np.isfinite(values).all():
        lacking = int((~np.isfinite(values)).any(axis=1).sum())
        found.missing.append({"features": alone, "reason": f"{lacking} of {len(lesions)} lesions have no {columns}"})
        return
    by_name = {inputs.name: inputs for inputs in found.inputs}
    found.inputs.append(Inputs(alone, values, linear_only=True))
    found.compared += [(name, alone) for name in encoders]
    for name in encoders:
        both = f"{name} + size"
        x = np.hstack([by_name[name].x, values])
        found.inputs.append(Inputs(both, x, by_name[name].num_components, values.shape[1]))
        found.compared.append((both, alone))
