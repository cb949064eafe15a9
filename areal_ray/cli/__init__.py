"""What one types: train, submit, verify-resume, chaos, ckpt. Imports everything below, when a command needs it."""
