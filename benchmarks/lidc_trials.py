"""Ways to an encoder that knows what statistics do not, tried on the training patients of the first fold alone.

    python benchmarks/lidc_trials.py data=DIR           # a table of docs/does_it_learn.md; resumes where it was stopped

Three splits of those patients: pretrained and fitted on two thirds, scored on the last third by Spearman's correlation
with the mean rating. Each trial is `nodule_recipe` with one of the methods below.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from lidc_data import Nodules, folds_of, load
from lidc_methods import BY_NAME, Contender, features
from lidc_targets import GRADED, PROBE
from pydantic import Field
from scipy.stats import spearmanr
from torch import Tensor, nn

from fmcib_ssl.evaluation import Inputs, Protocol, Readers, Split, read_ratings, score
from fmcib_ssl.io import Command, atomic_write, parse_command
from fmcib_ssl.losses import NTXentNegativeMinedLoss
from fmcib_ssl.models import MinedContrast, ProjectionHead
from fmcib_ssl.models.encoders import learned_features
from fmcib_ssl.models.point_features import num_point_features, offsets_from_point, point_derivatives, point_features
from fmcib_ssl.models.pretraining import Parts, Step
from fmcib_ssl.types import Array, ViewPairs

FIXED = num_point_features()


def standardised(patches_hu: Tensor) -> Tensor:
    """Point features of patches in HU, each with mean 0 and deviation 1 over the patches, clamped to 5."""
    hu = patches_hu.float().clamp_min(-1024)
    values = torch.cat([point_features(some, point_derivatives(some)) for some in hu.split(128)])
    return ((values - values.mean(0)) / values.std(0).clamp_min(1e-6)).clamp(-5, 5)


class WithAuxiliary(MinedContrast):
    """The recipe's contrast, and `weight` times an auxiliary loss of the features before the head."""

    def __init__(self, parts: Parts, *, weight: float = 1.0, **options: Any) -> None:
        super().__init__(parts, **options)
        self.weight = weight

    def step(self, batch: ViewPairs, batch_idx: int) -> Step:
        """Both losses, from one pass through the encoder."""
        views = torch.cat(batch["positive"])
        learned = learned_features(self.encoder, views)
        z0, z1 = self.head(learned).chunk(2)
        contrast = self.loss({"positive": (z0, z1), "negative": (z0[:0], z1[:0])})
        return Step(contrast + self.weight * self.auxiliary(learned, views, batch), (z0, z1))


class UnlikeStatistics(WithAuxiliary):
    """Penalty: share of the features' variance that the first 16 principal components of point features explain."""

    def auxiliary(self, learned: Tensor, views: Tensor, batch: ViewPairs) -> Tensor:
        """Penalty of both views' features, `(2 * batch, dim)`; by chance 1 / 8 for 128 views."""
        with torch.no_grad():
            cut = cast(Any, self.encoder)
            components = torch.linalg.svd(standardised(views * cut.hu_scale - cut.hu_offset), full_matrices=False)[0]
        centred = learned - learned.mean(0)
        explained = (components[:, :16].T @ centred).square().sum(0) / centred.square().sum(0).clamp_min(1e-6)
        return explained.mean()


class PredictStatistics(WithAuxiliary):
    """Of a noisy, zoomed view a linear layer has to give the point features that the patch had before."""

    def __init__(self, parts: Parts, **options: Any) -> None:
        super().__init__(parts, **options)
        self.predict = nn.Sequential(nn.BatchNorm1d(parts.num_features), nn.Linear(parts.num_features, FIXED))

    def on_fit_start(self) -> None:
        """Point features of all patches, once."""
        super().on_fit_start()
        self.clean = standardised(cast(Any, self.trainer).datamodule.dataset.patches.patches)

    def auxiliary(self, learned: Tensor, views: Tensor, batch: ViewPairs) -> Tensor:
        """Mean squared error of standardised point features."""
        return F.mse_loss(self.predict(learned), self.clean[batch["lesion"]].repeat(2, 1))


class SelfDistillation(WithAuxiliary):
    """A student to which the core of the lesion, or its rim, is the view's mean predicts a teacher's whole view.

    The teacher follows the weights; its features are standardised over the batch (data2vec, Baevski et al. 2022).
    """

    def __init__(self, parts: Parts, **options: Any) -> None:
        super().__init__(parts, **options)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(requires_grad=False)
        self.predict = ProjectionHead(parts.num_features, 512, parts.num_features)

    def auxiliary(self, learned: Tensor, views: Tensor, batch: ViewPairs) -> Tensor:
        """Smooth L1 distance from the teacher's features."""
        radius = offsets_from_point(tuple(views.shape[2:]), views.device).square().sum(0).sqrt()
        border = torch.empty(len(views), 1, 1, 1, 1)
        border.uniform_(2, 6, generator=torch.Generator().manual_seed(self.global_step))
        is_hidden = (radius < border) ^ (torch.arange(len(views), device=views.device) % 2 == 1).view(-1, 1, 1, 1, 1)
        masked = torch.where(is_hidden, views.mean((2, 3, 4), keepdim=True), views)
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
                slow.lerp_(fast, 0.02)
            whole = F.batch_norm(learned_features(self.teacher, views), None, None, training=True)
        return F.smooth_l1_loss(self.predict(learned_features(self.encoder, masked)), whole)


