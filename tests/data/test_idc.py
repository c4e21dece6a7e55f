"""Scans from the Imaging Data Commons, by a stand-in with the interface of idc-index."""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from odd_dicom import assert_read_right, ct_hu, ct_series, positions, write

from fmcib_ssl.command import import_annotations
from fmcib_ssl.data.scans import read_scan

NUM_SLICES = 6


class StandIn:
    """As much of `idc_index.IDCClient` as is used: three patients' CT, one of which is no part of any table."""

    fails_after: int | None = None
    sent: list[list[str]]

    def __init__(self) -> None:
        patients = ["LUNG1-001", "LUNG1-002", "LUNG1-003", "LUNG1-001"]
        self.index = pd.DataFrame({
            "collection_id": "nsclc_radiomics", "PatientID": patients, "Modality": ["CT", "CT", "CT", "SEG"],
            "SeriesInstanceUID": ["1.2.1", "1.2.2", "1.2.3", "1.2.4"], "series_size_MB": 2000.0,
            "instanceCount": NUM_SLICES, "license_short_name": "CC BY-NC 3.0", "source_DOI": "10.7937/x",
        })  # fmt: skip

    def download_from_selection(
        self, downloadDir: str, dry_run: bool = False, collection_id: Any = None,  # noqa: N803
        patientId: Any = None, studyInstanceUID: Any = None, seriesInstanceUID: Any = None,  # noqa: N803
        sopInstanceUID: Any = None, crdc_series_uuid: Any = None, quiet: bool = True,  # noqa: N803
        show_progress_bar: bool = True, use_s5cmd_sync: bool = False,
        dirTemplate: str = "%collection_id/%PatientID/%StudyInstanceUID/%Modality_%SeriesInstanceUID",  # noqa: N803
        source_bucket_location: str = "aws",
    ) -> None:  # fmt: skip
        assert (dirTemplate, use_s5cmd_sync) == ("%SeriesInstanceUID", True)
        StandIn.sent.append(seriesInstanceUID)
        for number, uid in enumerate(seriesInstanceUID):
            num_files = 2 if number == self.fails_after else NUM_SLICES
            write(Path(downloadDir) / uid, ct_series(ct_hu(), series=uid)[:num_files])


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line that fetches two patients."""
    StandIn.sent, StandIn.fails_after = [], None
    module = types.ModuleType("idc_index")
    module.IDCClient = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "idc_index", module)
    lines = [f"/theirs/LUNG1-{k:03d}/CT.nrrd,LUNG1-{k:03d},1,2,3" for k in (1, 2, 9)]
    (tmp_path / "lung1.csv").write_text("\n".join(["image_path,PatientID,coordX,coordY,coordZ", *lines]))
    options = {"table": "lung1.csv", "output": "out.csv", "image_root": "ct"}
    return ["source=lung1", "fetch=idc", *(f"{key}={tmp_path / name}" for key, name in options.items())]


def test_nothing_is_fetched_before_size_and_licence_are_accepted(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for accepted in ([], ["accept_licence=true", "max_gb=3.9"], ["max_gb=9"]):
        with pytest.raises(SystemExit, match="nothing was downloaded"):
            import_annotations.main([*words, *accepted])
        printed = capsys.readouterr().out
        assert "2 of 3 scans; to download: 2, 4.0 GB" in printed
        assert "nsclc_radiomics, CC BY-NC 3.0, 10.7937/x: 2 scans" in printed
    assert not StandIn.sent
    assert not (tmp_path / "out.csv").exists()


def test_only_named_series_come_and_the_same_command_goes_on(words: list[str], tmp_path: Path) -> None:
    words = [*words, "accept_licence=true"]
    StandIn.fails_after = 1
    with pytest.raises(SystemExit, match="1 of 2 series are not complete: the same command goes on"):
        import_annotations.main(words)
    assert not (tmp_path / "ct" / "LUNG1-002").exists()
    StandIn.fails_after = None
    import_annotations.main(words)
    assert StandIn.sent == [["1.2.1", "1.2.2"], ["1.2.2"]]
    assert len(pd.read_csv(tmp_path / "out.csv")) == 3
    assert sorted(path.name for path in (tmp_path / "ct").iterdir()) == ["LUNG1-001", "LUNG1-002"]
    scan = read_scan(tmp_path / "ct" / "LUNG1-002" / "CT.nrrd")
    assert_read_right(scan, np.asarray(ct_hu()), positions())


def test_a_table_that_names_no_series_is_refused(words: list[str], tmp_path: Path) -> None:
    table = "Case ID,coordX,coordY,coordZ,Survival Status\nR01-001,1,2,3,Dead\n"
    (tmp_path / "lung1.csv").write_text(table)
    with pytest.raises(SystemExit, match="the table names no series"):
        import_annotations.main(["source=nsclc_radiogenomics", *words[1:]])


def test_the_stand_in_has_the_interface_of_idc_index() -> None:
    theirs = pytest.importorskip("idc_index").IDCClient
    own = inspect.signature(StandIn.download_from_selection).parameters
    parameters = inspect.signature(theirs.download_from_selection).parameters
    assert {name: one.default for name, one in own.items()}.items() <= {
        k: v.default for k, v in parameters.items()
    }.items()
    index = theirs().index
    assert set(StandIn().index) <= set(index)
    assert index["SeriesInstanceUID"].is_unique
