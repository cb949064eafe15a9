"""areal-ray ckpt: what it prints and how it exits."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from areal_ray.checkpoint import save
from areal_ray.cli.main import main
from areal_ray.distributed import Ranks
from areal_ray.storage import LocalStorage
from tests.unit.checkpoint.boxes import DAMAGE, Box, do_damage, save_box, weights

pytestmark = pytest.mark.unit


@pytest.fixture
def ckpt(capsys):
    def run(*arguments):
        """(exit status, stdout, stderr) of a command."""
        status = main(["ckpt", *(getattr(argument, "location", str(argument)) for argument in arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def ckpt_json(ckpt):
    def run(*arguments):
        """(exit status, what was printed), which must be JSON in the strict sense."""
        status, out, err = ckpt(*arguments, "--json")
        assert err == ""
        return status, json.loads(out, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))

    return run


def one_and_other(tmp_path, **other):
    tree = {**weights(), "count": 7}
    return save_box(tmp_path / "a", **tree), save_box(tmp_path / "b", **{**tree, **other})


@pytest.fixture(autouse=True)
def _two_runs(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()


def test_ls_lists_oldest_first_with_what_is_wrong(ckpt_json, tmp_path):
    save_box(tmp_path / "a", 100, 1)
    save_box(tmp_path / "a", 50, 2)
    do_damage(save_box(tmp_path / "a", 200, 2), "manifest deleted")
    status, rows = ckpt_json("ls", tmp_path / "a")
    assert status == 0
    assert [(row["name"], row["step"], row["attempt"]) for row in rows] == [
        ("step-00000100.a1", 100, 1),
        ("step-00000050.a2", 50, 2),
        ("step-00000200.a2", 200, 2),
    ]
    assert [row["state"] for row in rows[:2]] == ["good", "good"]
    assert "never finished" in rows[2]["state"]
    assert rows[0]["bytes"] > 1000
    assert rows[2]["bytes"] is None


def test_ls_prints_a_line_for_each(ckpt, tmp_path):
    directory = LocalStorage(tmp_path / "a" / "step-00000100.a1")
    info = {"step": 100, "attempt": 1, "world_size": 4, "time": 1.7e9}
    save(directory, {"box": Box(**weights())}, info, Ranks())
    do_damage(save_box(tmp_path / "a", 200), "shard deleted")
    status, out, _ = ckpt("ls", tmp_path / "a")
    lines = out.splitlines()
    assert status == 0
    assert len(lines) == 3
    assert lines[1].split()[:3] == ["step-00000100.a1", "100", "4"]
    assert "2023-11-1" in lines[1]
    assert lines[1].endswith("good")
    assert "shard-00000.distcp: missing" in lines[2]


@pytest.mark.parametrize("command", ["ls", "inspect", "verify", "digest"])
def test_nothing_there_exits_with_1_and_says_so(ckpt, tmp_path, command):
    status, out, err = ckpt(command, tmp_path / "nothing")
    assert (status, out) == (1, "")
    assert err == f"areal-ray ckpt: {tmp_path / 'nothing'}: nothing there\n"


def test_inspect_tells_tensors_and_values(ckpt, ckpt_json, tmp_path):
    directory = save_box(tmp_path / "a", 5, 2, **weights(), scalar=torch.tensor(1).bfloat16(), count=7)
    status, found = ckpt_json("inspect", directory)
    assert status == 0
    assert found["info"] == {"step": 5, "attempt": 2}
    assert found["values"] == {"box": {"count": 7}}
    assert found["tensors"] == {
        "box.bias": ["float32", [4]],
        "box.scalar": ["bfloat16", []],
        "box.weight": ["float32", [3, 4]],
    }
    assert sum(found["files"].values()) == found["bytes"]
    status, out, _ = ckpt("inspect", directory)
    assert status == 0
    assert "  box.weight  float32 3x4" in out.splitlines()
    assert "  box.scalar  bfloat16 scalar" in out.splitlines()


def test_verify_passes_a_good_one(ckpt, ckpt_json, tmp_path):
    directory = save_box(tmp_path / "a")
    status, found = ckpt_json("verify", directory)
    size = sum(directory.size(name) for name in directory.names() if name != "manifest.json")
    assert (status, found) == (0, {"good": True, "bytes": size})
    assert ckpt("verify", directory)[:2] == (0, f"good: {size:,} bytes read and compared\n")


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_exits_with_1_and_names_the_damaged_file(ckpt, tmp_path, kind):
    directory = save_box(tmp_path / "a")
    name = do_damage(directory, kind)
    status, out, err = ckpt("verify", directory)
    assert (status, out) == (1, "")
    assert err.startswith(f"areal-ray ckpt: {name}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["digest", "diff"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_nothing_is_told_of_damaged_bytes(ckpt, tmp_path, command, kind):
    good, damaged = one_and_other(tmp_path)
    do_damage(damaged, kind)
    status, out, err = ckpt(command, *([good, damaged] if command == "diff" else [damaged]))
    assert (status, out) == (1, "")
    assert err.startswith("areal-ray ckpt: ")


def test_the_digest_is_that_of_the_state_not_of_the_files(ckpt, ckpt_json, tmp_path):
    tree = {**weights(), "count": 7, "elapsed_s": 1.5, "clock": {"elapsed_s": 1.0, "last": 3}}
    turned = dict(reversed(list(tree.items()))) | {"elapsed_s": 99.0, "clock": {"elapsed_s": 2.0, "last": 3}}
    one, other = save_box(tmp_path / "a", 1, 1, **tree), save_box(tmp_path / "a", 2, 5, **turned)
    assert one.read("shard-00000.distcp") != other.read("shard-00000.distcp")
    status, out, _ = ckpt("digest", one)
    assert status == 0
    assert len(bytes.fromhex(out.strip())) == 32
    assert ckpt_json("digest", other) == (0, {"sha256": out.strip()})
    assert ckpt("diff", one, other)[:2] == (0, "bit-identical\n")


DIFFERENT = {
    "one bit": ({"bias": torch.tensor([0.0, 1.0, 2.0, 3.0000002])}, "box.bias", "1 of 4 elements"),
    "sign of zero": ({"bias": torch.tensor([-0.0, 1.0, 2.0, 3.0])}, "box.bias", "1 of 4 elements"),
    "type": ({"bias": torch.arange(4)}, "box.bias", "torch.float32 (4,) and torch.int64 (4,)"),
    "shape": ({"bias": torch.arange(4.0)[None]}, "box.bias", "torch.float32 (4,) and torch.float32 (1, 4)"),
    "more": ({"more": torch.zeros(1)}, "box.more", "only in the second"),
    "value": ({"count": 8}, "box.count", "7 and 8"),
    "one more value": ({"loss": 0.5}, "box.loss", "absent and 0.5"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_diff_exits_with_1_and_digests_differ_if_anything_does(ckpt, ckpt_json, tmp_path, kind):
    change, name, what = DIFFERENT[kind]
    one, other = one_and_other(tmp_path, **change)
    status, found = ckpt_json("diff", one, other)
    assert status == 1
    assert [(difference["name"], difference["what"]) for difference in found] == [(name, what)]
    status, out, _ = ckpt("diff", one, other)
    assert status == 1
    assert out.startswith(f"{name}: {what}")
    assert ckpt("digest", one)[1] != ckpt("digest", other)[1]


def test_diff_measures_how_far_apart(ckpt, ckpt_json, tmp_path):
    one, other = one_and_other(tmp_path, bias=torch.tensor([0.0, 1.5, 2.0, 1.0]))
    assert ckpt_json("diff", one, other)[1] == [{"name": "box.bias", "what": "2 of 4 elements", "max_abs": 2.0}]
    assert ckpt("diff", one, other)[1] == "box.bias: 2 of 4 elements, max |a-b| 2\n"


def test_diff_of_a_state_with_itself_is_nothing_also_with_nan(ckpt, ckpt_json, tmp_path):
    odd = {"weight": torch.tensor([float("nan"), -0.0]), "empty": torch.empty(0, 3), "flag": torch.tensor(True)}
    one, other = save_box(tmp_path / "a", **odd), save_box(tmp_path / "b", **odd)
    assert ckpt_json("diff", one, other) == (0, [])
    assert ckpt("digest", one)[1] == ckpt("digest", other)[1]


def test_diff_prints_json_also_if_one_is_not_a_number(ckpt_json, tmp_path):
    status, found = ckpt_json("diff", *one_and_other(tmp_path, bias=torch.full((4,), float("nan"))))
    assert (status, found[0]["what"]) == (1, "4 of 4 elements")


@pytest.mark.parametrize("arguments", [[], ["ls"], ["diff", "a"], ["frobnicate", "a"]])
def test_wrong_arguments_exit_with_2(ckpt, arguments):
    with pytest.raises(SystemExit) as caught:
        ckpt(*arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("there", [True, False])
def test_repair_on_an_unknown_ray_or_without_one_removes_the_list(ckpt, tmp_path, monkeypatch, there):
    save_box(tmp_path)
    snapshot = tmp_path / "checkpoint_manager_snapshot.json"
    if there:
        snapshot.write_text("{to")  # torn
    monkeypatch.delitem(sys.modules, "areal_ray.controller.snapshot", raising=False)
    monkeypatch.setitem(sys.modules, "ray.train.v2._internal.constants", None)  # its import is an ImportError
    status, out, err = ckpt("repair", tmp_path)
    assert (status, err) == (0, "")
    assert out.startswith("removed checkpoint_manager_snapshot.json, as it cannot be made anew with this Ray")
    assert not snapshot.exists()


def test_a_reader_that_goes_ends_it_quietly_and_the_process_keeps_its_signals(ckpt, tmp_path):
    checkpoint = save_box(tmp_path / "a", 100, 1)
    before = signal.getsignal(signal.SIGPIPE)
    assert ckpt("inspect", checkpoint)[0] == 0
    assert signal.getsignal(signal.SIGPIPE) is before
    command = [sys.executable, "-m", "areal_ray.cli.main", "ckpt", "inspect", checkpoint.location]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 128 + signal.SIGPIPE
