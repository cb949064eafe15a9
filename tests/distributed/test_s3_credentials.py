"""Keys and tokens of object storage: where they come from, what is refused, and that nobody sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from areal_ray.cluster.failures import Cause
from areal_ray.config import Config
from areal_ray.driver.hints import hint
from areal_ray.run import RunDir
from areal_ray.storage import Storage, s3, storage_at
from areal_ray.storage.s3_client import with_environment
from tests.distributed.s3 import write
from tests.s3_proxy import S3Proxy
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    "uri",
    [
        "s3://me:hidden@runs/run",
        "s3://runs/run?secret_key=hidden",
        "s3://me:hidden@runs/run?region=here",
    ],
)
def test_credentials_and_options_in_a_path_are_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(ValueError, match="given apart from it") as caught:
        storage_at(uri, {})
    assert "hidden" not in str(caught.value)


def test_a_secret_with_a_slash_is_not_shown() -> None:
    with pytest.raises(ValueError, match="given apart") as caught:
        storage_at("s3://me:hid/den@runs/run", {})
    assert "hid/den" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://", "s3://runs/../run", "s3://runs//run"])
def test_a_path_that_is_no_place_in_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="is not a name inside a bucket"):
        storage_at(uri, {})


def test_a_bucket_has_a_name() -> None:
    with pytest.raises(ValueError, match="must be s3://bucket/prefix"):
        storage_at("s3:///run", {})


@pytest.mark.parametrize(
    ("wrong", "codes"),
    [
        ({"secret_key": "hidden"}, "ACCESS_DENIED|SIGNATURE_DOES_NOT_MATCH|SignatureDoesNotMatch"),
        ({"access_key": "hidden"}, "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|InvalidAccessKeyId"),
    ],
)
def test_wrong_keys_are_refused_with_what_the_server_said_and_no_key(
    server: S3Server, uri: str, wrong: dict[str, str], codes: str
) -> None:
    storage = storage_at(uri, {**server.options, **wrong})
    works: list[Callable[[], Any]] = [
        storage.names,
        storage.make,
        lambda: storage.read("a"),
        lambda: storage.size("a"),
        lambda: storage.replace("a", b""),
        lambda: storage.publish("a", b""),
        lambda: storage.remove("a"),
        lambda: write(storage, "a", b""),
    ]
    for work in works:
        with pytest.raises(PermissionError, match=codes) as caught:
            work()
        assert storage.location in str(caught.value)
        for secret in (ACCESS_KEY, SECRET_KEY, "hidden"):
            assert secret not in str(caught.value)
        told = hint(Cause(0, "PermissionError", str(caught.value)), Config(), RunDir(storage))
        assert told is not None
        assert "refuses the credentials: see run.s3" in told


def test_a_key_that_the_server_repeats_is_masked(storage: Storage) -> None:
    assert isinstance(storage, s3.S3Storage)
    text = f"AWS Error ACCESS_DENIED during PutObject operation: {ACCESS_KEY} may not,\n{SECRET_KEY} or not"
    shown = r"ACCESS_DENIED \(PutObject\): \*\*\* may not, \*\*\* or not$"
    with pytest.raises(PermissionError, match=shown), storage._client.plain_errors(storage.location):
        raise OSError(text)


def test_what_is_refused_is_not_tried_again(proxy: S3Proxy, proxied: Storage) -> None:
    refused = storage_at(proxied.location, {**proxied._client.options, "secret_key": "hidden"})
    for work in (refused.names, lambda: refused.publish("a", b"")):
        proxy.methods.clear()
        with pytest.raises(PermissionError):
            work()
        assert len(proxy.methods) == 1


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken"])
def test_a_token_that_has_expired_is_a_permission_error_and_says_where(
    proxy: S3Proxy, proxied: Storage, code: str
) -> None:
    proxy.code = code
    for work in (proxied.names, lambda: proxied.replace("a", b""), lambda: proxied.publish("a", b"")):
        with pytest.raises(PermissionError, match=code) as caught:
            work()
        assert proxied.location in str(caught.value)


def test_the_environment_is_enough(environment: dict[str, str], uri: str) -> None:
    write(storage_at(uri), "a", b"1")
    storage_at(uri, {"endpoint": None, "access_key": None}).publish("b", b"2")
    assert storage_at(uri).names() == ["a", "b"]


def test_options_win_over_the_environment(
    server: S3Server, uri: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in environment:
        monkeypatch.setenv(name, "http://127.0.0.1:9" if "URL" in name else "wrong")
    write(storage_at(uri, server.options), "a", b"1")
    storage_at(uri, server.options).publish("b", b"2")
    assert storage_at(uri, server.options).names() == ["a", "b"]


def test_keys_come_as_a_set(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of the environment's keys")
    both = {"access_key": "mine", "secret_key": "mine too"}
    assert with_environment(both) == {
        "endpoint": environment["AWS_ENDPOINT_URL"],
        "region": "us-east-1",
        **both,
    }
    assert with_environment({"region": "here"}) == {
        "endpoint": environment["AWS_ENDPOINT_URL"],
        "region": "here",
        "access_key": ACCESS_KEY,
        "secret_key": SECRET_KEY,
        "session_token": "of the environment's keys",
    }
