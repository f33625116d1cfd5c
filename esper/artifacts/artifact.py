"""An artifact opened: every claim checked against the bytes, then the tensors handed out without a copy.

Order of the checks: size, outer form, signatures, manifest, hashes, blueprint, tensors against what the blueprint
needs, finite values. No tensor or binary is handed out, and nothing is computed from one, before its hash agreed.

PyTorch is loaded when the first artifact is opened, not with this module: much that reads artifacts never opens one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from esper.artifacts.head import (
    DEFAULT_MAX_BYTES,
    check_declared,
    hash_file,
    manifest_text,
    read_bytes,
    read_manifest,
    same_names,
    signatures_of,
)
from esper.artifacts.keyring import KeyRing, TrustedKeys
from esper.artifacts.text import describe_manifest
from esper.artifacts.trust import SignatureCheck, check_signatures, decide, resolve_policy, why_untrusted
from esper.blueprints.canonical import blueprint_hash
from esper.blueprints.families import Family, match
from esper.blueprints.ir import Blueprint, from_json
from esper.blueprints.validation import Resolved, validate
from esper.contracts import container
from esper.contracts.container import Container
from esper.contracts.errors import ArtifactError, BlueprintError
from esper.contracts.ids import ArtifactId, kernel_id
from esper.contracts.manifest import BinaryEntry, Manifest

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULT_MAX_BYTES", "Artifact", "Binary", "hash_file", "read_bytes", "read_manifest"]

#: Elements looked at in one call: too few for torch to spread over the cores, which belong to the training.
_PIECE: Final = 1 << 15
#: How many checked blueprints are remembered, and how long the JSON of one may be.
_CHECKED_KEPT: Final = 256
_CHECKED_TEXT: Final = 1 << 14

#: By text, hash and sizes. Both values are frozen, so all artifacts may share them.
_checked: dict[tuple[str, str, int, int], tuple[Blueprint, Resolved]] = {}


@dataclass(frozen=True, slots=True)
class Binary:
    """A GPU binary that a trusted key vouches for.

    Attributes:
        name: Of its tensor in the file.
        entry: What the manifest says about it.
        data: Its bytes, a read-only view of the file's; not aligned to anything.
    """

    name: str
    entry: BinaryEntry
    data: memoryview


class Artifact:
    """One artifact, verified. Make one with :meth:`open`.

    Attributes:
        manifest: What the artifact says about itself; all that can be checked was checked.
        blueprint: Its blueprint, parameters baked in.
        resolved: The blueprint at the artifact's ``d_in`` and ``d_out``: widths and tensor shapes.
        sha256: SHA-256 of the file, 64 hex digits.
        nbytes: Length of the file in bytes.
        signatures: Every signature in the file and what became of it.
        trusted: Whether a trusted key signed it.
    """

    def __init__(
        self,
        data: bytes | bytearray,
        held: Container,
        manifest: Manifest,
        sha256: str,
        signatures: Sequence[SignatureCheck] = (),
    ) -> None:
        self._data = data
        self._container = held
        self.signatures = tuple(signatures)
        self.trusted = any(check.trusted for check in self.signatures)
        self.manifest = manifest if self.trusted else _with_note(manifest, self.signatures)
        self.sha256 = sha256
        self.nbytes = held.size
        self.blueprint, self.resolved = _check_blueprint(manifest)
        _check_needed(self.resolved, manifest)

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str] | bytes | bytearray | memoryview,
        trusted_keys: TrustedKeys = None,
        *,
        policy: str | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> Artifact:
        """Read and verify an artifact; nothing in it is ever executed, imported or unpickled.

        Args:
            source: A path, or the file's bytes.
            trusted_keys: Keys whose GPU binaries may be used: a :class:`~esper.artifacts.KeyRing`, keys, or paths and
                texts as :meth:`KeyRing.load <esper.artifacts.KeyRing.load>` takes them. None means
                ``ESPER_TRUSTED_KEYS``, read only if there is a signature to check.
            policy: ``standard``: weights and blueprint are vouched for by their hashes, binaries that no trusted key
                signed are ignored, with the reason in :attr:`notes`. ``strict``: an artifact that no trusted key
                signed is refused. None means ``ESPER_TRUST_POLICY``, else ``standard``.
            max_bytes: Largest file accepted; checked before anything is read.

        Returns:
            The artifact. Peak memory is at most twice the file's size (once, when opened from a path).

        Raises:
            ArtifactError: whatever the bytes, if they are not a sound artifact; the message says what was found. A
                signature that names a trusted key and does not verify is always one.
            TrustError: the trusted keys or the policy, not the artifact, are at fault.
        """
        if isinstance(source, bytes):
            return cls._verify(source, "the artifact", max_bytes, trusted_keys, policy)
        if isinstance(source, (bytearray, memoryview)):
            # The caller could still change these after the check.
            return cls._verify(bytes(source), "the artifact", max_bytes, trusted_keys, policy)
        return cls._verify(read_bytes(Path(source), max_bytes), str(source), max_bytes, trusted_keys, policy)

    @classmethod
    def adopt(
        cls,
        data: bytes | bytearray,
        *,
        sha256: str | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        trusted_keys: TrustedKeys = None,
        policy: str | None = None,
        seen: bool = False,
    ) -> Artifact:
        """As :meth:`open`, for bytes that the caller gives away: of a bytearray the tensors are views, without a copy.

        Args:
            data: The file's bytes; nobody else may write to them.
            sha256: Their SHA-256 where the caller has just computed it.
            max_bytes: Largest file accepted.
            trusted_keys: As for :meth:`open`.
            policy: As for :meth:`open`.
            seen: Bytes with this ``sha256`` were opened before: what depends on them alone and takes time, the tensors'
                hashes and whether their values are finite, is not looked at again. The hashes are all the same where a
                trusted signature rests on them: whoever can write to a cache can write its ``sha256`` too.
        """
        return cls._verify(data, "the artifact", max_bytes, trusted_keys, policy, sha256, seen)

    @classmethod
    def _verify(
        cls,
        data: bytes | bytearray,
        what: str,
        max_bytes: int,
        trusted_keys: TrustedKeys,
        policy: str | None,
        sha256: str | None = None,
        seen: bool = False,
    ) -> Artifact:
        policy = resolve_policy(policy)
        try:
            if len(data) > max_bytes:
                raise ArtifactError(f"{len(data)} bytes are more than the limit of {max_bytes}")
            view = memoryview(data)
            held = container.parse(view, len(data))
            text = manifest_text(held)
            signatures = signatures_of(held)
            # Nobody pays for reading keys where there is nothing to check with them.
            keys = KeyRing.of(trusted_keys) if signatures else KeyRing()
            checks = check_signatures(text, signatures, keys)
            decide(checks, policy)
            manifest = Manifest.from_json(text)
            check_declared(held, manifest)
            # A signature vouches for the manifest, and only the manifest's hashes for what else is in the file.
            if not seen or any(check.trusted for check in checks):
                _check_hashes(view, held, manifest)
            artifact = cls(data, held, manifest, sha256 or hashlib.sha256(view).hexdigest(), checks)
            if not seen:
                artifact._check_finite()
        except ArtifactError as error:
            raise ArtifactError(f"{what}: {error}") from None
        return artifact

    @cached_property
    def artifact_id(self) -> str:
        """``<blueprint hash>-<target>-<pipeline>-<version hash>``; any change of a byte changes it."""
        m = self.manifest
        return str(ArtifactId.of(m.blueprint_hash, m.target, m.pipeline, self.sha256))

    @property
    def kernel_id(self) -> int:
        """First 63 bits of the file's SHA-256: what the lattice stores."""
        return kernel_id(self.sha256)

    @cached_property
    def family(self) -> Family:
        """The fused family that runs the blueprint, matched by this version of the package."""
        return match(self.blueprint)

    @property
    def d_in(self) -> int:
        """Features the sub-network reads."""
        return self.manifest.d_in

    @property
    def d_out(self) -> int:
        """Features the sub-network changes."""
        return self.manifest.d_out

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by name (``<node>.weight``, ``<node>.bias``), on the CPU, as views of the file's bytes.

        All calls give views of the same memory: copy before writing.
        """
        import torch

        data = self._writable
        return {
            name: torch.frombuffer(
                data,
                dtype=getattr(torch, span.dtype),
                count=(span.end - span.begin) // container.ITEMSIZES[span.dtype],
                offset=span.begin,
            ).view(span.shape)
            for name, span in ((name, self._container.tensors[name]) for name in self.manifest.tensors)
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """What was passed over and why: GPU binaries that no trusted key signed."""
        return self.manifest.notes

    @property
    def binaries(self) -> tuple[Binary, ...]:
        """The GPU binaries, by name; none unless a trusted key signed the artifact (:attr:`notes` says why)."""
        if not self.trusted:
            return ()
        view = memoryview(self._data).toreadonly()
        spans = self._container.tensors
        return tuple(
            Binary(name, entry, view[spans[name].begin : spans[name].end])
            for name, entry in sorted(self.manifest.binaries.items())
        )

    @cached_property
    def _writable(self) -> bytearray:
        # torch warns about memory it could write to but must not; one copy, made once, buys safe tensors from bytes.
        if isinstance(self._data, bytes):
            self._data = bytearray(self._data)
        return self._data

    def _check_finite(self) -> None:
        import torch

        for name, tensor in self.tensors().items():
            for piece in torch.split(tensor.view(-1), _PIECE):
                # aminmax passes NaN on and allocates nothing, where isfinite would make a mask of every tensor.
                low, high = torch.aminmax(piece)
                if not (math.isfinite(low) and math.isfinite(high)):
                    raise ArtifactError(f"tensor {name!a} has values that are NaN or infinite")

    def __repr__(self) -> str:
        return f"Artifact({self.artifact_id}, {describe_manifest(self.manifest)})"


def _with_note(manifest: Manifest, signatures: Sequence[SignatureCheck]) -> Manifest:
    """The manifest with a note on the binaries that nobody trusted vouches for; what it declares stays on record."""
    if not manifest.binaries:
        return manifest
    count = len(manifest.binaries)
    note = f"{count} GPU {'binary is' if count == 1 else 'binaries are'} ignored: {why_untrusted(signatures)}"
    return replace(manifest, notes=(*manifest.notes, note))


def _check_hashes(view: memoryview, held: Container, manifest: Manifest) -> None:
    """Every tensor and binary has the SHA-256 that the manifest says, trusted or not."""
    for kind, entries in (("tensor", manifest.tensors), ("binary", manifest.binaries)):
        for name, entry in entries.items():
            span = held.tensors[name]
            found = hashlib.sha256(view[span.begin : span.end]).hexdigest()
            if found != entry.sha256:
                raise ArtifactError(
                    f"{kind} {name!a}: SHA-256 is {found}, the manifest says {entry.sha256}: the file was altered"
                )


def _check_blueprint(manifest: Manifest) -> tuple[Blueprint, Resolved]:
    """The manifest's blueprint, checked; the same one at the same sizes is checked once.

    Many artifacts hold one blueprint with other weights, and checking it costs a third of opening a small artifact.
    """
    key = json.dumps(manifest.blueprint), manifest.blueprint_hash, manifest.d_in, manifest.d_out
    known = _checked.get(key)
    if known is None:
        known = _check_anew(manifest)
        if len(key[0]) <= _CHECKED_TEXT:
            if len(_checked) >= _CHECKED_KEPT:
                _checked.clear()
            _checked[key] = known
    return known


def _check_anew(manifest: Manifest) -> tuple[Blueprint, Resolved]:
    try:
        blueprint = from_json(manifest.blueprint)
        found = blueprint_hash(blueprint)
        if found != manifest.blueprint_hash:
            raise ArtifactError(f"the blueprint's hash is {found}, the manifest says {manifest.blueprint_hash}")
        return blueprint, validate(blueprint, manifest.d_in, manifest.d_out)
    except BlueprintError as error:
        raise ArtifactError(f"the blueprint does not hold: {error}") from error


def _check_needed(resolved: Resolved, manifest: Manifest) -> None:
    """The tensors are those the blueprint needs at these sizes, no more and no fewer."""
    same_names(manifest.tensors, resolved.tensors, "in the file", "in the blueprint")
    for name, shape in resolved.tensors.items():
        found = manifest.tensors[name].shape
        if found != shape:
            raise ArtifactError(
                f"tensor {name!a} has shape {list(found)}; the blueprint needs {list(shape)} "
                f"with d_in={manifest.d_in}, d_out={manifest.d_out}"
            )
