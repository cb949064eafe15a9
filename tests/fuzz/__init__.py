"""A mutational fuzzer over checkpoints, what stands beside them in a run directory, and configurations.

`make fuzz N=20000 SEED=0`; a case is a pure function of the seed and its number: `make fuzz CASE=17` repeats one.
"""
