"""Asks the encoder, while it trains, what it knows about lesions that it is not trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import pandas as pd
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from fmcib_ssl.data import LesionPatches, Store, selected, text_of
from fmcib_ssl.evaluation import knn_scores, linear_scores, macro_auc
from fmcib_ssl.models import class_spread, effective_rank, evaluation_mode, mean_cosine_within, uniformity, unit_vectors
from fmcib_ssl.types import Padding, Preprocessing

logger = logging.getLogger(__name__)

#: More kinds of a label than this are a measurement, not classes.
_MAX_CLASSES = 20
#: What `every_n_epochs="auto"` lets the probe's forward passes cost, as a share of training's, of which a step makes
#: three forward and back.
_COST, _PASSES_OF_A_STEP = 0.02, 3


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
        every_n_epochs: how often; "auto" takes what keeps its passes through the encoder under 2 % of training's.
        max_lesions: more are cut down to a random choice, the same in every run.
        num_neighbors: that vote.
        num_folds: of the linear probe; fewer if a class has fewer patients.
        batch_size: patches in one pass.

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
        every_n_epochs: int | Literal["auto"] = "auto",
        max_lesions: int = 512,
        num_neighbors: int = 20,
        num_folds: int = 5,
        batch_size: int = 64,
    ) -> None:
        if store is None:
            raise ValueError("the online probe reads lesions from a store: set callbacks.online_probe.store=DIR")
        if every_n_epochs != "auto" and every_n_epochs < 1:
            raise ValueError(f"every_n_epochs={every_n_epochs}: should be 1 or more, or auto")
        opened = Store(store)
        rows = _choose(opened.lesions, store, label, select, max_lesions)
        padding_hu = opened.settings.padding_hu
        patches = LesionPatches(opened, patch_size, select=rows, padding_hu=padding_hu, padding=padding)
        size = cast(tuple[int, int, int], tuple(patch_size))
        self.preprocessing = Preprocessing(size, opened.settings.spacing_mm, padding_hu, padding=padding)
        self.patches = patches
        self.label = str(label)
        self.group = group or ("PatientID" if "PatientID" in patches.lesions else "scan_id")
        if self.group not in patches.lesions:
            raise ValueError(f"{store} has no column {self.group!r}; it has {', '.join(map(str, patches.lesions))}")
        kinds, self.classes = np.unique(patches.lesions[self.label].to_numpy(), return_inverse=True)
        self.class_names = [str(kind) for kind in kinds]
        self.groups = np.unique(text_of(patches.lesions[self.group]).fillna(""), return_inverse=True)[1]
        self.every_n_epochs: int | None = None if every_n_epochs == "auto" else every_n_epochs
        self.num_neighbors = num_neighbors
        self.num_folds = self._folds(num_folds)
        self.batch_size = batch_size
        self._read: Tensor | None = None
        self._at_the_start: dict[str, float] = {}
        self.last_result: str | None = None

    def _folds(self, num_folds: int) -> int:
        held = self.patches.lesions.groupby(self.label)[self.group].nunique()
        if not 2 <= len(held) <= _MAX_CLASSES:
            raise ValueError(
                f"the column {self.label!r} holds {len(held)} different values in {len(self.classes)} lesions; a probe "
                f"needs 2 to {_MAX_CLASSES} classes"
            )
        if held.min() < 2:
            raise ValueError(
                f"the column {self.label!r} has the value {held.idxmin()!r} in one patient only: a class needs at "
                "least 2 patients, to fit on one and judge on another. Leave that class out with "
                "callbacks.online_probe.select"
            )
        return min(num_folds, int(held.min()))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge the weights that training begins with, and say if lesions are not held out."""
        self._read = None  # which lesions are this device's is known only now
        if trainer.is_global_zero:
            self._check_held_out(trainer)
        if trainer.global_step > 0:
            return
        self._at_the_start = self.measure(trainer, pl_module)
        for run_logger in trainer.loggers:
            run_logger.log_metrics(self._at_the_start, step=0)
        self._tell(trainer, self._at_the_start)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, once, what a step costs."""
        if self.every_n_epochs is not None:
            return
        views: list[Tensor] = []
        apply_to_collection(batch, Tensor, views.append)
        num_views = sum(view[..., 0, 0, 0, 0].numel() for view in views if view.ndim >= 5)  # (..., 1, z, y, x)
        allowed = _COST * _PASSES_OF_A_STEP * max(1, num_views * int(trainer.num_training_batches))
        self.every_n_epochs = max(1, -(-len(self.classes) // int(max(1, allowed * trainer.world_size))))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Judge the encoder, if it is time."""
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs is None or (epoch % self.every_n_epochs and epoch != trainer.max_epochs):
            return
        figures = self.measure(trainer, pl_module)
        pl_module.log_dict(figures)  # the same on every device
        self._tell(trainer, figures)

    def state_dict(self) -> dict[str, Any]:
        """How often it was found to be cheap enough, and what it began with: a resumed run says the same."""
        return {"every_n_epochs": self.every_n_epochs, "at_the_start": self._at_the_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take both up, unless the settings now say how often."""
        self.every_n_epochs = self.every_n_epochs or state_dict["every_n_epochs"]
        self._at_the_start = dict(state_dict["at_the_start"])

    def measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        """Embed all lesions and judge them; every device has to call it, and all get the same."""
        features = self._embed(trainer, pl_module)
        unit = unit_vectors((features,))[0]
        array = features.numpy()
        spreads, spread_of_all = class_spread(unit, torch.from_numpy(self.classes), len(self.class_names))
        knn = knn_scores(array, self.classes, self.groups, self.num_neighbors)
        linear = linear_scores(array, self.classes, self.groups, self.num_folds)
        figures = {
            "knn_auc": macro_auc(self.classes, knn),
            "linear_auc": macro_auc(self.classes, linear),
            "rank": float(effective_rank(features)),
            "lesion_cosine": float(mean_cosine_within(unit)),
            "uniformity": float(uniformity(unit)),
            "spread_all": float(spread_of_all),
            **{f"spread_{name}": float(value) for name, value in zip(self.class_names, spreads, strict=True)},
        }
        return {f"online/{name}": value for name, value in figures.items()}

    @torch.no_grad()
    def _embed(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        """Features of all lesions, float32 on the CPU, `(lesions, features)`."""
        num_lesions, world_size = len(self.classes), trainer.world_size
        if self._read is None:
            # Every device gets as many, some of them twice: gathering needs equal shapes.
            own = range(trainer.global_rank, -(-num_lesions // world_size) * world_size, world_size)
            self._read = torch.stack([self.patches.positive(i % num_lesions) for i in own])
        encoder = cast(nn.Module, pl_module.encoder)
        dtype = next(encoder.parameters()).dtype
        parts = []
        with evaluation_mode(encoder), trainer.precision_plugin.forward_context():
            for patches in torch.split(self._read, self.batch_size):
                views = self.preprocessing.normalize(patches.to(pl_module.device)).to(dtype)
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
        own = set(text_of(self.patches.lesions[self.group]).dropna())
        if shared := own & set(text_of(rows[self.group]).dropna()):
            logger.warning(
                "online probe: %d of its %d patients are trained on (without labels), so its figures flatter the "
                "encoder; hold them out with data.select and callbacks.online_probe.select",
                len(shared),
                len(own),
            )

    def _tell(self, trainer: L.Trainer, figures: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        before = {} if figures is self._at_the_start else self._at_the_start
        when = "before training" if figures is self._at_the_start else f"epoch {trainer.current_epoch + 1}"
        shown = ", ".join(
            f"{name} AUC {figures[key]:.3f}" + (f" ({before[key]:.3f} before training)" if before else "")
            for name, key in (("linear", "online/linear_auc"), ("kNN", "online/knn_auc"))
        )
        self.last_result = f"{self.label}, {when}: {shown}"
        logger.info("online probe of %s", self.last_result)


def _choose(
    rows: pd.DataFrame, store: object, label: str | None, select: Mapping[str, Any] | None, max_lesions: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Places of the labelled lesions that `select` asks for."""
    if label is None or label not in rows:
        raise ValueError(
            f"label={label}: callbacks.online_probe.label should be a column of {store}, which has "
            + ", ".join(map(str, rows))
        )
    keep = rows[label].notna().to_numpy(bool) & selected(rows, select, key="select", where=store)
    places = np.flatnonzero(keep)
    if len(places) == 0:
        raise ValueError(f"no lesion of {store} has a {label} and select={dict(select or {})}")
    if len(places) > max_lesions:
        places = np.sort(np.random.default_rng(0).permutation(places)[:max_lesions])
    return places
