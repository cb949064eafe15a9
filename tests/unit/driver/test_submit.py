"""`areal-ray submit` with secrets on its command line: refused before anything leaves, and shown nowhere."""

from pathlib import Path

import pytest

from areal_ray.cli.main import main
from areal_ray.driver.jobs import submit as submitting

pytestmark = pytest.mark.unit

TINY = str(Path(__file__).parents[3] / "conf" / "experiments" / "tiny.yaml")
SECRET = "hunter2"
FACTORY = ["model=pretrained", "model.path=null", "model.factory=package.module:function"]


@pytest.fixture
def submitted(monkeypatch):
    """Jobs that a cluster would have been handed; there is none."""
    jobs = []

    def submit(config, path, overrides, address, wait, retries):
        jobs.append((path, overrides))
        return 7

    monkeypatch.setattr(submitting, "submit", submit)
    return jobs


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([f"run.s3.session_token={SECRET}"], "run.s3.session_token"),
        (["run.s3.access_key=me", f"run.s3.secret_key={SECRET}"], "run.s3.access_key"),
        ([f"run.s3={{access_key: me, secret_key: {SECRET}}}"], "run.s3"),
        ([f"run={{name: mine, s3: {{session_token: {SECRET}}}}}"], "run"),
        ([*FACTORY, f"model.args={{hub: {{password: {SECRET}}}}}"], "model.args"),
        ([*FACTORY, f"model.args.hub.api_key={SECRET}"], "model.args.hub.api_key"),
    ],
)
def test_a_secret_is_refused_and_not_shown(submitted, capfd, overrides, key):
    assert main(["submit", "--config", TINY, "train.steps=300", *overrides]) == 2
    out, err = capfd.readouterr()
    assert err.startswith(f"config error: command line: {key}: the command of a job is shown on the dashboard; ")
    assert (out, err.count("\n")) == ("", 1)
    assert SECRET not in err
    assert submitted == []


@pytest.mark.parametrize(
    "override",
    [
        f"run.s3.secret_key={SECRET}",
        f"run.s3.secret_keyy={SECRET}",
        f"run.s3={SECRET}",
        f"run.s3.secret_key=: [{SECRET}",
        f"run.s3.secret_key=[{SECRET}]",
        f"run.s3.secret_key.x={SECRET}",
    ],
)
def test_a_mistake_in_a_secret_is_refused_and_does_not_show_it(submitted, capfd, override):
    assert main(["submit", "--config", TINY, override]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("config error: command line: run.s3")
    assert SECRET not in out + err
    assert submitted == []


def test_the_printed_configuration_has_no_secret(submitted, capfd):
    overrides = ["run.s3.access_key=me-myself", f"run.s3.secret_key={SECRET}"]
    assert main(["submit", "--config", TINY, "--print-config", *overrides]) == 0
    out, err = capfd.readouterr()
    assert "secret_key: '***'" in out
    assert SECRET not in out + err
    assert "me-myself" not in out + err
    assert submitted == []


def test_what_is_no_secret_is_submitted(submitted):
    overrides = ["train.steps=300", "model.config.pad_token_id=0", "run.s3.endpoint=http://127.0.0.1:9"]
    assert main(["submit", "--config", TINY, *overrides]) == 7
    assert submitted == [(TINY, overrides)]


def test_credentials_in_an_address_are_refused(submitted, capfd):
    assert main(["submit", "--config", TINY, f"run.storage_path=s3://me:{SECRET}@bucket/runs"]) == 2
    out, err = capfd.readouterr()
    assert "run.storage_path" in err
    assert SECRET not in out + err
    assert submitted == []
