"""Copies of the state in host memory: kept beside each rank and at a partner, found and restored after a failure.

`copies.py` takes them; `partners.py` sends them on; `search.py` finds the newest step of which all parts are left, and
`reshard.py` brings them to the ranks that need them. The idea is that of Gemini (Wang et al., SOSP 2023) and DLRover's
Flash Checkpoint.
"""

from areal_ray.checkpoint.memory.copies import MemoryCopies
from areal_ray.checkpoint.memory.partners import Partners
from areal_ray.checkpoint.memory.search import Copy, Version

__all__ = ["Copy", "MemoryCopies", "Partners", "Version"]
