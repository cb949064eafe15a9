"""Checks of minutes each on clusters of their own, beside the suite: `make clusters`."""
