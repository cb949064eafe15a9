"""Who reads, deletes and lists checkpoints in object storage: retention and `areal-ray ckpt`."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from areal_ray.checkpoint import Catalog, CheckpointDamaged
from areal_ray.checkpoint.read_lock import read_lock
from areal_ray.checkpoint.retention import remove
from areal_ray.cli.main import main as run_cli
from areal_ray.distributed import RankError
from areal_ray.run import RunDir
from areal_ray.storage import Storage, s3
from areal_ray.tools import checkpoints
from tests.distributed.s3 import flip, save_box, write

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_two_saves_under_one_name_leave_the_first(storage: Storage) -> None:
    directory = save_box(storage, 1)
    with pytest.raises(RankError, match="FileExistsError"):
        save_box(storage, 1, value=2.0)
    assert checkpoints.check(directory) > 0


def test_a_checkpoint_that_is_read_is_not_touched(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_box(storage, 1)
    with read_lock(directory):
        with monkeypatch.context() as patch:
            patch.delattr(s3.S3Storage, "remove")
            assert not remove(Catalog(storage), "step-00000001.a1")
        assert checkpoints.check(directory) > 0
    assert remove(Catalog(storage), "step-00000001.a1")
    assert storage.names() == []


def test_a_reader_who_comes_while_it_is_deleted_keeps_it(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_box(storage, 1)
    readers = []
    plain = s3.S3Storage.remove

    def remove_late(self: s3.S3Storage, name: str) -> None:
        if name == "manifest.json":
            readers.append(read_lock(directory))
            readers[0].__enter__()
        plain(self, name)

    monkeypatch.setattr(s3.S3Storage, "remove", remove_late)
    assert not remove(Catalog(storage), "step-00000001.a1")
    readers[0].__exit__(None, None, None)
    assert checkpoints.check(directory) > 0
    assert not [name for name in directory.names() if name.startswith(".reading")]


@pytest.fixture
def tool(environment: dict[str, str], capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    """`areal-ray ckpt` with keys from the environment: exit status and what it printed."""
    broken_pipe = signal.getsignal(signal.SIGPIPE)

    def tool(*arguments: str) -> tuple[int, str]:
        status = run_cli(["ckpt", *arguments])
        printed = capfd.readouterr()
        return status, printed.out if status == 0 or printed.out else printed.err

    yield tool
    signal.signal(signal.SIGPIPE, broken_pipe)  # the command's own is to end silently


def test_ls_lists_what_is_good_and_what_is_not(storage: Storage, uri: str, tool: Any) -> None:
    save_box(storage, 1)
    save_box(storage, 2).remove("shard-00000.distcp")
    write(storage.sub("step-00000003.a1"), "shard-00000.distcp", b"cut")
    status, text = tool("ls", uri, "--json")
    assert status == 0
    good, damaged, unfinished = json.loads(text)
    assert (good["name"], good["state"], good["bytes"] > 0) == ("step-00000001.a1", "good", True)
    assert "shard-00000.distcp: missing" in damaged["state"]
    assert "never finished" in unfinished["state"]


def test_ls_of_nothing_and_of_a_server_that_is_down_are_told_apart(
    impatient: None, uri: str, tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, text = tool("ls", uri)
    assert (status, "nothing there" in text) == (1, True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # of the discard protocol, which nobody serves
    status, text = tool("ls", uri)
    assert (status, "nothing there" in text, "Could not connect to the endpoint" in text) == (1, False, True)


def test_inspect_says_what_is_in_a_checkpoint(storage: Storage, uri: str, tool: Any) -> None:
    save_box(storage, 7)
    status, text = tool("inspect", f"{uri}/step-00000007.a1", "--json")
    assert status == 0
    assert json.loads(text)["info"]["step"] == 7
    assert json.loads(text)["tensors"]["box.weight"] == ["float32", [3, 4]]


def test_verify_reads_every_byte(storage: Storage, uri: str, tool: Any) -> None:
    directory = save_box(storage, 1)
    assert tool("verify", directory.location)[0] == 0
    directory.replace("shard-00000.distcp", flip(directory.read("shard-00000.distcp")))
    status, text = tool("verify", f"{uri}/step-00000001.a1")
    assert (status, text) == (1, "areal-ray ckpt: shard-00000.distcp: the checksum does not match\n")
    with pytest.raises(CheckpointDamaged):
        checkpoints.check(directory)


def test_digest_and_diff_compare_states(storage: Storage, tool: Any) -> None:
    one, same, other = save_box(storage, 1), save_box(storage, 2), save_box(storage, 3, value=1.5)
    digests = [tool("digest", directory.location)[1] for directory in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert tool("diff", one.location, same.location) == (0, "bit-identical\n")
    status, text = tool("diff", one.location, other.location)
    assert (status, "box.weight: 12 of 12 elements, max |a-b| 0.5" in text) == (1, True)


def test_gc_deletes_what_was_never_finished(storage: Storage, uri: str, tool: Any) -> None:
    RunDir(storage).event("attempt", attempt=1)  # of a version that did not mark its saves
    save_box(storage, 1)
    write(storage.sub("step-00000002.a1"), "shard-00000.distcp", b"cut")
    save_box(storage, 2, attempt=2)
    write(storage.sub("step-00000003.a2"), "shard-00000.distcp", b"may be under way")
    assert tool("gc", uri) == (0, "deleted step-00000002.a1\n")
    assert storage.directories("step-") == ["step-00000001.a1", "step-00000002.a2", "step-00000003.a2"]
    assert tool("gc", uri) == (0, "nothing to delete\n")


def test_repair_makes_rays_list_anew(storage: Storage, uri: str, tool: Any) -> None:
    save_box(storage, 1)
    save_box(storage, 2).remove("shard-00000.distcp")
    save_box(storage, 3)
    assert tool("repair", uri) == (0, "2 checkpoints: step-00000001.a1, step-00000003.a1\n")
    listed = json.loads(storage.read("checkpoint_manager_snapshot.json"))["checkpoint_results"]
    assert [result["checkpoint_dir_name"] for result in listed] == ["step-00000001.a1", "step-00000003.a1"]
