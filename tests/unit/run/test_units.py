import pytest

from areal_ray.run.units import size_text, span_text

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (36.8e6, "36.8 MB"), (2.5e12, "2.5 TB")])
def test_sizes(size, text):
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(37.4, "37 s"), (99.6, "100 s"), (720, "12 min"), (12000, "3 h 20 min"), (187200, "2 d 4 h")]
)
def test_times(seconds, text):
    assert span_text(seconds) == text
