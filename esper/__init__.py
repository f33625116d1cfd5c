"""Esper lets a PyTorch network grow while it trains."""
