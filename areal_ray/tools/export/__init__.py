"""A checkpoint as a Hugging Face directory: config, tokenizer, weights, and what others need to serve it."""

from areal_ray.tools.export.directory import Exported, export

__all__ = ["Exported", "export"]
