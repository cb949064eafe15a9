"""Manifests, each read back by what its system reads it with, as far as that is here."""

import configparser
import gzip
import json
import shlex
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from areal_ray.cli.main import main as run_cli
from areal_ray.config import load

pytestmark = pytest.mark.unit
TINY = str(Path(__file__).parents[3] / "conf" / "experiments" / "tiny.yaml")
SCHEMA = Path(__file__).parent / "schemas" / "rayjob-v1.json.gz"


@pytest.fixture
def render(capsys):
    def render(kind, *arguments):
        assert run_cli(["manifest", kind, "--config", TINY, *arguments]) == 0
        return capsys.readouterr().out

    return render


def closed(schema):
    """The schema with unknown fields refused, as a server that validates strictly does."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        made["additionalProperties"] = False
    return made


@pytest.fixture(scope="module")
def ray_job():
    schema = closed(json.loads(gzip.decompress(SCHEMA.read_bytes())))
    schema["properties"]["metadata"] = {"type": "object"}  # of Kubernetes itself
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize(
    "overrides",
    [
        ["run.storage_path=/shared/runs"],
        ["run.storage_path=s3://bucket/runs", "cluster.num_workers=[2,4]", "cluster.use_gpu=true"],
    ],
)
def test_kuberay_takes_the_job_and_the_experiment_is_the_same_there(render, ray_job, tmp_path, overrides):
    text = render("kuberay", "--workers-per-node", "2", *overrides, "train.steps=70")
    settings, job = yaml.safe_load_all(text)
    assert [error.message for error in ray_job.iter_errors(job)] == []
    there = tmp_path / "experiment.yaml"
    there.write_text(settings["data"]["experiment.yaml"])
    command = shlex.split(job["spec"]["entrypoint"])
    assert command[:4] == ["areal-ray", "train", "--config", "/etc/areal_ray/experiment.yaml"]
    assert load(str(there), command[4:]) == load(TINY, [*overrides, "train.steps=70"])
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    elastic = "cluster.num_workers=[2,4]" in overrides
    assert (workers["minReplicas"], workers["maxReplicas"]) == ((1, 2) if elastic else (1, 1))
    assert job["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling", False) == elastic
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"].get("nvidia.com/gpu") == ("2" if elastic else None)


def test_a_field_that_kuberay_does_not_know_is_found(render, ray_job):
    _, job = yaml.safe_load_all(render("kuberay"))
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["limit"] = {}
    assert [error.message for error in ray_job.iter_errors(job)]


def test_slurm_s_script_is_one_that_bash_takes(render):
    text = render("slurm", "--workers-per-node", "1", "run.storage_path=/shared/it's mine", "cluster.use_gpu=true")
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "#SBATCH --nodes=2\n" in text
    assert "#SBATCH --gpus-per-node=1\n" in text


def test_systemd_takes_the_unit(render, tmp_path):
    text = render("systemd")
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read_string(text)
    assert unit["Service"]["ExecStart"].endswith(f"areal-ray train --config {TINY}")
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here: only parsed")
    program = "/bin/true"
    (tmp_path / "it.service").write_text(text.replace("/home/ray/job/.venv/bin/areal-ray", program))
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / "it.service"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_others_name_the_run_and_its_command(render):
    job = yaml.safe_load(render("anyscale", "cluster.num_workers=[1,2]", "run.name=Wide_1"))
    assert job["name"] == "wide-1"
    assert job["compute_config"]["worker_nodes"][0]["max_nodes"] == 2
    assert job["entrypoint"].startswith("areal-ray train --config ")
    text = render("docker")
    assert json.loads(text.rpartition("CMD ")[2])[:2] == ["areal-ray", "train"]
    assert "\nUSER ray\n" in text


def test_no_secret_is_rendered(capsys):
    overrides = ["run.s3.access_key=me", "run.s3.secret_key=hunter2"]
    assert run_cli(["manifest", "kuberay", "--config", TINY, *overrides]) == 2
    seen = capsys.readouterr()
    assert "hunter2" not in seen.out + seen.err
