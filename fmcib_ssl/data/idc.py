"""Scans of published tables from the NCI Imaging Data Commons, by way of idc-index.

A series is downloaded to the folder `unfinished`, and once all its files are there moved to where the table says that
the scan is, as a DICOM folder of that name. So a scan that is there is complete, and the next call gets the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fmcib_ssl.data.annotations import PATH_COLUMN
from fmcib_ssl.data.tables import AnnotationsError

#: Columns of tables that name the series of a scan.
_SERIES_COLUMNS = ("Series UID", "SeriesInstanceUID", "seriesuid")
#: Collections of tables that name only patients, where each patient has one CT.
_COLLECTIONS = {"lung1": "nsclc_radiomics"}


def series_of(source: str, rows: pd.DataFrame, client: Any) -> pd.DataFrame:
    """The series that a table names, as far as the Imaging Data Commons has them.

    Args:
        source: whose table, as of `IMPORTERS`.
        rows: what its importer makes of it.
        client: of `new_client`.

    Returns:
        `image_path` of each scan with the columns of idc-index's index: `SeriesInstanceUID`, `collection_id`,
        `series_size_MB`, `instanceCount`, `license_short_name`, `source_DOI` and others.

    Raises:
        AnnotationsError: the table names no series, none of its series is there, or a patient has several.
    """
    index: pd.DataFrame = client.index
    column = next((name for name in _SERIES_COLUMNS if name in rows), "PatientID")
    key = "PatientID" if column == "PatientID" else "SeriesInstanceUID"
    if key == "PatientID":
        if source not in _COLLECTIONS:
            raise AnnotationsError(f"source={source}: the table names no series, so fetch=idc cannot know its scans")
        index = index[(index["collection_id"] == _COLLECTIONS[source]) & (index["Modality"] == "CT")]
    scans = rows.drop_duplicates(PATH_COLUMN)
    own = pd.DataFrame({PATH_COLUMN: scans[PATH_COLUMN], key: scans[column].astype(str)})
    series = own.merge(index, on=key)
    if series.empty:
        raise AnnotationsError(
            f"source={source}: none of {len(own)} scans, such as {own[key].iloc[0]}, is in idc-index"
        )
    if (several := series[PATH_COLUMN].duplicated()).any():
        raise AnnotationsError(f"{series.loc[several, key].iloc[0]} has several CT series: choose one by hand")
    return series


def new_client() -> Any:
    """`idc_index.IDCClient`, with its index of all series.

    Raises:
        ImportError: idc-index is not installed.
    """
    try:
        from idc_index import IDCClient  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise ImportError('fetch=idc needs idc-index: pip install "fmcib_ssl[idc]"') from error
    return IDCClient()


def absent(series: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Those of the series whose scan is not in the folder yet."""
    return series[~np.array([(folder / path).exists() for path in series[PATH_COLUMN]], bool)]


def fetch_series(series: pd.DataFrame, folder: Path, client: Any) -> None:
    """Download what `absent` gives; the next call goes on where this one stopped.

    Raises:
        OSError: there is too little space, or a series is not complete.
    """
    unfinished = folder / "unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    uids = series["SeriesInstanceUID"].tolist()
    client.download_from_selection(str(unfinished), seriesInstanceUID=uids, dirTemplate="%SeriesInstanceUID",
                                   use_s5cmd_sync=True)  # fmt: skip
    for uid, path, count in series[["SeriesInstanceUID", PATH_COLUMN, "instanceCount"]].itertuples(index=False):
        if len(list((unfinished / uid).glob("*.dcm"))) == count:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / uid).rename(folder / path)
    if len(missing := absent(series, folder)):
        raise OSError(f"{len(missing)} of {len(series)} series are not complete: the same command goes on from here")
    unfinished.rmdir()
