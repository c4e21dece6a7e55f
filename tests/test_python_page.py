"""The code of docs/python.md runs as it stands, one block after the other, and trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fmcib_ssl.data import TensorPatches
from fmcib_ssl.types import SampleKey

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    training, features, file, mined = BLOCKS
    lines = [line for line in training.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
    exec(training, names)
    weights = [weight.detach().clone() for weight in names["encoder"].parameters()]
    exec(features, names)
    assert names["features"].shape == (32, 128) and names["features"].isfinite().all()
    exec(file, names)
    with torch.no_grad():
        again = names["again"].eval()(names["preprocessing"].normalize(names["hu"]))
    torch.testing.assert_close(again, names["features"])
    exec(mined, names)
    assert not all(map(torch.equal, weights, names["encoder"].parameters()))
    assert "train/mined_share" not in names["method"].trainer.callback_metrics
    assert names["method"].trainer.callback_metrics["train/loss"].isfinite()


def test_negatives_follow_from_seed_epoch_and_lesion() -> None:
    hu, pool = (torch.arange(n, dtype=torch.int16).view(-1, 1, 1, 1, 1).expand(n, 1, 2, 2, 2) for n in (5, 50))
    pairs = [TensorPatches(hu, pool, seed, 3)[SampleKey(epoch, 4)] for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    drawn = [pair["negative"][:, 0, 0, 0, 0].tolist() for pair in pairs]
    assert drawn[0] == drawn[1] and drawn[0] not in drawn[2:] and drawn[2] != drawn[3]
    assert all(pair["positive"].unique().tolist() == [4] for pair in pairs)
    assert TensorPatches(hu)[SampleKey(0, 1)]["negative"].shape == (0, 1, 2, 2, 2)
    with pytest.raises(ValueError, match=r"got \(5, 2, 2, 2\) .* adds the channel"):
        TensorPatches(hu[:, 0])
    with pytest.raises(ValueError, match=r"same size, got \(5, 1, 2, 2, 2\) and \(50, 1, 2, 2, 1\)"):
        TensorPatches(hu, pool[..., :1])
