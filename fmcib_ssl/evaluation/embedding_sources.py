"""What is embedded, by what and how: the lesions of a store, or of a table that gets one, and a frozen encoder.

A source is a dictionary of plain values, so that a table of features can say where its lesions were and they can be
opened again:

- `{"kind": "store", "path": DIR}`
- `{"kind": "scans", "annotations": FILE.csv, "image_root": DIR, "path_prefix": None, "coordinates": "lps",
  "on_bad_row": "skip", "stores": DIR}`; all but the first two may be left out. A store is prepared for the table, or
  brought up to date, in the folder `stores`; as embedding does it, so does training.

Both take `select`, `{column: value or values}`, and `condition`, `{"name": one of CONDITIONS, "draw": number}`: what is
done to every patch that is read. They may hold `preprocessing`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int16
from torch import Tensor, nn

from fmcib_ssl.data import (
    LESIONS_INDEX,
    REJECTED_COLUMNS,
    SCANS_INDEX,
    LesionPatches,
    Store,
    StoreSettings,
    selected,
    text_of,
)
from fmcib_ssl.evaluation.conditions import CONDITIONS, ConditionedPatches, margin_of
from fmcib_ssl.evaluation.feature_table import FEATURES_COLUMN, ID_COLUMN, FeatureTableError
from fmcib_ssl.evaluation.hu_statistics import hu_statistics
from fmcib_ssl.io import checksum_of, digest_of, sha256_of
from fmcib_ssl.models import build_network, load_encoder
from fmcib_ssl.types import Preprocessing

Precision = Literal["32", "bf16", "fp16"]
#: The kind of encoder that takes masks too.
RADIOMICS = "radiomics"
#: The patch alone, or the mean over it and its seven mirror images.
Views = Literal[1, 8]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Patches are read in the order of this column, those of one scan beside each other.
SCAN_COLUMN = "scan_id"
#: Where a table gets its store unless the source says otherwise.
_STORES = Path("data") / "stores"


@dataclass(frozen=True)
class SourcePatches:
    """The patch round each lesion of a source, int16 HU `(1, z, y, x)`: `read(i)` is of `lesions.iloc[i]`.

    Attributes:
        lesions: one row a lesion, with `lesion_id` and `scan_id`.
        read: gives a patch by its lesion's number.
        rejected: rows of the table that cannot be used: `REJECTED_COLUMNS`.
        fingerprint: digest of the table, or of a store's index, and of the options it is read with.
        preprocessing: how the patches are cut and normalised.
    """

    lesions: pd.DataFrame
    read: Callable[[int], Int16[Tensor, "1 z y x"]]
    rejected: pd.DataFrame
    fingerprint: str
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.lesions)


def open_patches(
    source: Mapping[str, Any], preprocessing: Preprocessing | None = None, *, masks: bool = False
) -> SourcePatches:
    """Open the lesions of a source.

    Args:
        source: see the module.
        preprocessing: the patch to cut, as the weights say. By default what `source` holds under `preprocessing`, else
            50 voxels of 1 mm, or of the store's spacing.
        masks: patches have the lesion's mask as a second channel.

    Raises:
        FeatureTableError: a source of another kind, an unknown condition, no lesion selected, or a store whose voxels
            are not those of `preprocessing`.
        fmcib_ssl.data.tables.AnnotationsError: a selection by a column that is missing.
        fmcib_ssl.data.store.StoreError: the store cannot be read or prepared.
        fmcib_ssl.data.tables.AnnotationsError: no table that can be read, or no row that can be used.
    """
    if preprocessing is None and source.get("preprocessing"):
        preprocessing = Preprocessing.from_dict(source["preprocessing"])
    rejected, how = pd.DataFrame(columns=[*REJECTED_COLUMNS]), {}
    if source.get("kind") == "store":
        store = Store(source["path"])
        contents = [store.path / LESIONS_INDEX, store.path / SCANS_INDEX]
    elif source.get("kind") == "scans":
        from fmcib_ssl.data import store_for_table  # noqa: PLC0415  # needs SimpleITK

        how = {key: source[key] for key in ("path_prefix", "coordinates") if source.get(key) is not None}
        options = {**how, "on_bad_row": source.get("on_bad_row", "skip")}
        if source.get("image_root") is not None:
            options["image_root"] = Path(source["image_root"])
        table, cut = Path(source["annotations"]), preprocessing or Preprocessing()
        settings = StoreSettings(spacing_mm=cut.spacing_mm, padding_hu=cut.padding_hu)
        summary = store_for_table(table, Path(source.get("stores") or _STORES), settings, **options)
        # The fingerprint is of what was asked for, not of what can be read of it: a scan may come back before a resume.
        store, rejected, contents = Store(summary.store), summary.rejected, [table]
    else:
        raise FeatureTableError(f"a source's kind is 'store' or 'scans', not {source.get('kind')!r}")
    grid = store.settings
    cut = preprocessing or Preprocessing(spacing_mm=grid.spacing_mm, padding_hu=grid.padding_hu)
    if (cut.spacing_mm, cut.padding_hu) != (grid.spacing_mm, grid.padding_hu):
        raise FeatureTableError(
            f"{store.path} has voxels of {grid.spacing_mm:g} mm and {grid.padding_hu} HU outside the scans; the "
            f"encoder was trained on {cut.spacing_mm:g} mm and {cut.padding_hu} HU: prepare a store with "
            f"spacing_mm={cut.spacing_mm:g}, or give the table (annotations=TABLE.csv)"
        )
    keep = selected(store.lesions, source.get("select"), key="select", where=store.path)
    if not keep.any():
        raise FeatureTableError(f"no row of {store.path} has select={source.get('select')}")
    if (condition := source.get("condition")) and condition["name"] not in CONDITIONS:
        raise FeatureTableError(f"condition {condition['name']!r} is not one of {', '.join(CONDITIONS)}")
    margin = margin_of(condition["name"], grid.spacing_mm) if condition else 0
    size = [n + 2 * margin for n in cut.patch_size_zyx]
    patches = LesionPatches(store, size, negatives_per_lesion=0, select=keep, padding=cut.padding)
    lesions = patches.lesions.rename(columns={FEATURES_COLUMN: f"table_{FEATURES_COLUMN}"})
    lesions = lesions.assign(**{ID_COLUMN: text_of(lesions[ID_COLUMN])})
    fingerprint = digest_of(checksum_of(contents), source.get("select"), how, *([condition] if condition else []))
    if condition:
        read = ConditionedPatches(patches, lesions[ID_COLUMN].tolist(), condition["name"], condition["draw"]).read
        return SourcePatches(lesions, read, rejected, fingerprint, cut)
    if masks:
        from fmcib_ssl.evaluation.radiomics import masked_patch  # noqa: PLC0415  # needs SimpleITK

        return SourcePatches(lesions, partial(masked_patch, patches), rejected, fingerprint, cut)
    return SourcePatches(lesions, patches.positive, rejected, fingerprint, cut)


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder, the patches that it takes, and what a table of features says of it.

    Attributes:
        module: `(batch, 1, z, y, x)` to `(batch, features)`.
        preprocessing: how its patches are cut and normalised.
        about: `name`, `kind`, `weights`, `sha256`, `encoder` and `seed` of a `FeatureTable`'s provenance.
    """

    module: nn.Module
    preprocessing: Preprocessing
    about: dict[str, Any]


