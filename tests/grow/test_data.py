"""Data of the main job: what is read, what is refused, how it is split."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper.grow.data import load_digits, load_npz, prepare
from esper.grow.errors import GrowError

X = np.arange(60.0).reshape(20, 3)
Y = np.arange(20) % 2


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_digits_come_from_the_wheel() -> None:
    task = load_digits()
    assert task.features.shape == (1797, 64)
    assert task.classes == 10


@pytest.mark.parametrize("split_seed", [0, 7])
def test_split_is_stratified_disjoint_and_standardised_by_the_training_part(split_seed: int) -> None:
    task = load_digits()
    split = prepare(task, seed=split_seed, device=torch.device("cpu"))
    assert sum(split.sizes().values()) == 1797
    shares = np.bincount(task.labels) / 1797
    for part in (split.train_y, split.validation_y, split.test_y):
        # Each class is rounded to a whole sample, so its count is off by less than one.
        assert np.abs(np.bincount(part.numpy(), minlength=10) - shares * len(part)).max() < 1.5
    assert split.train_x.dtype is torch.float32
    # Means of about 1078 float32 values of size one: 2**-24 * sqrt(1078) at worst here, and no feature without spread
    # may become NaN.
    assert split.train_x.mean(0).abs().max() < 1e-5
    deviations = split.train_x.std(0, unbiased=False)
    assert ((deviations - 1).abs() < 1e-4).logical_or(deviations == 0).all()
    rows = {tuple(row) for row in task.features.tolist()}
    if len(rows) == 1797:
        everything = torch.cat((split.train_x, split.validation_x, split.test_x))
        assert len({tuple(row) for row in everything.tolist()}) == 1797


def test_split_depends_on_the_seed_alone() -> None:
    task = load_digits()
    first, second = (prepare(task, seed=3, device=torch.device("cpu")) for _ in range(2))
    assert torch.equal(first.train_x, second.train_x)
    other = prepare(task, seed=4, device=torch.device("cpu"))
    assert not torch.equal(first.train_y, other.train_y)


@pytest.mark.parametrize(
    "labels",
    [Y, Y.astype(bool), Y.astype(np.float32), Y * 7 - 3, np.where(Y == 0, "cat", "dog"), Y.astype(np.uint8)],
)
def test_labels_of_every_kind(tmp_path: Path, labels: Any) -> None:
    task = load_npz(write(tmp_path / "d.npz", X=X, y=labels))
    assert task.labels.tolist() == Y.tolist()
    assert task.classes == 2


def test_images_are_flattened(tmp_path: Path) -> None:
    task = load_npz(write(tmp_path / "d.npz", X=np.zeros((20, 2, 3, 4), dtype=np.uint8), y=Y))
    assert task.features.shape == (20, 24)


def _with(value: float) -> Any:
    x = X.copy()
    x[3, 1] = value
    return x


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"y": Y}, ["no array X", "it has y"]),
        ({"X": X}, ["no array y"]),
        ({"a": X}, ["no array X and no array y"]),
        ({"X": X[:, 0], "y": Y}, ["(20,)", "[samples, features]"]),
        ({"X": X, "y": Y[:, None]}, ["(20, 1)"]),
        ({"X": X, "y": Y[:-1]}, ["20 samples", "19 labels"]),
        ({"X": X[:, :0], "y": Y}, ["empty"]),
        ({"X": X[:0], "y": Y[:0]}, ["empty"]),
        ({"X": _with(np.nan), "y": Y}, ["1 values", "NaN"]),
        ({"X": _with(np.inf), "y": Y}, ["infinite"]),
        ({"X": _with(1e300), "y": Y}, ["too large for float32"]),
        ({"X": X.astype(complex), "y": Y}, ["complex128"]),
        ({"X": X.astype(str), "y": Y}, ["real numbers"]),
        ({"X": X, "y": Y * 0}, ["one class only"]),
        ({"X": X, "y": Y + 0.5}, ["not whole numbers"]),
        ({"X": X, "y": Y * np.nan}, ["NaN"]),
        ({"X": X, "y": Y.astype(complex)}, ["integers or strings"]),
        ({"X": X, "y": np.r_[np.zeros(18), 1, 1]}, ["class 1", "2 samples", "at least 5"]),
    ],
)
def test_bad_arrays_are_refused_in_one_line(tmp_path: Path, arrays: dict[str, Any], words: list[str]) -> None:
    path = write(tmp_path / "d.npz", **arrays)
    with pytest.raises(GrowError) as caught:
        load_npz(path)
    for word in (*words, str(path)):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("was unpickled",))

    path = tmp_path / "d.npz"
    np.savez(path, X=np.array([Bomb()] * 20, dtype=object), y=Y, allow_pickle=True)
    with pytest.raises(GrowError, match="Python objects"):
        load_npz(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(GrowError, match="no such file"):
        load_npz(tmp_path / "missing.npz")
    with pytest.raises(GrowError, match="not a file"):
        load_npz(tmp_path)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(GrowError, match=r"not an \.npz file"):
        load_npz(tmp_path / "text.npz")
    (tmp_path / "empty.npz").touch()
    with pytest.raises(GrowError, match=r"not an \.npz file"):
        load_npz(tmp_path / "empty.npz")
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(GrowError, match="single array"):
        load_npz(tmp_path / "one.npy")
    whole = write(tmp_path / "whole.npz", X=X, y=Y).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-40])
    with pytest.raises(GrowError, match=r"not an \.npz file"):
        load_npz(tmp_path / "cut.npz")
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        archive.writestr("X.npy", b"\x93NUMPY garbage")
        archive.writestr("y.npy", b"\x93NUMPY garbage")
    with pytest.raises(GrowError, match="array X"):
        load_npz(tmp_path / "odd.npz")
