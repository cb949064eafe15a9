"""Names of the metrics that every run has; an objective's own have other names.

loss, grad_norm: means over the steps of a line. lr: of its last step. epoch: passes over the data that are complete.
samples, tokens: so far, from the beginning of the run; tokens are positions of rows, padding among them.
time: of the line, in seconds since 1970. counted_share: of the time since the job was submitted, that went into steps
that stand. left_s: until the last step. Seconds a step: step_time_s, of which rank 0 waited for batches in data_s and
the rest is compute_s; beside it evaluation_s and save_s. tokens_per_s: without padding, of all workers and
tokens_per_s_per_worker; padding_share: of the positions, where there is any. mfu: share of the device's peak that the
operations of the model take, see `areal_ray.models.operations`; absent where one of the two is not known.
memory_peak_bytes: the most that a worker has taken since it was started, and memory_peak_rank: which one.
"""

# What the clock says, or what the workers of one start have counted: equal runs differ in it.
TIMES = ("time", "step_time_s", "data_s", "compute_s", "evaluation_s", "save_s", "left_s", "counted_share")
SPEEDS = ("tokens_per_s", "tokens_per_s_per_worker", "padding_share", "mfu", "memory_peak_bytes", "memory_peak_rank")
CLOCK = (*TIMES, *SPEEDS)
RESERVED = ("step", "loss", "grad_norm", "lr", "epoch", "samples", "tokens", "skipped", *CLOCK)
HELD_OUT = ("held_out_", "held_out/")  # how names of evaluations begin: of what is held out, and of sets by their names
