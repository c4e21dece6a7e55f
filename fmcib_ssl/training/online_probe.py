"""Asks the encoder, while it trains, what it knows about lesions that it is not trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fmcib_ssl.data import LesionPatches, Store, selected, text_of
from fmcib_ssl.evaluation import auc, column_text, knn_scores, linear_scores, read_labels, value_of
from fmcib_ssl.models import class_spread, effective_rank, evaluation_mode, mean_cosine_within, uniformity, unit_vectors
from fmcib_ssl.types import Padding

logger = logging.getLogger(__name__)

#: Neighbours that vote; folds of the linear probe, fewer if a class has fewer patients; patches in one pass.
_NUM_NEIGHBORS, _NUM_FOLDS, _BATCH_SIZE = 20, 5, 64


class OnlineProbe(L.Callback):
    """Logs how well a kNN vote and a linear probe on frozen features tell the classes of held-out lesions.

    The lesions are read from a store, unaugmented, embedded by `pl_module.encoder` in evaluation mode without
    gradients, and judged by lesions of other patients within the set. Nothing of this reaches the weights, batch norm's
    averages or any random number of the training. The first figures are of the weights that training begins with.

    Every device embeds its share of the lesions, and all gather all features, in the same epochs.

    Logs `online/knn_auc` and `online/linear_auc` (mean over classes against the rest), and of the features
    `online/rank`, `online/lesion_cosine`, `online/uniformity`, and `online/spread_CLASS` beside `online/spread_all`
    (`fmcib_ssl.models.representation`).

    Args:
        store: folder of the store that holds the lesions.
        label: the column with the classes; lesions without one are left out.
        patch_size: voxels along z, y, x, as in training.
        select: only lesions with these values, such as `{"split": "val"}`; a list of values means any of them.
        group: the column that names the patient; None takes `PatientID`, or where there is none the scan.
        every_n_epochs: how often, 1 or more; and once after the last.
        max_lesions: more are cut down to a random choice, the same in every run.

    Raises:
        ValueError: no such column, no such lesions, or labels that no probe can be judged on.
        fmcib_ssl.data.store.StoreError: a store that cannot be used.
    """

    def __init__(
        self,
        store: Path | str | None,
        label: str | None,
        *,
        patch_size: Sequence[int] = (50, 50, 50),
        padding: Padding = "constant",
        select: Mapping[str, Any] | None = None,
        group: str | None = None,
        every_n_epochs: int = 5,
        max_lesions: int = 512,
    ) -> None:
        if store is None or label is None:
            raise ValueError(
                "the online probe reads labelled lesions from a store: set callbacks.online_probe.store=DIR and "
                "callbacks.online_probe.label=COLUMN"
            )
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs}: must be at least 1")
        opened = Store(store)
        rows = np.flatnonzero(selected(opened.lesions, select, key="select", where=store))
        if not len(rows):
            raise ValueError(f"no lesion of {store} has select={dict(select or {})}")
        rows = rows[read_labels(opened.lesions.iloc[rows], "multiclass", label=label).rows]
        if len(rows) > max_lesions:
            rows = np.sort(np.random.default_rng(0).permutation(rows)[:max_lesions])
        self.patches = LesionPatches(opened, patch_size, select=rows, padding=padding)
        lesions = self.patches.lesions
        self.labels = read_labels(lesions, "multiclass", label=label)
        self.group = group or ("PatientID" if "PatientID" in lesions else "scan_id")
        self.patients = column_text(lesions, self.group, "group")
        num_patients = pd.Series(self.patients).groupby(self.labels.values).nunique()
        if num_patients.min() < 2:
            raise ValueError(
                f"the column {label!r} has the value {self.labels.classes[num_patients.argmin()]!r} in one patient "
                "only: a class needs at least 2 patients, to fit on one and judge on another. Leave that class out "
                "with callbacks.online_probe.select"
            )
        self.num_folds = min(_NUM_FOLDS, int(num_patients.min()))
        self.every_n_epochs = every_n_epochs
        self._hu: Tensor | None = None  # patches of this device's share
        self._before_training: dict[str, float] = {}
        self.last_result: str | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge the weights that training begins with, and say if lesions are not held out."""
        self._hu = None  # which lesions are this device's is known only now
        if trainer.is_global_zero:
            self._check_held_out(trainer)
        if trainer.global_step == 0:
            self._before_training = self.measure(trainer, pl_module)
            for tracker in trainer.loggers:
                tracker.log_metrics(self._before_training, step=0)
            self._report(trainer, "before training", self._before_training, {})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge the encoder, if it is time."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs:
            figures = self.measure(trainer, pl_module)
            pl_module.log_dict(figures)  # the same on every device
            self._report(trainer, f"epoch {epoch}", figures, self._before_training)

    def measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Embed all lesions and judge them; every device has to call it, and all get the same."""
        features = self._embed(trainer, pl_module)
        unit = unit_vectors((features,))[0]
        names, classes = self.labels.classes, self.labels.values
        spreads, spread_of_all = class_spread(unit, torch.from_numpy(classes), len(names))
        patients = np.unique(self.patients, return_inverse=True)[1]
        knn = knn_scores(features.numpy(), classes, patients, _NUM_NEIGHBORS)
        linear = linear_scores(features.numpy(), classes, patients, self.num_folds)
        figures = {
            "knn_auc": value_of(auc, classes, knn),
            "linear_auc": value_of(auc, classes, linear),
            "rank": float(effective_rank(features)),
            "lesion_cosine": float(mean_cosine_within(unit)),
            "uniformity": float(uniformity(unit)),
            "spread_all": float(spread_of_all),
            **{f"spread_{name}": float(value) for name, value in zip(names, spreads, strict=True)},
        }
        return {f"online/{name}": value for name, value in figures.items()}

    @torch.no_grad()
    def _embed(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        """Features of all lesions, float32 on the CPU, `(lesions, features)`."""
        num_lesions, world_size = len(self.patients), trainer.world_size
        if self._hu is None:
            # Every device gets as many, some of them twice: gathering needs equal shapes.
            own = range(trainer.global_rank, -(-num_lesions // world_size) * world_size, world_size)
            self._hu = torch.stack([self.patches.positive(i % num_lesions) for i in own])
        encoder = cast(nn.Module, pl_module.encoder)
        dtype = next(encoder.parameters()).dtype
        parts = []
        with evaluation_mode(encoder), trainer.precision_plugin.forward_context():
            for patches in torch.split(self._hu, _BATCH_SIZE):
                views = self.patches.preprocessing.normalize(patches.to(pl_module.device)).to(dtype)
                parts.append(encoder(views).float())
        features = torch.cat(parts)
        if world_size > 1:
            gathered = cast(Tensor, pl_module.all_gather(features))  # (world_size, own, features)
            features = gathered.transpose(0, 1).flatten(0, 1)[:num_lesions]
        return features.cpu()

    def _check_held_out(self, trainer: L.Trainer) -> None:
        trained = getattr(getattr(getattr(trainer, "datamodule", None), "dataset", None), "patches", None)
        rows = getattr(trained, "lesions", None)
        if not isinstance(rows, pd.DataFrame) or self.group not in rows:
            return
        own = set(self.patients)
        if shared := own & set(text_of(rows[self.group]).dropna()):
            logger.warning(
                "online probe: %d of its %d patients are trained on (without labels), so its figures flatter the "
                "encoder; hold them out with data.select and callbacks.online_probe.select", len(shared), len(own),
            )  # fmt: skip

    def _report(self, trainer: L.Trainer, when: str, figures: dict[str, float], before: dict[str, float]) -> None:
        shown = ", ".join(
            f"{name} AUC {figures[key]:.3f}" + (f" ({before[key]:.3f} before training)" if before else "")
            for name, key in (("linear", "online/linear_auc"), ("kNN", "online/knn_auc"))
        )
        self.last_result = f"{self.labels.name}, {when}: {shown}"
        if trainer.is_global_zero:
            logger.info("online probe of %s", self.last_result)
