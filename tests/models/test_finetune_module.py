"""Fine-tuning's module: what is trained, at which rate, for which loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fmcib_ssl.models import Parts
from fmcib_ssl.models.encoders import small_resnet, video_resnet
from fmcib_ssl.models.finetune import FineTuning, last_stage
from fmcib_ssl.training.optimizers import adamw


def make_module(**options: Any) -> FineTuning:
    torch.manual_seed(0)
    encoder = small_resnet((4, 4, 8, 8))
    return FineTuning(Parts(encoder, lambda named: adamw(named, 0.1), 8), **options)


def test_rows_are_weighted_by_their_class() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    weights = [2 / 3, 2.0, 1.0]  # 6 rows / (3 classes * rows of the class)
    module = make_module(num_classes=3, class_weights=torch.tensor(weights))
    logits = torch.randn(6, 3)
    total, weight_sum = 0.0, 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total -= weights[label] * (row[label] - math.log(sum(math.exp(logit) for logit in row)))
        weight_sum += weights[label]
    assert float(module.loss(logits, labels)) == pytest.approx(total / weight_sum, rel=1e-5)


def test_values_are_learned_standardised_and_given_back_in_their_unit() -> None:
    module = make_module(num_classes=0, center=3.0, scale=2.0).eval()
    out, labels = torch.tensor([0.5, -1.0]), torch.tensor([5.0, 3.0])
    assert float(module.loss(out, labels)) == pytest.approx(((0.5 - 1.0) ** 2 + (-1.0 - 0.0) ** 2) / 2)
    batch: Any = {"view": torch.randn(2, 1, 16, 16, 16), "row": torch.tensor([4, 7]), "label": labels}
    rows, values = module.predict_step(batch, 0)
    assert rows.tolist() == [4, 7]
    torch.testing.assert_close(values, module(batch["view"]) * 2 + 3)


@pytest.mark.parametrize("encoder", [small_resnet(), video_resnet("r3d_18")], ids=["monai", "torchvision"])
def test_the_last_stage_is_layer4(encoder: nn.Module) -> None:
    assert last_stage(encoder) is encoder.get_submodule("layer4")
    with pytest.raises(ValueError, match="no stages"):
        last_stage(nn.Conv3d(1, 4, 3))


@pytest.mark.parametrize(
    ("depth", "trained"), [("head", set()), ("last_stage", {"layer4"}), ("all", {"conv1", "layer1", "layer4"})]
)
def test_what_is_frozen_needs_no_gradient_and_keeps_its_statistics(depth: Any, trained: set[str]) -> None:
    module = make_module(depth=depth).train()
    for name in ("conv1", "layer1", "layer4"):
        part = module.encoder.get_submodule(name)
        assert all(weight.requires_grad == (name in trained) for weight in part.parameters())
        assert all(child.training == (name in trained) for child in part.modules())
    assert module.encoder.get_submodule("bn1").training == (depth == "all")
    assert module.head.training
    assert not any(child.training for child in module.eval().modules())


def test_the_encoder_has_a_rate_of_its_own() -> None:
    module = make_module(encoder_rate=0.25)
    optimizer: Any = module.configure_optimizers()
    of_head = {id(weight) for weight in module.head.parameters()}
    for group in optimizer.param_groups:
        in_head = [id(weight) in of_head for weight in group["params"]]
        assert all(in_head) or not any(in_head)
        assert group["lr"] == pytest.approx(0.1 if in_head[0] else 0.025)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))


def test_an_unknown_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="'last_stage'"):
        make_module(depth="half")
