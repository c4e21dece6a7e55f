"""What has to be the same on all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd

from fmcib_ssl.training import provenance as ranks


def facts(**settings: Any) -> dict[str, Any]:
    table = pd.DataFrame({"lesion_id": ["a", "b"], "center_z": [1.0, 2.0], "image_path": ["x", "y"]})
    values = {"seed": 0, "paths": {"run": "/one"}, "stalls": "/one/stalls", "data": {"store": "/s"}}
    return ranks.facts_of_rank({**values, **settings}, SimpleNamespace(lesions=table))


def test_the_same_run_elsewhere_is_the_same() -> None:
    elsewhere = facts(paths={"run": "/two"}, stalls="/two/stalls", data={"store": "/scratch/s"})
    assert ranks.differences([facts(), elsewhere]) == []


def test_values_are_told_with_their_ranks() -> None:
    lines = ranks.differences([facts(), facts(seed=1), facts(seed=1), facts(seed=2)])
    assert lines == ["seed: 0 on rank 0; 1 on ranks 1, 2; 2 on rank 3"]


def test_code_and_versions_count() -> None:
    other = facts() | {"code of fmcib_ssl/run.py": "0", "version of torch": "1.0"}
    lines = ranks.differences([facts(), other])
    assert [line.partition(":")[0] for line in lines] == ["version of torch", "code of fmcib_ssl/run.py"]
