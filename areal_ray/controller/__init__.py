"""Ray Train's controller, extended: worker group, placement, rendezvous, scaling and failure policy.

The only folder that subclasses ray.train.v2._internal; restart_policy, worker_count and failure_report do without and
serve Ray's own controller as well. Imports train (exceptions), checkpoint, cluster and run.
"""
