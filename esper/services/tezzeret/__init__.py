"""Tezzeret: compiles blueprints into artifacts."""
