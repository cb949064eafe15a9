"""Names of the metrics that every run has; an objective's own have other names."""

# What the clock says: equal runs differ in it.
CLOCK = ("time", "tokens_per_s", "step_time_s", "data_s", "evaluation_s", "save_s", "left_s")
RESERVED = ("step", "loss", "grad_norm", "lr", "epoch", "samples", "tokens", "skipped", *CLOCK)
HELD_OUT = ("held_out_", "held_out/")  # how names of evaluations begin: of what is held out, and of sets by their names
