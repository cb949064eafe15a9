"""A checkpoint as a Hugging Face directory: config, tokenizer, weights, and what others need to serve it."""

from areal_ray.tools.export.directory import DTYPES, Exported, Form, export
from areal_ray.tools.export.tokens import TokenNames

__all__ = ["DTYPES", "Exported", "Form", "TokenNames", "export"]
