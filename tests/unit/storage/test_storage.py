"""LocalStorage: created whole, replaced whole, appended to, and nothing outside of it."""

import os

import pytest

from areal_ray.storage import LocalStorage, NotAFile, is_unreadable, storage_at

pytestmark = pytest.mark.unit

ESCAPES = ["../x", "/etc/passwd", "", ".", "a/../../x", "..", "out", "out/x"]


@pytest.fixture
def storage(tmp_path):
    storage = LocalStorage(tmp_path / "run")
    storage.make()
    return storage


def write(storage, name, data):
    with storage.create(name) as file:
        file.write(data)


def test_a_created_file_holds_what_was_written(storage):
    with storage.create("a") as file:
        file.write(b"one ")
        file.write(b"two")
    assert storage.read("a") == b"one two"
    with storage.open("a") as file:
        file.seek(4)
        assert file.read() == b"two"


def test_a_created_file_and_its_name_are_synced_when_the_block_is_left(storage, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    write(storage, "a", b"one")
    assert synced == [f"{storage.location}/a", storage.location]
    synced.clear()
    storage.append("a", b"two")
    assert synced == [f"{storage.location}/a"]


def test_a_whole_file_appears_at_its_end_in_place_of_what_was_there(storage, monkeypatch):
    write(storage, "a", b"old")
    with storage.create_whole("a") as first:
        first.write(b"first")
        with storage.create_whole("a") as second:  # another job at the same time
            second.write(b"second")
        assert storage.read("a") == b"second"
    assert storage.read("a") == b"first"
    with pytest.raises(TypeError), storage.create_whole("a") as file:
        file.write("half of it is no bytes")
    assert storage.read("a") == b"first"
    assert storage.names() == ["a"]


def test_create_is_exclusive(storage):
    write(storage, "a", b"first")
    with pytest.raises(FileExistsError):
        write(storage, "a", b"second")
    assert storage.read("a") == b"first"


def test_replace_puts_new_content_in_the_place_of_the_old(storage):
    storage.replace("a", b"old, and longer")
    storage.replace("a", b"new")
    assert storage.read("a") == b"new"
    assert storage.names() == ["a"]


def test_replace_keeps_the_old_content_if_the_new_cannot_be_written(storage, monkeypatch):
    storage.replace("a", b"old")

    def disk_is_full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OSError, match="No space"):
        storage.replace("a", b"new")
    assert storage.read("a") == b"old"


def test_append_adds_to_the_end_and_creates(storage):
    storage.append("log", b"one\n")
    storage.append("log", b"two\n")
    assert storage.read("log") == b"one\ntwo\n"


def test_names_are_sorted_and_direct(storage):
    for name in ("b", "a", ".c"):
        write(storage, name, b"")
    storage.sub("d").make()
    write(storage.sub("d"), "deep", b"")
    assert storage.names() == [".c", "a", "b", "d"]


def test_names_of_a_directory_that_does_not_exist_are_none(storage):
    assert storage.sub("nothing").names() == []


def test_size_is_that_of_a_file_and_none_of_anything_else(storage):
    write(storage, "a", b"12345")
    write(storage, "empty", b"")
    storage.sub("d").make()
    assert (storage.size("a"), storage.size("empty")) == (5, 0)
    assert storage.size("d") is None
    assert storage.size("nothing") is None


def test_reading_what_is_not_there_raises(storage):
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")


def test_make_wants_a_new_directory(storage):
    with pytest.raises(FileExistsError):
        storage.make()
    storage.ensure()  # which is content


def test_ensure_makes_parents_too(storage):
    storage.sub("a/b/c").ensure()
    assert storage.sub("a/b").names() == ["c"]


def test_a_private_directory_is_closed_to_other_users(tmp_path):
    for _ in range(2):  # also one that is there
        LocalStorage(tmp_path / "run").ensure(private=True)
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
        (tmp_path / "run").chmod(0o755)


def test_delete_removes_everything(storage):
    storage.sub("d").make()
    write(storage.sub("d"), "a", b"")
    storage.sub("d").delete()
    assert storage.names() == []


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leads_out_is_refused(storage, tmp_path, name):
    (tmp_path / "x").write_bytes(b"outside")
    os.symlink(tmp_path, os.path.join(storage.location, "out"))
    for work in (
        storage.read,
        storage.size,
        storage.sub,
        lambda name: write(storage, name, b"inside"),
        lambda name: storage.replace(name, b"inside"),
        lambda name: storage.append(name, b"inside"),
    ):
        with pytest.raises(ValueError, match="is not a name inside"):
            work(name)
    assert (tmp_path / "x").read_bytes() == b"outside"


def test_a_neighbour_whose_name_begins_alike_is_outside(storage, tmp_path):
    (tmp_path / "run2").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a name inside"):
        storage.size("../run2")


