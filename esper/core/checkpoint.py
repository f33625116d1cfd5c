"""``esper.save``, ``esper.load`` and ``esper.restore``: a grown network in one file that rebuilds itself.

The file is safetensors: the entries of the model's ``state_dict`` (host, grafts, lattice) under their own names, and a
manifest in the metadata that tells what stands where: layers, woken seeds with their blueprints and artifact ids, a
SHA-256 of every tensor and the lattice's CRC. Nothing in it is ever unpickled. A file that does not fit, wholly and
exactly, is refused with the reason before the host is touched.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from esper.blueprints.families import match
from esper.blueprints.ir import from_json
from esper.blueprints.validation import validate
from esper.contracts.bus import Bus
from esper.contracts.errors import EsperError
from esper.contracts.manifest import Manifest
from esper.contracts.registry import RegistryClient
from esper.core.checkpoint_format import (
    FORMAT_VERSION,
    CheckpointError,
    LayerRecord,
    Record,
    SeedRecord,
    read_record,
    write_record,
)
from esper.core.model_wrapper import MorphableModel, find_targets, grown_model, wrap
from esper.core.naming import GRAFT_PREFIX, is_lattices, seeds_prefix
from esper.execution.grafts.reservation import Tap
from esper.execution.kernel_executor import LoadedKernel
from esper.execution.lattice import Lattice
from esper.execution.lifecycle import AWAKE, SeedLifecycleState
from esper.execution.telemetry.options import TelemetryOptions

__all__ = ["FORMAT_VERSION", "CheckpointError", "load", "restore", "save"]

_MARKER = f"{GRAFT_PREFIX}."
#: More than any layer could use; what a file asks for beyond it is a damaged file's.
MAX_RESERVE_RANK = 65_536


def save(model: MorphableModel, path: str | os.PathLike[str]) -> None:
    """Write a grown network to ``path``, at once and whole or not at all.

    Call it between two training steps. The optimizer's state is the optimizer's: save its ``state_dict`` beside it.

    Args:
        model: The wrapped model, on any device.
        path: The file; one that is there is replaced.

    Raises:
        TypeError: ``model`` is not one that ``esper.wrap`` gave.
        CheckpointError: the host's state holds something that is no tensor (its modules' ``get_extra_state``), or a
            seed is awake without a kernel, or has one and is not awake; the message names it.
        OSError: the file cannot be written; what was there before still is.
    """
    model = grown_model(model, "save")
    state = dict(model.entries())
    seeds = _seeds_with_kernels(model, state[f"{_MARKER}lattice.lifecycle_states"].tolist())
    _keep_only(state, model, seeds)
    foreign = [f"{name} ({type(value).__name__})" for name, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise CheckpointError(
            f"the model's state holds what is no tensor and would need pickling: {', '.join(foreign)}"
        )
    tensors, aliases = _unshared(state)
    record = Record(
        version=FORMAT_VERSION,
        seeds_per_layer=model.lattice.seeds_per_layer,
        monitor_budget=model.monitor_budget,
        telemetry=any(layer.telemetry_enabled for layer in model.kasmina_layers.values()),
        reserve_rank=model.reserve_rank,
        reserve_tap=model.reserve_tap,
        layers=tuple(
            LayerRecord(name, type(layer.default_transform).__name__) for name, layer in model.kasmina_layers.items()
        ),
        seeds=tuple(_seed_records(model, seeds)),
        aliases=aliases,
        hashes={name: _sha256(tensor) for name, tensor in tensors.items()},
    )
    metadata = write_record(record)
    with _replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load(
    path: str | os.PathLike[str],
    host: nn.Module,
    *,
    registry: RegistryClient | str | os.PathLike[str] | None = None,
    cache_size_mb: int = 128,
    preserve_original: bool = False,
    bus: Bus | str | None = None,
    telemetry: TelemetryOptions | None = None,
    reserve_rank: int | None = None,
) -> MorphableModel:
    """Rebuild a grown network from a file and a fresh host; no registry is asked.

    Args:
        path: What :func:`save` wrote.
        host: A network built as the saved one's host was, with any weights; dtype and shapes must agree. Its device is
            the result's.
        registry: Where kernels that are woken from now on come from; as in ``esper.wrap``.
        cache_size_mb: As in ``esper.wrap``.
        preserve_original: As in ``esper.wrap``; False puts the result into ``host`` itself.
        bus: Where the model publishes its telemetry; as in ``esper.wrap``.
        telemetry: How it publishes; as in ``esper.wrap``.
        reserve_rank: As in ``esper.wrap``; None is what the saved network had. The file holds no reserved memory, only
            what seeds occupied of it, so another rank will do if every seed fits.

    Returns:
        The network as it was saved: weights, buffers, grafts, alphas, states, health. A load that was under way is
        forgotten: its seed is dormant.

    Raises:
        CheckpointError: the file is no checkpoint, is truncated or altered, is of an unknown version, or does not fit
            the host; the message says which, and names both shapes where shapes differ. ``host`` is as it was.
        FileNotFoundError: there is no such file.
        TypeError: ``host`` is no module, or is wrapped already.
    """
    if not isinstance(host, nn.Module) or isinstance(host, MorphableModel):
        kind = "a wrapped model" if isinstance(host, MorphableModel) else type(host).__name__
        raise TypeError(f"load needs the plain network that was wrapped, a torch.nn.Module, as its host; got {kind}")
    source = Path(path)
    record, tensors = _read(source)
    _check_host(source, record, tensors, host)
    _check_lattice(source, record, tensors)
    model = wrap(
        host,
        [layer.name for layer in record.layers],
        seeds_per_layer=record.seeds_per_layer,
        cache_size_mb=cache_size_mb,
        telemetry_enabled=record.telemetry,
        preserve_original=preserve_original,
        registry=registry,
        reserve_rank=_rank(source, record.reserve_rank) if reserve_rank is None else reserve_rank,
        reserve_tap=_tap(source, record.reserve_tap),
        bus=bus,
        monitor_budget=record.monitor_budget,
        telemetry=telemetry,
    )
    try:
        for seed in record.seeds:
            _bind(source, model, seed, _kernel(source, model, seed, tensors))
        _fill(source, model, tensors)
    except BaseException:
        _put_to_sleep(model)  # gives the host its own forwards back
        model.close()
        raise
    return model


def restore(model: MorphableModel, path: str | os.PathLike[str]) -> None:
    """Make of a wrapped model that is there what :func:`save` wrote: go back to a checkpoint, or go on from one.

    The model stays the same object, with its registry, bus, monitor and optimizers. Seeds get the file's kernels,
    weights, alphas and states; those that are awake and sleep in the file go to sleep; loads under way come to nothing.
    A seed that has the file's kernel already keeps its parameters, as objects, and so does the host: only their values
    change. An optimizer that is attached (:mod:`esper.optim`) follows; load its own state after this. Gradients stay.

    Call it between two training steps, with several ranks on each of them at the same step.

    Args:
        model: The wrapped model, on any device.
        path: What :func:`save` wrote, of a model with the same layers and as many seeds in each.

    Raises:
        TypeError: ``model`` is not one that ``esper.wrap`` gave.
        CheckpointError: as for :func:`load`, or the file is of a model with other layers or seeds, or a layer that has
            seeds there was replaced here; ``model`` is as it was. Only what no look at the file can foresee, such as
            memory that runs out, leaves it half restored, with those seeds asleep that had another kernel; the message
            then says so.
        FileNotFoundError: there is no such file.
    """
    model = grown_model(model, "restore")
    source = Path(path)
    record, tensors = _read(source)
    _check_model(source, record, model)
    _check_host(source, record, tensors, model.wrapped_model)
    _check_lattice(source, record, tensors)
    kernels = [_kernel(source, model, seed, tensors) for seed in record.seeds]
    for seed, kernel in zip(record.seeds, kernels, strict=True):
        try:
            layer = model.hosted_layer(seed.layer)
            layer.check_host()
            layer.grafts.check(seed.seed_idx, kernel)
        except (EsperError, ValueError) as error:
            raise CheckpointError(f"{source}: layer '{seed.layer}', seed {seed.seed_idx}: {error}") from None
    # Reserved memory is filled when a kernel is bound, and stays the same objects in any case.
    kept = {(s.layer, s.seed_idx) for s in record.seeds if not model.reserve_rank and _has_kernel_of(model, s)}
    _put_to_sleep(model, kept)
    try:
        for seed, kernel in zip(record.seeds, kernels, strict=True):
            if (seed.layer, seed.seed_idx) not in kept:
                _bind(source, model, seed, kernel)
        _fill(source, model, tensors)
    except CheckpointError as error:
        _put_to_sleep(model, kept)
        text = f"{error}. The model is half restored, and its other seeds sleep: restore again, or load"
        raise CheckpointError(text) from None
    except BaseException:
        _put_to_sleep(model, kept)
        raise


def _put_to_sleep(model: MorphableModel, kept: Collection[tuple[str, int]] = ()) -> None:
    """Reset all seeds but ``kept``, whose loads end too."""
    for name, layer in model.kasmina_layers.items():
        for seed_idx in range(layer.num_seeds):
            if (name, seed_idx) in kept:
                layer.overtake(seed_idx, "restored")
            else:
                layer.reset(seed_idx, "restored")


def _check_model(path: Path, record: Record, model: MorphableModel) -> None:
    """Refuse a file of a model with other layers or another number of seeds."""
    theirs, ours = [layer.name for layer in record.layers], list(model.kasmina_layers)
    if theirs != ours:
        odd = ", ".join(sorted(set(theirs) ^ set(ours))[:4]) or "they stand in another order"
        raise CheckpointError(f"{path}: the model has seeds in other layers than the file: {odd}")
    if record.seeds_per_layer != model.lattice.seeds_per_layer:
        raise CheckpointError(
            f"{path}: {record.seeds_per_layer} seeds a layer in the file, {model.lattice.seeds_per_layer} in the model"
        )


def _has_kernel_of(model: MorphableModel, seed: SeedRecord) -> bool:
    """Whether the seed is bound to the very kernel that the record names."""
    bound = seed.seed_idx in model.kasmina_layers[seed.layer].grafts.bound
    return bound and next(_seed_records(model, [(seed.layer, seed.seed_idx)])) == seed


def _seeds_with_kernels(model: MorphableModel, states: Sequence[int]) -> list[tuple[str, int]]:
    """Layer and index of every seed whose kernel goes into the file, checked against the states that go there."""
    found: list[tuple[str, int]] = []
    for index, (name, layer) in enumerate(model.kasmina_layers.items()):
        first = index * layer.num_seeds
        for seed_idx, number in enumerate(states[first : first + layer.num_seeds]):
            has_kernel = seed_idx in layer.grafts.bound
            # A GPU takes a seed at fault out by itself, and the model hears of it at one of its next steps.
            if has_kernel and number == SeedLifecycleState.ERROR_RECOVERY:
                continue
            if has_kernel != (number in AWAKE):
                state = SeedLifecycleState(number).name
                raise CheckpointError(
                    f"layer '{name}', seed {seed_idx} is {state} but has {'a' if has_kernel else 'no'} kernel: its "
                    "state was written past the model. Unload or reset the seed, then save"
                )
            if has_kernel:
                found.append((name, seed_idx))
    return found


def _keep_only(state: dict[str, Any], model: MorphableModel, seeds: Sequence[tuple[str, int]]) -> None:
    """Leave of the grafts' entries what ``seeds`` occupy, under the names they have in a network that grows."""
    prefixes = tuple(map(seeds_prefix, model.kasmina_layers))
    for key in [key for key in state if key.startswith(prefixes)]:
        del state[key]
    for name, seed_idx in seeds:
        for key, tensor in model.kasmina_layers[name].grafts.seed_tensors(seed_idx).items():
            state[f"{seeds_prefix(name)}{seed_idx}.{key}"] = tensor


