"""Contracts: file formats, ids, errors and protocols that the parts of Esper share; no torch, no I/O."""
