"""Data of the main job: scikit-learn's digits or the user's own file, split three ways and put on one scale."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from esper.grow.errors import GrowError

__all__ = ["Split", "Task", "load_digits", "load_npz", "prepare"]

#: Shares of the validation and the test part; the rest trains.
VALIDATION_SHARE = 0.2
TEST_SHARE = 0.2

#: A class must be able to appear in all three parts.
MIN_PER_CLASS = 5


@dataclass(frozen=True)
class Task:
    """A classification task as read: nothing split, nothing scaled.

    Attributes:
        name: What to call it in reports.
        features: float32, ``[samples, features]``, finite.
        labels: int64, ``[samples]``, from 0 to ``classes`` - 1.
        label_names: The labels as they were in the source, by class.
    """

    name: str
    features: np.ndarray[Any, np.dtype[np.float32]]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    label_names: tuple[str, ...]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.label_names)


@dataclass(frozen=True)
class Split:
    """A task divided into three parts, on one device.

    Features are standardised (mean 0, standard deviation 1 per feature) with the training part's statistics, so that
    nothing of the other parts reaches training. ``*_x`` are float32 ``[samples, features]``, ``*_y`` int64
    ``[samples]``.
    """

    train_x: torch.Tensor
    train_y: torch.Tensor
    validation_x: torch.Tensor
    validation_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @property
    def features(self) -> int:
        """Number of input features."""
        return self.train_x.shape[1]

    def sizes(self) -> dict[str, int]:
        """Samples in each part."""
        return {"train": len(self.train_y), "validation": len(self.validation_y), "test": len(self.test_y)}


def load_digits() -> Task:
    """scikit-learn's digits: 1797 images of 8 x 8 pixels, 10 classes, from the wheel (nothing is downloaded)."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise GrowError(
            f"the digits data needs scikit-learn ({error}); in Esper's folder: pip install '.[grow]', or --data FILE"
        ) from error
    bunch = sklearn_digits()
    return _task("digits (scikit-learn)", bunch.data, bunch.target, "scikit-learn's digits")


def load_npz(path: Path) -> Task:
    """Read arrays ``X`` (``[samples, ...]``, numbers) and ``y`` (``[samples]``, integers or strings) from an .npz file.

    Further axes of ``X`` are flattened. Pickled objects are refused: they could run code.

    Raises:
        GrowError: if the file is missing, is no .npz, lacks ``X`` or ``y``, or holds what cannot be learnt from.
    """
    if not path.exists():
        raise GrowError(f"{path}: no such file")
    if not path.is_file():
        raise GrowError(f"{path}: not a file; --data takes an .npz file with arrays X and y")
    try:
        with path.open("rb") as file:
            return _read_npz(file, path)
    except OSError as error:
        raise GrowError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_npz(file: BinaryIO, path: Path) -> Task:
    try:
        archive = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise GrowError(f"{path}: not an .npz file (write one with numpy.savez(FILE, X=..., y=...))") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise GrowError(
            f"{path}: holds a single array, not an .npz archive with X and y (numpy.savez(FILE, X=..., y=...))"
        )
    with archive:
        missing = [name for name in ("X", "y") if name not in archive.files]
        if missing:
            has = ", ".join(archive.files) or "no arrays"
            raise GrowError(f"{path}: has no array {' and no array '.join(missing)} (it has {has})")
        arrays = {}
        for name in ("X", "y"):
            try:
                arrays[name] = archive[name]
            except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
                reason = (
                    "holds Python objects, not numbers" if "pickle" in str(error).lower() else f"is damaged: {error}"
                )
                raise GrowError(f"{path}: array {name} {reason}") from error
    return _task(path.name, arrays["X"], arrays["y"], str(path))


def _task(name: str, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], source: str) -> Task:
    if x.ndim < 2:
        raise GrowError(f"{source}: X has shape {x.shape}; expected [samples, features]")
    if y.ndim != 1:
        raise GrowError(f"{source}: y has shape {y.shape}; expected one label per sample, [samples]")
    if len(x) != len(y):
        raise GrowError(f"{source}: X has {len(x)} samples but y has {len(y)} labels")
    if x.size == 0:
        raise GrowError(f"{source}: X is empty (shape {x.shape})")
    if x.dtype.kind not in "biuf":
        raise GrowError(f"{source}: X has dtype {x.dtype}; expected real numbers")
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(x.reshape(len(x), -1), dtype=np.float32)
    bad = np.size(features) - int(np.isfinite(features).sum())
    if bad:
        raise GrowError(f"{source}: X has {bad} values that are NaN, infinite or too large for float32")
    if y.dtype.kind == "f":
        if not np.isfinite(y).all():
            raise GrowError(f"{source}: y has labels that are NaN or infinite")
        if (y != np.floor(y)).any():
            raise GrowError(
                f"{source}: y has labels that are not whole numbers; this is classification, not regression"
            )
        y = y.astype(np.int64)
    elif y.dtype.kind not in "biuUS":
        raise GrowError(f"{source}: y has dtype {y.dtype}; expected integers or strings")
    kinds, labels, counts = np.unique(y, return_inverse=True, return_counts=True)
    if len(kinds) < 2:
        raise GrowError(f"{source}: y has one class only ({kinds[0]}); classification needs at least two")
    rare = int(counts.argmin())
    if counts[rare] < MIN_PER_CLASS:
        raise GrowError(
            f"{source}: class {kinds[rare]} has {counts[rare]} samples; at least {MIN_PER_CLASS} of each of the "
            f"{len(kinds)} classes are needed for a training, a validation and a test part"
        )
    return Task(name, features, labels.astype(np.int64), tuple(str(kind) for kind in kinds))


def prepare(task: Task, *, seed: int, device: torch.device) -> Split:
    """Shuffle, split with equal class shares (60 / 20 / 20), standardise, and move to ``device``."""
    rng = np.random.default_rng(seed)
    parts: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for label in range(task.classes):
        members = rng.permutation(np.flatnonzero(task.labels == label))
        held = max(1, round(len(members) * VALIDATION_SHARE))
        tested = max(1, round(len(members) * TEST_SHARE))
        for part, indices in zip(
            parts, np.split(members, [len(members) - held - tested, len(members) - tested]), strict=True
        ):
            part.append(indices)
    train, validation, test = (rng.permutation(np.concatenate(part)) for part in parts)
    mean = task.features[train].mean(axis=0, dtype=np.float64)
    deviation = task.features[train].std(axis=0, dtype=np.float64)
    # A feature that never changes in training carries nothing; dividing by its zero spread would make it NaN.
    deviation[deviation == 0.0] = 1.0

    def tensors(rows: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = ((task.features[rows] - mean) / deviation).astype(np.float32)
        return torch.from_numpy(scaled).to(device), torch.from_numpy(task.labels[rows]).to(device)

    return Split(*tensors(train), *tensors(validation), *tensors(test))
