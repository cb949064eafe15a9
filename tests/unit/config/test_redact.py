"""Secrets are known by the names of their keys."""

import pytest

from areal_ray.config.redact import redact, redact_override

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "key",
    [
        "passphrase", "private_key", "apikey", "api-key", "pwd", "auth", "bearer", "dsn", "secretKey", "authToken",
        "cookie", "WANDB_API_KEY", "HF_TOKEN", "db.password", "sessionTokens", "Authorization", "x-api-key", "apiKey",
    ],
)  # fmt: skip
def test_names_of_secrets(key):
    assert redact({key: "hidden"}) == {key: "***"}
    assert "hidden" not in redact_override(f"a.{key}=hidden")


@pytest.mark.parametrize("text", ["2026-13-45", "2026-11-27", "a=b", "${run.name}", ""])
def test_values_are_read_as_the_configuration_reads_them(text):
    """PyYAML knows dates, and refuses what looks like a wrong one."""
    assert redact_override(f"data.path={text}") == f"data.path={text}"


@pytest.mark.parametrize(
    "key", ["author", "tokenizer", "eos_token", "max_tokens", "num_key_value_heads", "keys", "bearing", "path", "key"]
)
def test_names_of_what_is_no_secret(key):
    value = 5 if key == "max_tokens" else "shown"
    assert redact({key: value}) == {key: value}
