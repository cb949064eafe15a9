"""The algorithm: loop, evaluation, bad steps, recovery, tracking. Without Ray.

Imports engine, checkpoint, data, distributed and run.
"""
