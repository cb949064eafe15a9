"""Families of causal language models of transformers, each tried on two ranks; `make families` tries all of them."""

from __future__ import annotations

import pytest

from tests.families.small import SOME
from tests.families.trial import Trial, try_families

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trial]:
    return {trial.model_type: trial for trial in try_families(SOME, str(tmp_path_factory.mktemp("families")))}


@pytest.mark.parametrize("name", SOME)
def test_a_family_loads_trains_and_goes_back_to_transformers(trials: dict[str, Trial], name: str) -> None:
    """Bit-equal logits from its directory and after its export, and a step of two ranks that is that of one."""
    assert trials[name].fine, trials[name]
