"""A training job for Ray clusters that survives losing its workers and continues the same run bit for bit."""

__version__ = "0.1.0"
