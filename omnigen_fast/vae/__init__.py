"""The autoencoder: whole or in strips, and previews without it."""

from .vae import Vae

__all__ = ["Vae"]
