import pytest


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.txt").write_bytes(bytes([i]) * (37 + i))
    return folder
