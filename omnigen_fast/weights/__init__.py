"""Weights: files, names in both layouts, adapters, and where each layer lies."""

from .store import LayerStore

__all__ = ["LayerStore"]
