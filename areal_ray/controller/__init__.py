"""Ray Train's controller, extended: worker group, placement, rendezvous, scaling and failure policy.

The only folder that subclasses ray.train.v2._internal. Imports train (exceptions), checkpoint, cluster and run.
"""
