"""What files of earlier versions and users' experiments name goes on being found, by one table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_object

from fmcib_ssl.models.trusted import check_targets
from fmcib_ssl.training.run_folder import check_same_run, saved_settings, settings_digest
from fmcib_ssl.training.settings import settings_of, upgraded
from fmcib_ssl.types import RENAMED_TARGETS, current_target, with_current_targets

GOLDEN_RUN = Path(__file__).parents[1] / "golden" / "files" / "run"


@pytest.mark.parametrize(("old", "new"), RENAMED_TARGETS.items())
def test_an_old_name_stands_for_todays_part(old: str, new: str) -> None:
    assert current_target(old) == new and new not in RENAMED_TARGETS
    assert callable(get_object(new))
    if old.startswith(
        ("fmcib_ssl.methods.", "fmcib_ssl.losses.", "fmcib_ssl.models.")
    ):  # callbacks are no part of a step
        check_targets({"method": {"_target_": old}}, "config.yaml")


def test_names_are_replaced_wherever_they_stand() -> None:
    old, new = next(iter(RENAMED_TARGETS.items()))
    values: dict[str, Any] = {"a": [{"_target_": old, "b": {"_target_": "torch.nn.Linear"}}], "c": old}
    assert with_current_targets(values) == {"a": [{"_target_": new, "b": {"_target_": "torch.nn.Linear"}}], "c": old}


def test_keys_are_renamed_or_taken_out_too() -> None:
    old = {"method": {"gather": "all", "_target_": "fmcib_ssl.methods.SimCLR"}, "loss": {"kernel": "auto"}}
    assert upgraded(old) == {"method": {"_target_": "fmcib_ssl.models.SimCLR"}, "loss": {"kernel": "auto"}}


def test_a_run_of_an_earlier_version_is_the_same_run_in_the_same_folder() -> None:
    before = saved_settings(GOLDEN_RUN)
    assert before is not None
    now = settings_of(
        yaml.safe_load((GOLDEN_RUN / "config.yaml").read_text()) | {"data": before["data"] | {"padding": "constant"}}
    )
    assert now.method["_target_"] == "fmcib_ssl.models.MinedContrast"
    assert check_same_run(before, now.model_dump(mode="json"), GOLDEN_RUN) == []
    assert settings_digest(now.model_dump(mode="json")) == "6c6ae7a0"  # as the first version called the folder
