"""Weights: files, tensor names in both layouts, checkpoints, LoRA, and layers on the device."""

from .store import LayerStore

__all__ = ["LayerStore"]
