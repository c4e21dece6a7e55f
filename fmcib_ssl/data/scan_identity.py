"""Which rows of a table name the same scan: it is its resolved path and its series, however a row writes them."""

from __future__ import annotations

import os
from pathlib import Path

from fmcib_ssl.data.dicom_files import is_dicom, series_at, text
from fmcib_ssl.data.nifti_scans import Affine
from fmcib_ssl.data.scans import ScanSource
from fmcib_ssl.data.tables import AnnotationsError, ScanError


def one_source_each(sources: set[ScanSource]) -> dict[ScanSource, ScanSource]:
    """A scan is its resolved path and its series: one source for all rows that name it, by a link or `..` or however.

    What one row says of it (its series, any modality, which affine) holds for all.

    Raises:
        AnnotationsError: rows of one scan that name different affines.
    """
    by_file: dict[str, list[ScanSource]] = {}
    for source in sorted(sources, key=str):
        by_file.setdefault(_resolved(source.path), []).append(source)
    one_name: dict[ScanSource, ScanSource] = {}
    for named in by_file.values():
        scans: dict[str | None, list[ScanSource]] = {}
        has_names = len({source.series_uid for source in named}) > 1
        for source in named:
            scans.setdefault(_series_of(source) if has_names else source.series_uid, []).append(source)
        for same in scans.values():
            affines: list[Affine] = sorted({source.affine for source in same if source.affine})
            if len(affines) > 1:
                raise AnnotationsError(f"column 'affine': rows of {same[0].path} say {affines[0]}, others {affines[1]}")
            one = ScanSource(
                same[0].path,
                next((source.series_uid for source in same if source.series_uid), None),
                any(source.any_modality for source in same),
                affines[0] if affines else None,
            )
            one_name |= dict.fromkeys(same, one)
    return one_name


def _series_of(source: ScanSource) -> str | None:
    """Its series, where a row names none the one that would be read; None for a file that has none."""
    try:
        if not (source.path.is_dir() or is_dicom(source.path)):
            return None
        if source.series_uid is None:
            return text(series_at(source.path, None, source.any_modality)[0].header, "SeriesInstanceUID")
    except (ScanError, OSError, ValueError):  # said when the scan is checked
        return ""
    return source.series_uid


def _resolved(path: Path) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # what is no path at all; said when the scan is checked
        return str(path)
