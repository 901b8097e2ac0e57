"""The autoencoder: whole, in strips, and a preview without it."""

from .vae import Vae

__all__ = ["Vae"]