class TwoHeads(MinedContrast):
    """Other lesions are the negatives of one head, mined patches those of another; the mean of both losses."""

    def __init__(self, parts: Parts, **options: Any) -> None:
        super().__init__(parts, **options)
        self.mined_head = ProjectionHead(parts.num_features, 128, 64)
        self.mined_loss = NTXentNegativeMinedLoss(0.1, negatives="mined")

    def step(self, batch: ViewPairs, batch_idx: int) -> Step:
        """Both losses, from one pass through the encoder."""
        views = [*batch["positive"], *batch["negative"]]
        learned, losses = learned_features(self.encoder, torch.cat(views)), []
        for head, loss in ((self.head, self.loss), (self.mined_head, self.mined_loss)):
            z = head(learned).split([len(view) for view in views])
            losses.append(loss({"positive": z[:2], "negative": z[2:]}))
        return Step(sum(losses) / 2, z[:2], {}, z[2:])


#: Name, and the recipe's command line.
TRIALS = {
    "recipe": (),
    "unlike_statistics": ("method._target_=lidc_trials.UnlikeStatistics", "+method.weight=2"),
    "self_distillation_and_contrast": ("method._target_=lidc_trials.SelfDistillation", "+method.weight=5"),
    "two_heads": ("method._target_=lidc_trials.TwoHeads", "data.negatives_per_lesion=1"),
    "predict_statistics": ("method._target_=lidc_trials.PredictStatistics",),
}


class LidcTrials(Command):
    """Train every trial on three splits of the first fold's training patients and print the table."""

    data: Path = Field(description="folder with lidc_crops/ and ct/")
    workspace: Path = Field(Path("runs/lidc"), description="store and features; a stopped run goes on from it")
    trials: list[str] = Field(list(TRIALS), description="which")
    seeds: int = Field(1, ge=1, description="pretrainings of each split")


def development_splits(nodules: Nodules) -> list[Split]:
    """Three splits by patient, without the first fold."""
    third, kept = folds_of(nodules.patients, 3, seed=7), nodules.fold != 0
    return [Split(str(k), np.flatnonzero(kept & (third != k)), np.flatnonzero(kept & (third == k))) for k in range(3)]


def trained(command: LidcTrials, nodules: Nodules, name: str, seed: int) -> list[Array]:
    """Features of all nodules for every split, computed once."""
    contender, by_split = Contender(name, overrides=TRIALS[name]), []
    for split in development_splits(nodules):
        file = command.workspace / "trials" / contender.key(None) / f"seed{seed}-{split.name}.npy"
        if not file.is_file():
            computed = features(contender, nodules, split.train, seed=seed)
            with atomic_write(file) as unfinished:
                np.save(unfinished, computed)
        by_split.append(np.asarray(np.load(file)))
    return by_split


def correlations(nodules: Nodules, by_split: list[Array]) -> Array:
    """Spearman's correlation in each task, the mean over splits, and the mean of these, `(5,)`."""
    means = []
    for task in GRADED:
        labels, values = Readers(task, read_ratings(nodules.lesions, task)).labels(), []
        for split, x in zip(development_splits(nodules), by_split, strict=True):
            train, test = (np.flatnonzero(np.isin(labels.rows, rows)) for rows in (split.train, split.test))
            protocol = Protocol(labels, nodules.patients[labels.rows], [Split(split.name, train, test)], "folds")
            (scored,) = score(PROBE["continuous"], Inputs(task, x[labels.rows]), protocol)
            values.append(spearmanr(labels.values[scored.rows], scored.scores).statistic)
        means.append(np.mean(values))
    return np.array([*means, np.mean(means)])


def main() -> None:
    """Print the table, row by row: statistics, then of each trial the learned features alone and all."""
    command = parse_command(LidcTrials, sys.argv[1:])
    torch.set_num_threads(1)
    nodules = load(command.data, command.workspace)
    print("| trial, seeds |", " | ".join([*GRADED, "mean"]), "|\n| --- |" + " ---: |" * 5)

    def row(title: str, by_seed: list[list[Array]]) -> None:
        values = np.mean([correlations(nodules, by_split) for by_split in by_seed], axis=0)
        print(f"| {title}, {len(by_seed)} |", " | ".join(f"{value:.3f}" for value in values), "|", flush=True)

    for name in ("hu_statistics", "point_features"):
        row(name, [[features(BY_NAME[name], nodules, np.arange(0), seed=0)] * 3])
    for name in command.trials:
        by_seed = [trained(command, nodules, name, seed) for seed in range(command.seeds)]
        row(f"{name}, learned features only", [[x[:, :-FIXED] for x in by_split] for by_split in by_seed])
        row(f"{name}, with point features", by_seed)


if __name__ == "__main__":
    main()
