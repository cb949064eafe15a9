"""One run from beginning to end, in the process that was typed: preflight, connect, supervise, report.

Imports worker (by name), controller, cluster, processes, checkpoint, data, engine, models, distributed and run.
Nothing is imported here: hooks in this package run in every process of a job.
"""
