"""What a notebook or a script calls, in few lines: `fmcib_ssl` offers these names itself."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from torch import nn

from fmcib_ssl.data import StoreSettings, Summary, prepare_store, read_annotations
from fmcib_ssl.evaluation import FeatureTable, FrozenEncoder, Inference, embed_source, trained_encoder
from fmcib_ssl.io import digest_of, write_atomically
from fmcib_ssl.types import UserError

#: Frame of a table's points: millimetres in LPS or RAS, or voxel indices.
Coordinates = Literal["lps", "ras", "voxel"]


def prepare(
    lesions: pd.DataFrame | Path | str,
    store: Path | str,
    *,
    image_root: Path | str | None = None,
    coordinates: Coordinates = "lps",
    spacing_mm: float = 1.0,
    on_bad_row: Literal["skip", "refuse"] = "skip",
    num_workers: int | None = None,
) -> Summary:
    """Bring the scans of a table of lesions into a store, from which a patch is read in a millisecond.

    Called again, it resumes, and takes up what has changed in the table or the scans.

    Args:
        lesions: a CSV file or a DataFrame with `image_path`, `coordX`, `coordY`, `coordZ`, one row a lesion; further
            columns are kept. A DataFrame is written to `STORE.csv`, beside the store.
        store: its folder; made if there is none.
        image_root: where relative paths start; by default the CSV file's folder, for a DataFrame the working directory.
        coordinates: frame of the points.
        spacing_mm: edge of the store's cubic voxels.
        on_bad_row: rows that cannot be used: "skip" lists them in the summary, "refuse" raises before scans are read.
        num_workers: processes; 0 works in this one, None takes all cores where there is work for them.

    Returns:
        What was done: `num_lesions`, `num_scans`, and in `rejected` the rows that cannot be used, with the reason.

    Raises:
        fmcib_ssl.types.UserError: the table or the store cannot be used.

    Example:
        >>> summary = fmcib_ssl.prepare("my.csv", "my_store", spacing_mm=2)
        >>> summary.num_lesions
        7
        >>> fmcib_ssl.LesionPatches("my_store", (16, 16, 16), negatives_per_lesion=0)[0]["positive"].shape
        torch.Size([1, 16, 16, 16])
    """
    store = Path(store)
    file, root = _table_file(lesions, store.parent / f"{store.name}.csv", image_root)
    return prepare_store(
        read_annotations(file, root, coordinates), store, StoreSettings(spacing_mm=spacing_mm),
        image_root=root, num_workers=num_workers, on_bad_row=on_bad_row,
    )  # fmt: skip


def embed(
    encoder: nn.Module | FrozenEncoder | Path | str,
    lesions: pd.DataFrame | Path | str,
    *,
    image_root: Path | str | None = None,
    coordinates: Coordinates = "lps",
    stores: Path | str = Path("data") / "stores",
    inference: Inference | None = None,
) -> FeatureTable:
    """Features of lesions, a row each: what the published package calls `get_features`.

    The patches are cut and normalised as the encoder was trained. Rows and lesions that cannot be used are left out,
    with a warning in the log. For an archive, `fmcib-ssl embed` resumes after a stop and shares the work.

    Args:
        encoder: a file of an encoder, a run folder, or what `load_encoder` gave.
        lesions: the folder of a store; or a CSV file or DataFrame as for `prepare`, of which a store is prepared first.
        image_root: of a table: where relative paths start, as for `prepare`.
        coordinates: of a table: frame of the points.
        stores: folder in which each table gets its store.
        inference: batch size, precision, views, device; by default float32, on a GPU if there is one.

    Returns:
        The table: `features`, float32 `(lesions, dim)`, and `lesions`, a DataFrame of the same rows with the columns of
        the lesions' table; `write("features.parquet")` makes the file that `fmcib-ssl evaluate` reads.

    Raises:
        fmcib_ssl.types.UserError: the encoder, the table or a scan cannot be used, or no lesion could be embedded.

    Example:
        >>> table = fmcib_ssl.embed("encoder.safetensors", "my.csv")
        >>> table.features.shape
        (7, 8)
        >>> table.lesions["label"].tolist()
        [0, 1, 0, 1, 0, 1, 0]
    """
    if isinstance(lesions, Path | str) and Path(lesions).is_dir():
        source: dict[str, Any] = {"kind": "store", "path": str(Path(lesions).absolute())}
    else:
        # Of a DataFrame the scans name the store, so that one with other points or columns updates it.
        scans = sorted(set(lesions.get("image_path", []))) if isinstance(lesions, pd.DataFrame) else []
        file, root = _table_file(lesions, Path(stores) / f"table-{digest_of(scans)[:10]}.csv", image_root)
        source = {"kind": "scans", "annotations": str(file.absolute()), "coordinates": coordinates}
        source |= {"image_root": root and str(Path(root).absolute()), "stores": str(Path(stores).absolute())}
    return embed_source(frozen_encoder(encoder), source, inference)


def frozen_encoder(
    encoder: nn.Module | FrozenEncoder | Path | str, *, trusted_targets: Collection[str] = ()
) -> FrozenEncoder:
    """An encoder and the patches that it takes, from a file, a run folder or what `load_encoder` gave.

    Args:
        encoder: of an unfinished run the newest whole checkpoint is taken, with a warning.
        trusted_targets: of a file: as for `load_encoder`.

    Raises:
        UserError: no such file or run, one that cannot be used, or a module without `preprocessing`.
    """
    if isinstance(encoder, FrozenEncoder):
        return encoder
    if isinstance(encoder, nn.Module):
        if not hasattr(encoder, "preprocessing"):
            raise UserError(
                "the encoder has no `preprocessing`, which says how its patches are cut and normalised: take one of "
                "fmcib_ssl.load_encoder, or set encoder.preprocessing = fmcib_ssl.types.Preprocessing(...)"
            )
        about: dict[str, Any] = {
            "name": type(encoder).__name__,
            "kind": "encoder",
            **dict.fromkeys(("weights", "sha256", "seed")),
        }
        about["encoder"] = getattr(encoder, "spec", None)
        return FrozenEncoder(encoder, encoder.preprocessing, about)  # type: ignore[arg-type]  # an attribute of a module
    file = Path(encoder)
    if file.is_dir():
        from fmcib_ssl.training import weights_of_run  # noqa: PLC0415  (Lightning, which a file does without)

        file = weights_of_run(file)
    return trained_encoder(file, trusted_targets=trusted_targets)


def _table_file(
    lesions: pd.DataFrame | Path | str, file: Path, image_root: Path | str | None
) -> tuple[Path, Path | str | None]:
    """The CSV file of a table, `file` if it is a DataFrame, and where its relative paths start."""
    if not isinstance(lesions, pd.DataFrame):
        return Path(lesions), image_root
    write_atomically(file, lesions.to_csv(index=False))
    return file, image_root if image_root is not None else Path.cwd()