def _rank(path: Path, rank: int) -> int:
    # Memory is set aside by it before anything else of the file is looked at.
    if not 0 <= rank <= MAX_RESERVE_RANK:
        raise CheckpointError(f"{path}: its reserve_rank is {rank}; need 0 to {MAX_RESERVE_RANK}")
    return rank


def _tap(path: Path, tap: str) -> Tap:
    if tap not in ("input", "output"):
        raise CheckpointError(f"{path}: its reserve_tap is {tap!r}, neither 'input' nor 'output'")
    return "input" if tap == "input" else "output"


def _seed_records(model: MorphableModel, seeds: Iterable[tuple[str, int]]) -> Iterator[SeedRecord]:
    for name, seed_idx in seeds:
        kernel = model.kasmina_layers[name].grafts.kernel(seed_idx)
        yield SeedRecord(
            layer=name,
            seed_idx=seed_idx,
            artifact_id=kernel.artifact_id,
            kernel_id=kernel.kernel_id,
            manifest=json.loads(kernel.manifest.to_json()),
        )


def _unshared(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The entries as contiguous CPU tensors, those that share all their memory once, and who shares with whom."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        # A copy even on the CPU: what is hashed is then what is written, whatever the training does meanwhile.
        tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).contiguous()
    return tensors, aliases


