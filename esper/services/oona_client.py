"""Oona's clients under their public name; see :mod:`esper.oona`, where lower layers find them too."""

from esper.oona import AsyncOonaClient, BusSettings, DeadLetter, OonaClient, Retention

__all__ = ["AsyncOonaClient", "BusSettings", "DeadLetter", "OonaClient", "Retention"]