def _about(name: str, kind: str, **known: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, **dict.fromkeys(("weights", "sha256", "encoder", "seed")), **known}


def trained_encoder(path: Path | str, *, trusted_targets: Collection[str] = ()) -> FrozenEncoder:
    """An encoder from an exported file or a training checkpoint; arguments and errors as of `load_encoder`."""
    path = Path(path)
    module = load_encoder(path, trusted_targets=trusted_targets)
    about = _about(path.stem, "encoder", weights=str(path.absolute()), sha256=sha256_of(path), encoder=module.spec)
    return FrozenEncoder(module, module.preprocessing, about)  # type: ignore[arg-type]  # an attribute of a module


def random_encoder(
    spec: Mapping[str, Any], preprocessing: Preprocessing, seed: int = 0, *, trusted_targets: Collection[str] = ()
) -> FrozenEncoder:
    """An encoder with the weights that it is built with; a function of `spec` and `seed`.

    Args:
        spec: `_target_` and arguments.
        preprocessing: how its patches are cut and normalised.
        seed: 0 or more; the weights follow from it.
        trusted_targets: dotted names, besides this package's own encoders, that may be imported and called.

    Raises:
        FeatureTableError: a target that is not trusted, or that cannot be built so.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = build_network(spec, trusted_targets, "random weights")
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise FeatureTableError(f"{dict(spec)} cannot be built: {error}") from error
    about = _about("random weights", "random_weights", encoder=dict(spec), seed=seed)
    return FrozenEncoder(module.eval(), preprocessing, about)


def raw_voxels(preprocessing: Preprocessing) -> FrozenEncoder:
    """The baseline that knows nothing: normalised voxels, z slowest, as features."""
    return FrozenEncoder(nn.Flatten(), preprocessing, _about("raw voxels", "raw_voxels"))


def statistics_encoder(preprocessing: Preprocessing) -> FrozenEncoder:
    """The baseline that needs no training: `hu_statistics` of the patch."""
    return FrozenEncoder(_HuStatistics(preprocessing), preprocessing, _about("HU statistics", "hu_statistics"))


def radiomics_encoder(preprocessing: Preprocessing) -> FrozenEncoder:
    """The rival that needs masks: `radiomics` of the patch; their names are in the provenance.

    Raises:
        ImportError: MIRP is not installed.
    """
    from fmcib_ssl.evaluation.radiomics import Radiomics  # noqa: PLC0415  # needs SimpleITK

    module = Radiomics(preprocessing)
    return FrozenEncoder(module, preprocessing, _about("radiomics", RADIOMICS, feature_names=module.names))


def rebuilt_encoder(about: Mapping[str, Any], trusted_targets: Collection[str] = ()) -> FrozenEncoder:
    """The encoder that a table's provenance describes.

    Args:
        about: `kind`, `preprocessing`; of an encoder `weights` and `sha256`, of random weights `encoder` and `seed`.
        trusted_targets: foreign encoders that may be built.

    Raises:
        FeatureTableError: no such kind, or weights that have changed since.
        FileNotFoundError: the weights are gone.
    """
    preprocessing, kind = Preprocessing.from_dict(about["preprocessing"]), about["kind"]
    if kind == "encoder":
        encoder = trained_encoder(about["weights"], trusted_targets=trusted_targets)
        if encoder.about["sha256"] != about["sha256"]:
            name = about.get("name")
            raise FeatureTableError(f"{about['weights']} has changed since {name!r} was embedded: embed it again")
        return encoder
    if kind == "random_weights":
        return random_encoder(about["encoder"], preprocessing, about["seed"], trusted_targets=trusted_targets)
    if kind in (makers := {"hu_statistics": statistics_encoder, "raw_voxels": raw_voxels}):
        return makers[kind](preprocessing)
    raise FeatureTableError(f"{about.get('name')!r} was not made by an encoder: give tables that fmcib-ssl embed wrote")


class _HuStatistics(nn.Module):
    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing

    def forward(self, views: Tensor) -> Tensor:
        """Statistics of normalised patches `(batch, 1, z, y, x)`; HU are whole numbers, and counted as such."""
        cut = self.preprocessing
        hu = (views.float() * cut.hu_scale - cut.hu_offset).round()
        return torch.from_numpy(hu_statistics(hu.cpu().numpy(), (cut.spacing_mm,) * 3)).to(views.device)


@dataclass(frozen=True)
class Inference:
    """How patches go through an encoder.

    Attributes:
        batch_size: patches in one forward.
        precision: "32" is float32 throughout (no TF32); "bf16" and "fp16" are torch's autocast.
        views: 1, or 8 for the mean of the features of a patch and of its mirror images.
        device: such as "cpu" or "cuda:1"; None: a GPU if there is one.
        num_workers: processes that read patches; 0 reads in this one.

    Raises:
        FeatureTableError: half precision that the device does not have.
    """

    batch_size: int = 32
    precision: Precision = "32"
    views: Views = 1
    device: str | torch.device | None = None
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.precision == "fp16" and self.torch_device.type == "cpu":
            raise FeatureTableError("precision=fp16 is for GPUs; on the CPU take precision=bf16 or 32")

    @property
    def torch_device(self) -> torch.device:
        """The device that `device` means."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def encode(
    encoder: nn.Module,
    patches_hu: Int16[Tensor, "batch 1 z y x"],
    preprocessing: Preprocessing,
    *,
    precision: Precision = "32",
    views: Views = 1,
) -> Float[Tensor, "batch dim"]:
    """Features of patches, float32, on the device where they and the encoder are.

    With one view in float32 it is `encoder(preprocessing.normalize(patches_hu))`. The encoder's mode is the caller's.
    """
    normalized = preprocessing.normalize(patches_hu)
    flips = [dims for n in range(4) for dims in itertools.combinations((2, 3, 4), n)] if views == 8 else [()]
    arithmetic: AbstractContextManager[object] = nullcontext()
    if precision != "32":
        arithmetic = torch.autocast(normalized.device.type, _AUTOCAST[precision])
    elif normalized.is_cuda:  # convolutions would else round to the ten bits of TF32
        arithmetic = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.inference_mode(), arithmetic:
        return torch.stack([encoder(normalized.flip(dims)).float() for dims in flips]).mean(0)
