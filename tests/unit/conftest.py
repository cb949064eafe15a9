"""What all tests of this tier share."""

from hypothesis import settings

# The same examples every time, and none of them failed for being slow on a busy machine.
settings.register_profile("unit", deadline=None, derandomize=True)
settings.load_profile("unit")
