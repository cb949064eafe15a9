"""One rank under Ray Train: wires the objects, runs the loop, watches itself.

Imports train, engine, checkpoint, data, models, distributed, cluster and run.
"""
