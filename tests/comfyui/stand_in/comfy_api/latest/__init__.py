"""The nodes' schema, version 3."""

from abc import ABC, abstractmethod

from . import io


class ComfyExtension(ABC):
    @abstractmethod
    async def get_node_list(self) -> list:
        """Classes of nodes."""


__all__ = ["ComfyExtension", "io"]