def test_a_symlinked_root_is_resolved(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    storage = LocalStorage(tmp_path / "link")
    assert storage.location == os.path.realpath(tmp_path / "real")
    write(storage, "a", b"one")
    assert (tmp_path / "real" / "a").read_bytes() == b"one"


def test_a_path_is_made_absolute_and_the_home_directory_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert storage_at("~/runs").location == os.path.realpath(tmp_path / "runs")
    assert storage_at("runs").location == os.path.realpath(tmp_path / "runs")


def test_a_scheme_that_is_not_supported_is_refused():
    with pytest.raises(ValueError, match="gs:// is not supported"):
        storage_at("gs://bucket/runs")


def test_a_line_that_did_not_fit_is_taken_back(tmp_path, monkeypatch):
    storage, whole = LocalStorage(tmp_path), os.write
    storage.append("log", b"one\n")
    monkeypatch.setattr(os, "write", lambda fd, data: whole(fd, data[:-2]))
    with pytest.raises(OSError, match="No space left"):
        storage.append("log", b"two\nthree\n")
    monkeypatch.undo()
    assert storage.read("log") == b"one\n"


def test_directories_are_listed_apart_from_files(storage):
    write(storage, "a", b"")
    storage.sub("d").make()
    storage.sub("c").make()
    storage.sub("da").make()
    assert sorted(storage.directories("")) == ["c", "d", "da"]
    assert sorted(storage.directories("d")) == ["d", "da"]
    assert storage.sub("nothing").directories("") == []


def test_a_stamp_changes_with_what_is_in_a_directory(storage):
    assert storage.stamp("d") is None
    storage.sub("d").make()
    stamps = [storage.stamp("d"), storage.stamp("d")]
    for change in (lambda: storage.append("d/a", b"1"), lambda: storage.replace("d/a", b"2")):
        os.utime(f"{storage.location}/d", (1, 1))  # clocks of file systems may tick slowly
        change()
        stamps.append(storage.stamp("d"))
    os.utime(f"{storage.location}/d", (1, 1))
    storage.remove("d/a")
    stamps.append(storage.stamp("d"))
    assert stamps[0] == stamps[1]
    assert all(stamp > 10**9 for stamp in stamps)


def test_a_part_of_a_file_is_read(storage):
    write(storage, "a", b"0123456789")
    assert [storage.read_range("a", *part) for part in ((2, 3), (8, 5), (10, 1), (20, 1))] == [b"234", b"89", b"", b""]
    with pytest.raises(FileNotFoundError):
        storage.read_range("nothing", 0, 1)


def test_a_file_is_cut_off_durably(storage, monkeypatch):
    write(storage, "a", b"0123456789")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    storage.truncate("a", 4)
    assert (storage.read("a"), synced) == (b"0123", [f"{storage.location}/a"])


@pytest.mark.parametrize("held", [False, True], ids=["nobody at its other end", "somebody"])
def test_a_fifo_is_no_file_and_nobody_waits_for_it(storage, held):
    path = f"{storage.location}/a"
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR) if held else None
    for work in (
        lambda: storage.read("a"),
        lambda: storage.read_range("a", 0, 1),
        lambda: list(storage.read_blocks("a", 1)),
        lambda: storage.append("a", b"x"),
        lambda: storage.truncate("a", 0),
    ):
        with pytest.raises(NotAFile):
            work()
    assert storage.sizes() == {}
    storage.replace("a", b"new")  # takes its place
    assert storage.read("a") == b"new"
    if end is not None:
        os.close(end)


def test_a_directory_in_the_place_of_a_file_is_none(storage):
    storage.sub("a").make()
    for work in (lambda: storage.read("a"), lambda: storage.append("a", b"x")):
        with pytest.raises(NotAFile):
            work()


def test_a_loop_is_said_to_be_unreadable(storage):
    os.symlink("step-1", f"{storage.location}/step-1")
    assert storage.directories("step-") == ["step-1"]
    assert storage.sizes() == {}
    assert storage.stamp("step-1") is None
    for work in (storage.size, storage.read):
        with pytest.raises(OSError, match="symbolic links") as caught:
            work("step-1")
        assert is_unreadable(caught.value)


def test_what_is_set_aside_keeps_its_bytes_under_a_name_of_its_own(storage):
    write(storage, "a", b"one")
    aside = storage.set_aside("a")
    assert storage.names() == [aside]
    assert storage.read(aside) == b"one"


def test_two_replacing_at_a_time_use_different_names(storage, monkeypatch):
    names, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (names.append(old), replace(old, new)))
    storage.replace("a", b"one")
    storage.replace("a", b"two")
    assert len(set(names)) == 2


def test_the_name_of_a_log_is_durable_with_its_first_line(storage, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    storage.append("log", b"one\n")
    assert synced == [f"{storage.location}/log", storage.location]
