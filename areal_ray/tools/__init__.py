"""Runs and checkpoints seen from outside: ls, verify, digest, diff, export, verify-resume, chaos.

Imports checkpoint, data and run; chaos Ray, too.
"""
