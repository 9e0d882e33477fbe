"""Official sources, fetched only when asked for."""

from __future__ import annotations

import logging
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dts.errors import DTSError, UnavailableError, UsageError
from dts.evaluation.data.series import M4_HORIZON
from dts.fetch import damaged, write_checksums

log = logging.getLogger(__name__)

TIMEOUT = 20  # seconds without an answer


@dataclass(frozen=True, slots=True)
class Source:
    """Where a data set is published, and which task reads it."""

    about: str
    task: str
    urls: tuple[str, ...]  # files as they are, or zip archives (unpacked, inner archives too)


_M4 = "https://raw.githubusercontent.com/Mcompetitions/M4-methods/master/Dataset"
SOURCES = {
    "m4": Source(
        "M4 competition, training and test values (no licence stated)",
        "m4",
        tuple(f"{_M4}/{part}/{name}-{part.lower()}.csv" for name in M4_HORIZON for part in ("Train", "Test")),
    ),
    "uci-har": Source(
        "UCI HAR with inertial signals, Anguita et al. 2013 (its readme prohibits commercial use)",
        "har",
        ("https://archive.ics.uci.edu/static/public/240/human+activity+recognition+using+smartphones.zip",),
    ),
    "har-cot": Source(
        "HAR-CoT of OpenTSLM: windows, labels, written rationales",
        "har",
        ("https://polybox.ethz.ch/index.php/s/kD74GnMYxn3HBEM/download",),
    ),
    "m4-captions": Source(
        "M4 captions of OpenTSLM",
        "m4-caption",
        ("https://polybox.ethz.ch/index.php/s/MT3y9WdEebT8wfj/download/M4TimeSeriesCaptionDatasetV02.zip",),
    ),
}


def download(name: str, folder: str | Path) -> Path:
    """Fetch a source into `folder/<name>`, whole or not at all, and return that folder: a task's `data_dir`.

    Raises `UnavailableError` at once where there is no network. What is there already is not fetched again: its files
    are compared with the checksums that were noted when they came (the publishers state none).
    """
    if name not in SOURCES:
        raise UsageError(f"no source is called {name!r}; there are {', '.join(SOURCES)}")
    target = Path(folder) / name
    if target.is_dir():
        if file := damaged(target):
            raise UnavailableError(f"{target / file} is damaged; delete the folder {target} to fetch it again")
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
            partial = Path(scratch) / name
            partial.mkdir()
            for url in SOURCES[name].urls:
                log.info("fetching %s", url)
                _unpack(_get(url, Path(scratch) / "file"), url, partial)
            write_checksums(partial)
            partial.rename(target)
    except OSError as error:
        raise UnavailableError(f"{target} cannot be written ({error}); nothing was kept: choose another folder, or "
                               "free the disk") from error  # fmt: skip
    return target


def _get(url: str, path: Path) -> Path:
    request = urllib.request.Request(url, headers={"User-Agent": "maxent-decoding"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, path.open("wb") as file:
            shutil.copyfileobj(answer, file)
    except (OSError, urllib.error.URLError) as error:
        raise UnavailableError(
            f"cannot fetch {url} ({error}); connect to a network, or put the files into a folder and name it with "
            "--data-dir"
        ) from error
    return path


def _unpack(path: Path, url: str, folder: Path, *, depth: int = 1) -> None:
    """A zip's files without the folders they all share, also those of archives in it; any other file under its name."""
    if not zipfile.is_zipfile(path):
        shutil.move(path, folder / PurePosixPath(urllib.request.url2pathname(url)).name)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            _extract(archive, url, folder)
    except DTSError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted, other methods
        raise UnavailableError(f"{url}: the archive cannot be read ({error}); nothing was kept") from error
    if depth:
        for inner in sorted(folder.glob("*.zip")):
            kept = inner.rename(path.with_name("inner"))
            _unpack(kept, url, folder, depth=depth - 1)


def _extract(archive: zipfile.ZipFile, url: str, folder: Path) -> None:
    members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX")]
    paths = [PurePosixPath(member.filename) for member in members]
    for path in paths:
        if path.is_absolute() or ".." in path.parts or "\\" in str(path):
            raise UnavailableError(f"{url}: the archive holds the path {str(path)!r}; nothing was kept")
    shared = _shared_folder(paths)
    for member, path in zip(members, paths, strict=True):
        place = (folder / path.relative_to(shared)).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise UnavailableError(f"{url}: the archive holds the path {member.filename!r}; nothing was kept")
        place.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member) as source, place.open("wb") as file:  # also a link becomes a plain file
            shutil.copyfileobj(source, file)


def _shared_folder(paths: list[PurePosixPath]) -> PurePosixPath:
    """The longest folder of all these relative paths."""
    shared = paths[0].parent if paths else PurePosixPath()
    while not all(path.is_relative_to(shared) for path in paths):
        shared = shared.parent
    return shared