def _sha256(tensor: Tensor) -> str:
    # Bytes of any dtype, without a copy.
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(flat).hexdigest()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to that becomes ``path`` in one step when the block ends well, and vanishes otherwise."""
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist", str(path))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes a private file; the finished one gets the rights that any new file would.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> tuple[Record, dict[str, Tensor]]:
    """The file's record and all its tensors, every hash checked."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            record = read_record(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: no safetensors file, or a truncated one: {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if tensors.keys() != record.hashes.keys():
        odd = ", ".join(sorted(tensors.keys() ^ record.hashes.keys())[:4])
        raise CheckpointError(f"{path}: its tensors are not those of its manifest: {odd}")
    for name, tensor in tensors.items():
        if _sha256(tensor) != record.hashes[name]:
            raise CheckpointError(f"{path}: tensor {name!r} does not match its SHA-256: the file was altered")
    for alias, name in record.aliases.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: {alias!r} is said to share {name!r}, which is not there")
        tensors[alias] = tensors[name]
    return record, tensors


def _check_host(path: Path, record: Record, tensors: Mapping[str, Tensor], host: nn.Module) -> None:
    """Refuse what does not fit before anything is touched."""
    names = [layer.name for layer in record.layers]
    try:
        targets = find_targets(host, names) if names else {}
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: the host is another network: {error}") from None
    for layer in record.layers:
        found = type(targets[layer.name]).__name__
        if found != layer.host_type:
            raise CheckpointError(f"{path}: layer '{layer.name}' is a {layer.host_type} there, a {found} in the host")
    if list(targets) != names:
        raise CheckpointError(f"{path}: the host has the same layers in another order: {', '.join(targets)}")
    ours = host.state_dict()
    theirs = {name: tensor for name, tensor in tensors.items() if not name.startswith(_MARKER)}
    missing, surplus = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if missing or surplus:
        lacks = [f"the file lacks {', '.join(missing[:4])}"] if missing else []
        lacks += [f"the host lacks {', '.join(surplus[:4])}"] if surplus else []
        raise CheckpointError(f"{path}: the host is another network: {'; '.join(lacks)}")
    for name, own in ours.items():
        theirs_tensor = theirs[name]
        if own.shape != theirs_tensor.shape:
            shapes = f"{tuple(theirs_tensor.shape)} in the file, {tuple(own.shape)} in the host"
            raise CheckpointError(f"{path}: '{name}' has shape {shapes}")
        if own.dtype != theirs_tensor.dtype:
            raise CheckpointError(
                f"{path}: '{name}' is {theirs_tensor.dtype} in the file, {own.dtype} in the host; "
                f"convert the host first (host.to({theirs_tensor.dtype}))"
            )


