"""Loading distrusts: every kind of damage is found before anything is used, and hostile files are not obeyed."""

import os
from pathlib import Path

import pytest

from areal_ray.checkpoint import Catalog, CheckpointDamaged, Manifest, read_manifest
from areal_ray.checkpoint.format.manifest import verify
from areal_ray.storage import LocalStorage

from .boxes import DAMAGE, damage_found, do_damage, flip, load_box, save_box, shard, weights

pytestmark = pytest.mark.unit


SIZES_TELL = [kind for kind, (_, _, sizes_tell) in DAMAGE.items() if sizes_tell]


@pytest.fixture
def directory(tmp_path):
    return save_box(tmp_path, **weights(), count=7)


def test_without_damage_it_loads_and_verifies(directory):
    assert load_box(directory).tree["count"] == 7
    assert verify(directory) == read_manifest(directory)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_on_loading_and_the_file_named(directory, kind):
    name = do_damage(directory, kind)
    assert damage_found(directory).startswith(f"{name}: ")


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_by_verifying_and_the_file_named(directory, kind):
    name = do_damage(directory, kind)
    with pytest.raises(CheckpointDamaged, match=f"^{name}: "):
        verify(directory)


@pytest.mark.parametrize("kind", SIZES_TELL)
def test_damage_that_sizes_tell_is_found_by_the_catalog_and_the_file_named(directory, tmp_path, kind):
    name = do_damage(directory, kind)
    (entry,) = Catalog(LocalStorage(tmp_path)).entries()
    assert entry.manifest is None
    assert entry.problem.startswith(f"{name}: ")


def test_every_byte_of_the_manifest_counts(directory):
    path = Path(directory.location, "manifest.json")
    whole = path.read_bytes()
    for i in range(0, len(whole), 7):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(CheckpointDamaged):
            read_manifest(directory)


@pytest.mark.parametrize("damage", [os.remove, lambda path: flip(path, 50)])
def test_what_is_there_for_others_does_not_keep_us_from_loading_but_is_found_by_verifying(directory, damage):
    damage(Path(directory.location, ".metadata"))
    assert load_box(directory).tree["count"] == 7
    with pytest.raises(CheckpointDamaged, match=r"^\.metadata: "):
        verify(directory)


def test_a_shard_of_another_save_is_damage(directory, tmp_path):
    other = save_box(tmp_path, step=2, **weights(2.0))
    shard(directory).write_bytes(shard(other).read_bytes())
    assert damage_found(directory).startswith("shard-00000.distcp: ")


def test_a_manifest_of_a_later_format_is_refused(directory):
    manifest = read_manifest(directory)
    data = Manifest(manifest.info, manifest.files, format=3).encode()
    Path(directory.location, "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointDamaged, match="format 3"):
        read_manifest(directory)


@pytest.mark.parametrize("name", ["shard-00000.distcp", "shard-00000.sums", "layout.json", "state.json"])
def test_a_file_that_the_manifest_does_not_have_is_not_read(directory, name):
    manifest = read_manifest(directory)
    files = {key: record for key, record in manifest.files.items() if key != name}
    Path(directory.location, "manifest.json").write_bytes(Manifest(manifest.info, files).encode())
    assert damage_found(directory) == f"{name}: not in the manifest"


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname"])
def test_a_manifest_that_names_a_file_outside_is_damage(directory, tmp_path, name):
    manifest = read_manifest(directory)
    files = {**manifest.files, name: manifest.files["state.json"]}
    Path(directory.location, "manifest.json").write_bytes(Manifest(manifest.info, files).encode())
    with pytest.raises(CheckpointDamaged, match=r"outside|hostname"):
        verify(directory)
    (entry,) = Catalog(LocalStorage(tmp_path)).entries()
    assert entry.problem is not None
