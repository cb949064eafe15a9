"""Questions and messages to a Ray cluster, outside of Ray Train; the wall around Ray's internals (ray_internals.py).

Imports run and distributed (RankError).

Nothing is imported here: the driver asks whether a cluster answers before Ray may be imported.
"""
