"""Submitted jobs: what they take along, the job server, following and stopping them."""
