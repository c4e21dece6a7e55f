"""Where in a patch a probe's answer comes from: cubes are blurred one after the other, and the answer asked again.

Needs captum: `pip install 'fmcib_ssl[report]'`. Nothing is linearised: a value says by how much the log-odds that the
encoder and the probe give to the patch fall when that place is blurred.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int16
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from fmcib_ssl.evaluation.figures import INK, LUNG_WINDOW_HU, MUTED, save_figure
from fmcib_ssl.types import Preprocessing

Array = npt.NDArray[Any]


def has_captum() -> bool:
    """Whether captum is installed."""
    return importlib.util.find_spec("captum") is not None


class LinearReadout(nn.Module):
    """A frozen encoder and logistic regression on its standardised features, as one module.

    Args:
        encoder: `(batch, 1, z, y, x)` to `(batch, features)`.
        features: that the encoder gives, `(n, features)`, to fit on.
        labels: 0 or 1, `(n,)`.
        c: inverse strength of the penalty.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, encoder: nn.Module, features: Array, labels: Array, c: float = 0.01) -> None:
        super().__init__()
        self.encoder = encoder.eval()
        scaler, probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000)).fit(features, labels)
        weight = probe.coef_[0] / scaler.scale_
        self.register_buffer("weight", torch.as_tensor(weight, dtype=torch.float32))
        self.register_buffer("bias", torch.as_tensor(probe.intercept_[0] - weight @ scaler.mean_, dtype=torch.float32))

    def forward(self, views: Float[Tensor, "batch 1 z y x"]) -> Float[Tensor, " batch"]:
        """Log-odds of class 1."""
        logits: Tensor = self.encoder(views).float() @ self.weight + self.bias
        return logits


def occlusion(
    readout: nn.Module,
    patch_hu: Int16[Tensor, "1 z y x"],
    preprocessing: Preprocessing,
    *,
    edge: int | None = None,
    batch_size: int = 32,
) -> Float[np.ndarray, "z y x"]:
    """By how much the log-odds fall when the cubes that cover a voxel are hidden, averaged over those cubes.

    A hidden cube shows the patch blurred by half its edge: edges and texture go, the mean stays, and no hole is made,
    which an encoder might take for a finding.

    Args:
        readout: `(batch, 1, z, y, x)` to `(batch,)`.
        patch_hu: the patch.
        preprocessing: what the encoder was trained to see.
        edge: of a cube, voxels; by default a quarter of the patch's shortest edge. Cubes overlap by half.
        batch_size: hidden patches in one pass.

    Raises:
        ImportError: captum is not installed.

    Source: Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, in 3D.
    """
    view = preprocessing.normalize(patch_hu)[None]
    edge = edge or max(2, min(patch_hu.shape[1:]) // 4)
    sizes = [min(edge, n) for n in patch_hu.shape[1:]]
    blurred = torch.from_numpy(gaussian_filter(view[0, 0].numpy(), edge / 2, mode="nearest"))[None, None]
    method = importlib.import_module("captum.attr").Occlusion(readout)
    with torch.no_grad():
        falls = method.attribute(
            view,
            sliding_window_shapes=(1, *sizes),
            strides=(1, *[max(1, n // 2) for n in sizes]),
            baselines=blurred,
            perturbations_per_eval=batch_size,
        )
    result: Float[np.ndarray, "z y x"] = falls[0, 0].numpy()
    return result


@dataclass(frozen=True)
class SalientLesion:
    """A lesion on the saliency sheet.

    Attributes:
        title: what it is and what the probe said.
        patch_hu: the patch, `(1, z, y, x)`.
        falls: of `occlusion`.
    """

    title: str
    patch_hu: Int16[Tensor, "1 z y x"]
    falls: Float[np.ndarray, "z y x"]


def saliency_sheet(
    lesions: Sequence[SalientLesion], path: Path | str, *, window_hu: tuple[float, float] = LUNG_WINDOW_HU
) -> Path:
    """Draw patches, axial and coronal through the middle, plain and with what blurring each place does.

    Args:
        lesions: at least one.
        path: of the PNG.
        window_hu: darkest and brightest value shown.
    """
    height = 0.75 + 2.15 * len(lesions)
    figure = Figure(figsize=(8.6, height), facecolor="white")
    grid = figure.add_gridspec(
        len(lesions), 5, width_ratios=(1, 1, 1, 1, 0.06), left=0.01, right=0.92, wspace=0.06, hspace=0.2,
        top=1 - 0.35 / height, bottom=0.42 / height,
    )  # fmt: skip
    for line, lesion in enumerate(lesions):
        volume = lesion.patch_hu[0].float().numpy()
        z, y = volume.shape[0] // 2, volume.shape[1] // 2
        limit = max(float(np.abs(lesion.falls).max()), 1e-12)
        for pair, (plane, falls) in enumerate(((volume[z], lesion.falls[z]), (volume[::-1, y], lesion.falls[::-1, y]))):
            for overlaid in (False, True):
                axes = figure.add_subplot(grid[line, 2 * pair + overlaid])
                axes.imshow(plane, cmap="gray", vmin=window_hu[0], vmax=window_hu[1])
                if overlaid:
                    axes.imshow(falls, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.7 * np.abs(falls) / limit)
                axes.set_axis_off()
                if line == 0:
                    name = ("axial", "coronal")[pair] + (", what it rests on" if overlaid else "")
                    axes.set_title(name, fontsize=8, color=MUTED, pad=3)
                if not pair and not overlaid:
                    axes.text(0, -0.04, lesion.title, transform=axes.transAxes, va="top", fontsize=7.5, color=INK)
        scale = figure.add_subplot(grid[line, 4])
        figure.colorbar(ScalarMappable(Normalize(-limit, limit), "RdBu_r"), cax=scale)
        scale.tick_params(labelsize=7, colors=MUTED)
        if line == 0:
            scale.set_title("log-odds", fontsize=7, color=MUTED, pad=5)
    note = (
        "Red: blurring this place lowers the log-odds, so they rest on it. Blue: blurring it raises them. "
        "Patient's right on the left, head up."
    )
    figure.text(0.01, 0.1 / height, note, fontsize=7.5, color=MUTED)
    return save_figure(figure, path, dpi=130)
