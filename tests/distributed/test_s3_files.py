"""Files in object storage, on a real S3 server."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from io import UnsupportedOperation
from typing import Any

import numpy as np
import pytest

from areal_ray.data.corpus.corpus import TokenFile, TokenStream
from areal_ray.data.corpus.token_file import TokenWriter
from areal_ray.data.records import Tokens
from areal_ray.storage import Storage, s3
from tests.distributed.s3 import write
from tests.s3_proxy import S3Proxy

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_directory_says_what_is_directly_in_it(storage: Storage) -> None:
    for name in ("b", "a", ".c"):
        write(storage, name, name.encode() * 3)
    write(storage.sub("d"), "deep", b"12345")
    assert storage.names() == [".c", "a", "b", "d"]
    assert (storage.directories("d"), storage.directories("a"), storage.stamp("d")) == (["d"], [], None)
    assert storage.sizes() == {".c": 6, "a": 3, "b": 3}
    assert (storage.size("a"), storage.size("d/deep")) == (3, 5)
    assert (storage.size("d"), storage.size("nothing")) == (None, None)
    assert (storage.sub("nothing").names(), storage.sub("nothing").sizes()) == ([], {})


def test_a_directory_below_has_its_own_names(storage: Storage, uri: str) -> None:
    write(storage.sub("a/b"), "c", b"deep")
    assert storage.sub("a").sub("b").location == storage.sub("a/b").location == f"{uri}/a/b"
    assert storage.sub("a").names() == ["b"]
    assert storage.read("a/b/c") == b"deep"


def test_its_pickle_opens_the_same_directory_anew(storage: Storage) -> None:
    write(storage.sub("a"), "b", b"1")
    assert pickle.loads(pickle.dumps(storage.sub("a"))).read("b") == b"1"  # noqa: S301


def test_make_wants_an_unused_directory(storage: Storage) -> None:
    storage.make()
    write(storage, "a", b"")
    with pytest.raises(FileExistsError, match=storage.location):
        storage.make()
    storage.ensure()  # which is content


def test_a_created_file_holds_what_was_written(storage: Storage) -> None:
    with storage.create("a") as file:
        file.write(b"one ")
        file.write(memoryview(b"two"))
    assert storage.read("a") == b"one two"


def test_a_whole_object_appears_at_its_end_in_place_of_what_was_there(storage: Storage) -> None:
    write(storage, "a", b"old")
    with storage.create_whole("a") as file:
        file.write(b"new")
        assert storage.read("a") == b"old"
    assert storage.read("a") == b"new"
    with pytest.raises(TypeError), storage.create_whole("a") as file:
        file.write("half of it is no bytes")
    assert storage.read("a") == b"new"
    assert storage.names() == ["a"]


def test_tokens_are_read_by_position(storage: Storage) -> None:
    with TokenWriter(storage, "t", np.dtype("<u2")) as writer:
        writer.begin_document()
        writer.add(Tokens(np.arange(60_000, dtype=np.uint32)))
    stream = TokenStream(storage, [TokenFile("t.bin", 60_000)], np.dtype("<u2"), "", lambda: np.zeros(0))
    begins = np.asarray([59_000, 32_500, 0])  # the middle one lies in two blocks
    assert stream.read(begins, 1000).tolist() == [list(range(begin, begin + 1000)) for begin in begins]
    storage.remove("t.bin")
    with pytest.raises(FileNotFoundError):
        TokenStream(storage, [TokenFile("t.bin", 60_000)], np.dtype("<u2"), "", lambda: np.zeros(0)).read(begins, 10)


def test_a_part_of_an_object_is_one_request(proxied: Storage, proxy: S3Proxy) -> None:
    write(proxied, "a", b"0123456789")
    proxy.methods.clear()
    assert [proxied.read_range("a", *part) for part in ((2, 3), (8, 5), (20, 1))] == [b"234", b"89", b""]
    assert proxy.methods == ["GET"] * 3
    with pytest.raises(FileNotFoundError):
        proxied.read_range("nothing", 0, 1)


def test_a_large_object_comes_in_order_from_several_requests(
    proxied: Storage, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 5
    write(proxied, "a", data)
    monkeypatch.setattr(s3, "_BLOCK", 100)
    proxy.methods.clear()
    assert b"".join(proxied.read_blocks("a", len(data))) == data
    assert proxy.methods == ["GET"] * 13
    with pytest.raises(FileNotFoundError):
        list(proxied.read_blocks("nothing", 1))


def test_create_is_exclusive(storage: Storage) -> None:
    write(storage, "a", b"first")
    with pytest.raises(FileExistsError, match="/a exists"):
        write(storage, "a", b"second")
    assert storage.read("a") == b"first"


def test_a_name_is_not_there_before_all_of_it_is(storage: Storage) -> None:
    with storage.create("a") as file:
        file.write(b"1")
        assert storage.names() == []
    assert storage.names() == ["a"]


def test_what_was_cut_off_while_it_was_written_is_not_there(storage: Storage) -> None:
    def write_half() -> None:
        with storage.create("a") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert storage.names() == []


def test_replace_puts_new_content_in_the_place_of_the_old(storage: Storage) -> None:
    storage.replace("a", b"old, and longer")
    storage.replace("a", b"new")
    assert storage.read("a") == b"new"


def test_a_reader_sees_all_of_the_old_bytes_or_all_of_the_new_ones(
    storage: Storage, proxy: S3Proxy, proxied: Storage
) -> None:
    storage.replace("a", b"old")
    path = storage.location.removeprefix("s3://") + "/a"
    proxy.before = {f"GET /{path}": lambda: storage.replace("a", b"new, and longer")}
    assert proxied.read("a") in (b"old", b"new, and longer")


def test_of_two_that_publish_the_first_stays(storage: Storage) -> None:
    storage.publish("a", b"first")
    with pytest.raises(FileExistsError, match="/a exists"):
        storage.publish("a", b"second")
    assert storage.read("a") == b"first"


def test_publishing_the_same_again_is_no_error(storage: Storage) -> None:
    storage.publish("a", b"same")
    storage.publish("a", b"same")
    assert storage.read("a") == b"same"


def test_an_open_file_can_be_sought_in(storage: Storage) -> None:
    write(storage, "a", b"0123456789")
    with storage.open("a") as file:
        file.seek(4)
        assert file.read(3) == b"456"
        file.seek(-2, 2)
        assert file.read() == b"89"


def test_a_file_deleted_while_it_is_open_is_not_found(storage: Storage) -> None:
    write(storage, "a", b"0123456789")
    with storage.open("a") as file:
        storage.remove("a")
        with pytest.raises(FileNotFoundError):
            file.read()


def test_what_is_not_there_cannot_be_read_or_removed(storage: Storage) -> None:
    for work in (storage.read, storage.open, storage.remove):
        with pytest.raises(FileNotFoundError):
            work("nothing")


def test_what_is_removed_is_gone_and_nothing_else(storage: Storage) -> None:
    write(storage, "a", b"1")
    write(storage, "b", b"2")
    storage.remove("a")
    assert storage.names() == ["b"]


def test_a_deleted_directory_is_gone_and_its_neighbour_is_not(storage: Storage) -> None:
    for name in ("d", "d/e", "d2"):
        write(storage.sub(name), "a", b"1")
    storage.sub("d").delete()
    assert storage.names() == ["d2"]
    assert storage.sub("d2").names() == ["a"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".", "..", "a/../../x", "a//b", "a/./b", "a/"])
def test_a_name_that_leads_out_is_refused(storage: Storage, name: str) -> None:
    works: list[Callable[[str], Any]] = [storage.read, storage.open, storage.size, storage.sub, storage.remove]
    works += [
        lambda name: storage.replace(name, b""),
        lambda name: storage.publish(name, b""),
        lambda name: write(storage, name, b""),
    ]
    for work in works:
        with pytest.raises(ValueError, match="is not a name inside"):
            work(name)


def test_objects_cannot_be_appended_to(storage: Storage) -> None:
    assert not storage.can_append
    with pytest.raises(UnsupportedOperation, match="cannot be appended to"):
        storage.append("a", b"1")


def test_a_file_larger_than_what_may_be_under_way_arrives_whole(storage: Storage) -> None:
    pieces = [bytes([i]) * (1 << 20) for i in range(70)]
    with storage.create("large") as file:
        for piece in pieces:
            file.write(piece)
    assert storage.size("large") == 70 << 20
    assert hashlib.sha256(storage.read("large")).digest() == hashlib.sha256(b"".join(pieces)).digest()


def test_what_is_under_way_is_bounded() -> None:
    flushed: list[int] = []

    class Stream:
        written = 0

        def write(self, data: bytes) -> None:
            self.written += len(data)

        def flush(self) -> None:
            flushed.append(self.written)

    upload = s3._Upload(Stream())
    for _ in range(20):
        upload.write(bytes(8 << 20))
    assert flushed == [64 << 20, 128 << 20]
