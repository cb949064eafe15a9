"""What a wheel holds, and what `areal-ray init` writes out of it."""

import tomllib
from pathlib import Path

import pytest

from areal_ray.cli.main import main
from areal_ray.config import load, plugin
from areal_ray.data import load_splits

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]


def test_every_package_is_named():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "areal_ray").rglob("__init__.py")}
    assert set(settings["packages"]) == found | {"areal_ray.conf", "areal_ray.cli.start"}
    for package, patterns in settings["package-data"].items():
        folder = ROOT / "conf" if package == "areal_ray.conf" else ROOT / package.replace(".", "/")
        assert all(list(folder.glob(pattern)) for pattern in patterns), package


def test_init_writes_a_folder_whose_experiment_fits(tmp_path, monkeypatch, capsys):
    assert main(["init", str(tmp_path / "mine")]) == 0
    assert "cd " in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    config = load("experiment.yaml")  # its groups are those that the package brings
    assert config.model.config["model_type"] == "qwen3"
    train, held_out = load_splits(config.data, None, config.train.seq_len, config.train.global_batch_size)
    (row,) = train[[5]]["input_ids"]
    text = bytes(token for token in row if token < 256).decode()
    a, b, total = map(int, text.replace("=", "+").split("+"))
    assert a + b == total
    assert train.fingerprint != held_out.fingerprint
    assert plugin.resolve(config.objective.name, "objective.name").metrics == ("accuracy",)
    assert main(["init"]) == 1
    assert "has .rayignore, Dockerfile" in capsys.readouterr().err