def _kernel(path: Path, model: MorphableModel, seed: SeedRecord, tensors: Mapping[str, Tensor]) -> LoadedKernel:
    """A seed's kernel with its trained weights, checked against its blueprint."""
    where = f"{path}: layer '{seed.layer}', seed {seed.seed_idx}"
    if seed.layer not in model.kasmina_layers or not 0 <= seed.seed_idx < model.lattice.seeds_per_layer:
        raise CheckpointError(f"{where}: there is no such seed")
    prefix = f"{seeds_prefix(seed.layer)}{seed.seed_idx}."
    weights = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        manifest = Manifest.from_json(json.dumps(seed.manifest))
        blueprint = from_json(manifest.blueprint)
        needed = dict(validate(blueprint, manifest.d_in, manifest.d_out).tensors)
    except EsperError as error:
        raise CheckpointError(f"{where}: {error}") from None
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if found != needed:
        raise CheckpointError(f"{where}: its weights have shapes {found}, its blueprint needs {needed}")
    return LoadedKernel(
        artifact_id=seed.artifact_id,
        kernel_id=seed.kernel_id,
        blueprint=blueprint,
        family=match(blueprint),
        tensors=weights,
        d_in=manifest.d_in,
        d_out=manifest.d_out,
        manifest=manifest,
        nbytes=sum(tensor.nbytes for tensor in weights.values()),
    )


