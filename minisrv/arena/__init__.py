"""Memory that can be released and restored while the addresses of its tensors stay."""

from minisrv.arena.base import Arena
from minisrv.arena.cpu import CPUArena

__all__ = ["Arena", "CPUArena"]
