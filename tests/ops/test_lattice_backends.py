"""Every backend of the lattice operations against a plain Python model, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper.kernels import lattice as kernels
from esper.ops import native, registry
from esper.ops.lattice import (
    FIELDS,
    PERSISTENT,
    crc32c,
    lattice_compact,
    lattice_crc,
    lattice_snapshot,
    lattice_step,
    layout_of,
    views,
)
from tests.ops import lattice_model as model
from tests.ops.lattice_model import F, Seed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Every backend that this machine can run. The list is part of the test's names, and test_expected_backends fails if one
# that must be there is not.
BACKENDS = [
    backend
    for backend in registry.Backend
    if backend.value in ("reference", "triton") or (backend.value == "cuda") == (DEVICE == "cuda")
]
# Blocks: 512 rows on the CPU and in Triton's step, 1024 words in Triton's checksum, 16 bits to spare. (Compact: 2048 in
# Triton, 4096 in CUDA.)
SIZES = [0, 1, 2, 3, 63, 64, 65, 511, 512, 513, 1025]

# A palette rather than all floats: what matters is the landing of ramps, the two zeros, denormals, NaN and infinity.
_ALPHAS = [0.0, -0.0, 0.25, 0.3, 1 / 3, 0.9999999, 1.0, 1e-40, float("nan")]
_STRIDES = [0.0, 1e-45, 1e-3, 0.1, 0.25, -0.25, 1.0, float("inf"), float("nan")]
_SAMPLES = [float("nan"), 0.0, -0.0, 0.1, 0.7, 1.0, 1e-40, -3.0, 2.0, float("inf"), -float("inf")]
_EDGES = [0, 1, 2, 3, 5, model.INT32_MAX - 1, model.INT32_MAX]


def test_expected_backends() -> None:
    """On a machine without a GPU three of the four run; with one, the CPU's C++ gives way to CUDA's."""
    for op in (lattice_step, lattice_compact, lattice_snapshot, lattice_crc):
        for backend in BACKENDS:
            assert op.reason(backend) == "", f"{op.name} on {backend}: {op.reason(backend)}"
    assert len(BACKENDS) == 3


def _random_seed(rng: np.random.Generator) -> Seed:
    return Seed(
        active_kernel_id=int(rng.integers(0, 2**63 - 1)),
        alpha_blend=F(rng.choice(_ALPHAS)),
        alpha_target=F(rng.choice([a for a in _ALPHAS if a == a])),
        alpha_step=F(rng.choice(_STRIDES)),
        health_accumulator=F(rng.uniform()),
        last_update_epoch=int(rng.integers(0, 100)),
        exec_latency_us=int(rng.choice(_EDGES)),
        error_count=int(rng.choice(_EDGES)),
        state_timer=int(rng.choice(_EDGES)),
        lifecycle_states=int(rng.integers(0, 8)),
        fallback_active=bool(rng.integers(0, 2)),
        health_sample=F(rng.choice(_SAMPLES)),
        fault_flags=int(rng.choice([0, 0, 1, 255])),
    )


def _storage(seeds: list[Seed]) -> Tensor:
    storage = torch.zeros(layout_of(len(seeds)).total_bytes, dtype=torch.uint8)
    for name, field in views(storage, len(seeds)).items():
        for row, seed in enumerate(seeds):
            field[row] = getattr(seed, name).item() if isinstance(getattr(seed, name), F) else getattr(seed, name)
    return storage.to(DEVICE)


def _bits(value: object) -> int:
    return int(np.asarray(value, np.float32).view(np.uint32)) if isinstance(value, F) else int(value)  # type: ignore[call-overload]


def _compare(storage: Tensor, seeds: list[Seed]) -> None:
    for name, field in views(storage.cpu(), len(seeds)).items():
        got = (field.view(torch.int32) if field.dtype == torch.float32 else field).tolist()
        want = [_bits(getattr(seed, name)) for seed in seeds]
        if field.dtype == torch.float32:
            got = [value & 0xFFFFFFFF for value in got]
            # NaN is one value to the model, whatever its bit pattern.
            nans = [row for row, seed in enumerate(seeds) if np.isnan(getattr(seed, name))]
            assert all(np.isnan(field[row].item()) for row in nans), name
            got = [0 if row in nans else value for row, value in enumerate(got)]
            want = [0 if row in nans else value for row, value in enumerate(want)]
        assert got == want, name


@pytest.mark.parametrize("backend", BACKENDS)
@given(rng_seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 40), steps=st.integers(1, 4))
@settings(max_examples=25)
def test_steps_follow_the_model(backend: str, rng_seed: int, rows: int, steps: int) -> None:
    rng = np.random.default_rng(rng_seed)
    seeds = [_random_seed(rng) for _ in range(rows)]
    storage = _storage(seeds)
    step = lattice_step.backend(backend)
    for epoch in range(100, 100 + steps):
        before = [seed.lifecycle_states for seed in seeds]
        with np.errstate(all="ignore"):
            for seed in seeds:
                seed.step(epoch)
        changed = step(storage, rows, epoch)
        assert changed in (-1, sum(old != seed.lifecycle_states for old, seed in zip(before, seeds, strict=True)))
        _compare(storage, seeds)


@pytest.mark.parametrize("rows", SIZES)
def test_sizes_off_the_block_agree_and_stay_inside(rows: int) -> None:
    rng = np.random.default_rng(rows)
    seeds = [_random_seed(rng) for _ in range(rows)]
    start = _storage(seeds)
    margin = 4096
    images: dict[str, Tensor] = {}
    for backend in BACKENDS:
        # Guard bytes on both sides: an overrun would change them.
        guarded = torch.full((start.numel() + 2 * margin,), 0xA5, dtype=torch.uint8, device=DEVICE)
        storage = guarded[margin : margin + start.numel()]
        storage.copy_(start)
        for epoch in (7, 8):
            lattice_step.backend(backend)(storage, rows, epoch)
        assert bool((guarded[:margin] == 0xA5).all() and (guarded[margin + start.numel() :] == 0xA5).all()), backend
        padding = torch.ones(start.numel(), dtype=torch.bool, device=DEVICE)
        for name, dtype in FIELDS.items():
            begin = layout_of(rows).offsets[name]
            padding[begin : begin + rows * dtype.itemsize] = False
        assert not storage[padding].any(), f"{backend} wrote to the padding, which is part of the checksum"
        images[backend] = storage
    for backend, image in images.items():
        for name, field in views(image, rows).items():
            other = views(images["reference"], rows)[name]
            same = (field == other) | (field.isnan() & other.isnan()) if field.is_floating_point() else field == other
            assert bool(same.all()), (backend, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("busy", [None, 300, 699])
def test_idle_rows_are_left_alone(backend: str, busy: int | None) -> None:
    """Whatever bits they hold; also where a row beside them, for whose sake theirs are read as well, has work."""
    rows = 700
    rng = np.random.default_rng(1)
    seeds = [_random_seed(rng) for _ in range(rows)]
    for seed in seeds:
        seed.lifecycle_states = int(rng.choice([model.DORMANT, model.LOADING, model.ERROR_RECOVERY, 9, 255]))
        seed.fault_flags, seed.health_sample = 0, F("nan")
    if busy is not None:
        seeds[busy].lifecycle_states, seeds[busy].error_count = model.ACTIVE, model.INT32_MAX
        seeds[busy].fault_flags, seeds[busy].health_sample = 1, F(0.5)
    storage = _storage(seeds)
    # A NaN that arithmetic would make another one.
    views(storage, rows)["alpha_blend"].view(torch.int32)[::7] = 0x7FC12345
    before = storage.clone()
    lattice_step.backend(backend)(storage, rows, 5)
    for name, field in views(storage, rows).items():
        changed = (field.view(torch.uint8) != views(before, rows)[name].view(torch.uint8)).view(rows, -1).any(1)
        assert set(changed.nonzero().flatten().tolist()) <= {busy}, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_unknown_states_are_left_alone(backend: str) -> None:
    """A state that a bit error made (8 and above) belongs to no set, whatever its low bits are."""
    storage = torch.zeros(layout_of(256).total_bytes, dtype=torch.uint8, device=DEVICE)
    fields = views(storage, 256)
    fields["lifecycle_states"].copy_(torch.arange(256, dtype=torch.int32).to(torch.uint8))
    fields["alpha_target"].fill_(1.0)
    fields["alpha_step"].fill_(0.25)
    fields["health_sample"].fill_(torch.nan)
    lattice_step.backend(backend)(storage, 256, 1)
    moved = fields["alpha_blend"].nonzero().flatten().tolist()
    assert moved == sorted(model.AWAKE)
    indices, count = _compact(backend, storage, 256)
    assert indices[: int(count)].tolist() == sorted(model.AWAKE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strides", [1, 2, 3, 7, 10, 100, 1000])
@pytest.mark.parametrize("goal", [0.3, 1.0])
def test_a_ramp_of_n_strides_takes_n_steps(backend: str, strides: int, goal: float) -> None:
    if backend == "triton" and DEVICE == "cpu":
        strides = min(strides, 10)  # the interpreter takes milliseconds a launch
    storage = torch.zeros(layout_of(1).total_bytes, dtype=torch.uint8, device=DEVICE)
    fields = views(storage, 1)
    fields["lifecycle_states"].fill_(model.GRAFTING)
    fields["alpha_target"].fill_(goal)
    fields["alpha_step"].fill_(F(goal) / F(strides))
    fields["health_sample"].fill_(torch.nan)
    for done in range(strides):
        assert int(fields["lifecycle_states"]) == model.GRAFTING, f"arrived after {done} of {strides}"
        lattice_step.backend(backend)(storage, 1, done)
    assert float(fields["alpha_blend"]) == F(goal)
    assert int(fields["lifecycle_states"]) == model.ACTIVE


def _compact(backend: str, storage: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    indices = torch.full((rows,), 12345, dtype=torch.int32, device=DEVICE)
    count = torch.full((1,), 12345, dtype=torch.int32, device=DEVICE)
    lattice_compact.backend(backend)(storage, rows, indices, count)
    return indices, count


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [*SIZES, 2047, 2048, 2049, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_compact_gives_the_awake_rows_in_order(backend: str, rows: int, share: float) -> None:
    rng = np.random.default_rng(rows)
    asleep = [model.DORMANT, model.LOADING, model.ERROR_RECOVERY, model.CULLED]
    awake = rng.random(rows) < share
    states = np.where(awake, rng.choice(sorted(model.AWAKE), rows), rng.choice(asleep, rows)).astype(np.uint8)
    storage = torch.zeros(layout_of(rows).total_bytes, dtype=torch.uint8, device=DEVICE)
    views(storage, rows)["lifecycle_states"].copy_(torch.from_numpy(states))
    indices, count = _compact(backend, storage, rows)
    want = np.flatnonzero(awake).tolist()
    assert int(count) == len(want)
    assert indices.tolist() == want + [-1] * (rows - len(want))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compact_of_more_blocks_than_are_counted_at_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 512 * 2048 + 3
    if DEVICE == "cpu":  # as many blocks would take the interpreter a quarter of a minute
        monkeypatch.setattr(kernels, "_COUNTS", triton.language.constexpr(4))
        rows = 9 * 2048 + 3
    awake = np.random.default_rng(0).random(rows) < 0.3
    storage = torch.zeros(layout_of(rows).total_bytes, dtype=torch.uint8, device=DEVICE)
    views(storage, rows)["lifecycle_states"].copy_(torch.from_numpy(np.where(awake, model.ACTIVE, model.CULLED)))
    indices, count = _compact(backend, storage, rows)
    want = np.flatnonzero(awake)
    assert int(count) == len(want)
    assert np.array_equal(indices[: len(want)].cpu().numpy(), want)
    assert bool((indices[len(want) :] == -1).all())


def test_plain_crc_gives_the_published_check_values() -> None:
    """RFC 3720, appendix B.4 (bytes in the order they are sent there), and the usual check string."""
    assert model.crc32c(b"123456789") == 0xE3069283
    assert model.crc32c(bytes(32)) == 0x8A9136AA
    assert model.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert model.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("rows", [0, 1, 2, 17, 64, 65, 300])
def test_crc_is_that_of_the_fields_in_order(rows: int) -> None:
    rng = np.random.default_rng(rows)
    storage = _storage([_random_seed(rng) for _ in range(rows)])
    fields = views(storage.cpu(), rows)
    message = b"".join(model.padded(fields[name].numpy().tobytes()) for name in PERSISTENT)
    want = model.crc32c(message)
    assert {backend: lattice_crc.backend(backend)(storage, rows) for backend in BACKENDS} == dict.fromkeys(
        BACKENDS, want
    )


def test_crc_sees_every_persistent_field_and_no_other() -> None:
    storage = _storage([_random_seed(np.random.default_rng(0)) for _ in range(5)])
    crc = lattice_crc(storage, 5)
    for name in FIELDS:
        changed = storage.clone()
        views(changed, 5)[name].view(torch.uint8)[-1:].bitwise_xor_(1)
        assert (lattice_crc(changed, 5) != crc) == (name in PERSISTENT), name


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 63, 4096, 4097])
def test_both_c_versions_of_the_crc_agree_at_any_length(size: int) -> None:
    module = native.load()
    assert module is not None, native.reason()
    data = np.random.default_rng(size).integers(0, 256, size + 1, dtype=np.uint8)
    want = model.crc32c(data[:size].tobytes())
    assert module.lattice_crc_cpu(data.ctypes.data, size, True) == want
    assert module.lattice_crc_cpu(data.ctypes.data, size, False) == want


def test_powers_of_x_add_up() -> None:
    for a, b in [(0, 0), (1, 31), (32, 32), (1000, 24)]:
        assert crc32c.multiply(crc32c.power(a), crc32c.power(b)) == crc32c.power(a + b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_snapshot_is_the_persistent_range(backend: str) -> None:
    rows = 77
    storage = _storage([_random_seed(np.random.default_rng(3)) for _ in range(rows)])
    size = layout_of(rows).persistent_bytes
    out = torch.full((size,), 9, dtype=torch.uint8, pin_memory=DEVICE == "cuda")
    lattice_snapshot.backend(backend)(storage, rows, out)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(out, storage[:size].cpu())
    assert set(views(out, rows)) == set(PERSISTENT)


def test_layout_has_no_overlap_and_every_field_aligned() -> None:
    for rows in SIZES:
        layout = layout_of(rows)
        end = 0
        for name, dtype in FIELDS.items():
            assert layout.offsets[name] == end and end % 64 == 0
            end += -(-rows * dtype.itemsize // 64) * 64
        assert end == layout.total_bytes


@pytest.mark.parametrize("rows", [-1, 2**31])
def test_impossible_sizes_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=str(rows)):
        layout_of(rows)
