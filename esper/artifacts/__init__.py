"""Artifacts: packing and opening them, and folders that keep them.

Between the blueprints and contracts below and execution and services above: both of those open artifacts, neither may
import the other.
"""

from esper.artifacts.artifact import Artifact
from esper.artifacts.file_registry import FileRegistry
from esper.artifacts.locate import open_registry
from esper.artifacts.pack import pack

__all__ = ["Artifact", "FileRegistry", "open_registry", "pack"]