def _bind(path: Path, model: MorphableModel, seed: SeedRecord, kernel: LoadedKernel) -> None:
    layer = model.kasmina_layers[seed.layer]
    if not layer.commit(seed.seed_idx, kernel, alpha=0.0):
        raise CheckpointError(f"{path}: layer '{seed.layer}', seed {seed.seed_idx}: {layer.failure_of(seed.seed_idx)}")


def _check_lattice(path: Path, record: Record, tensors: Mapping[str, Tensor]) -> None:
    """The lattice's own checks (its CRC among them), and that awake seeds and kernels are the same seeds."""
    marker = f"{_MARKER}lattice."
    lattice = Lattice(len(record.layers), record.seeds_per_layer)
    try:
        lattice.load_state_dict(
            {
                name.removeprefix(marker): tensor
                for name, tensor in tensors.items()
                if name.startswith(marker) and is_lattices(name.removeprefix(_MARKER))
            }
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    bound = {(seed.layer, seed.seed_idx) for seed in record.seeds}
    for index, layer in enumerate(record.layers):
        for seed_idx in range(record.seeds_per_layer):
            state = lattice.layer(index).state_of(seed_idx)
            has_kernel = (layer.name, seed_idx) in bound
            if (state in AWAKE) != has_kernel:
                has = "a kernel" if has_kernel else "no kernel"
                raise CheckpointError(f"{path}: layer '{layer.name}', seed {seed_idx} is {state.name} but has {has}")


def _fill(path: Path, model: MorphableModel, tensors: Mapping[str, Tensor]) -> None:
    """Put in all weights and the lattice."""
    state = dict(tensors)
    if model.reserve_rank:
        # The seeds' weights are in place already: binding has copied them into the memory reserved for them.
        grafts = tuple(map(seeds_prefix, model.kasmina_layers))
        state = {name: tensor for name, tensor in state.items() if not name.startswith(grafts)}
        state |= {f"{_MARKER}{name}": tensor for name, tensor in model.esper.state_dict().items()}
    try:
        model.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from None
