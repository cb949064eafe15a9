"""The engine under plain torchrun, with Ray not to be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.small import ROOT, SMALL

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).with_name("torchrun_script.py")
TIME_LIMIT_S = 240


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    command += [str(ROOT / "conf/experiments/tiny.yaml"), str(out), *SMALL]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (out / "log").open("w+") as log:
        torchrun = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=out)
        try:
            code = torchrun.wait(TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            torchrun.terminate()  # it ends its ranks on SIGTERM
            code = torchrun.wait()
        log.seek(0)
        assert code == 0, log.read()
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_trains_without_ray(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["ray"] == []
        assert result["world_size"] == 2
        assert result["losses"] == results[0]["losses"]
        assert result["losses"][2] < result["losses"][0]
        assert {"grad_norm", "loss", "lr"} <= set(result["keys"])
        assert result["logits"] == [4, 32, 264]


def test_saves_and_loads_both_formats_and_goes_on_identically(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["went on"][0] < result["losses"][0]
        assert result["goes on"] == [result["went on"]] * 2


def test_processes_that_leave_end_well_though_gloo_lags_behind() -> None:
    command = [sys.executable, "-m", "tests.distributed.leaving_script", "30"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [0] * 60, ran.stderr
