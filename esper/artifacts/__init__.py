"""Artifacts: packing and opening them, and folders that keep them.

Between the blueprints and contracts below and execution and services above: both of those open artifacts, neither may
import the other.
"""

from esper.artifacts.artifact import Artifact, Binary
from esper.artifacts.file_registry import FileRegistry
from esper.artifacts.keyring import KeyRing
from esper.artifacts.keys import PublicKey, SigningKey
from esper.artifacts.locate import open_registry
from esper.artifacts.pack import pack

__all__ = ["Artifact", "Binary", "FileRegistry", "KeyRing", "PublicKey", "SigningKey", "open_registry", "pack"]
