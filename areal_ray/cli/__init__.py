"""The command line: train, submit, verify-resume, chaos, ckpt. Imports everything below, when a command needs it."""
