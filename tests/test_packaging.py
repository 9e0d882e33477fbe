"""The layout, the pins, and what a wheel holds."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dts

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("models", "search", "training", "evaluation")


def sources(folder: str) -> list[Path]:
    """The Python files of a top-level folder, without those its links lead to."""
    return [Path(root) / file for root, _, files in os.walk(ROOT / folder) for file in files if file.endswith(".py")]


def imported(file: Path) -> set[str]:
    """Dotted names of modules that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("folder", LINKED)
def test_the_links_are_relative_and_lead_to_the_real_folders(folder):
    assert (ROOT / "dts" / folder).readlink() == Path("..", folder)
    assert (ROOT / folder / "__init__.py").is_file()


def test_nobody_imports_a_top_level_folder_by_its_bare_name():
    for file in [f for folder in ("dts", *LINKED, "tests", "benchmarks") for f in sources(folder)]:
        assert not {name.split(".")[0] for name in imported(file)} & set(LINKED), file


def test_the_linter_forbids_the_bare_names():
    pytest.importorskip("ruff", reason="ruff is part of the dev extra")
    code = "from search.search import Search\nimport models\n"
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--stdin-filename",
        "tests/x.py",
        "--output-format",
        "concise",
        "-",
    ]
    done = subprocess.run(command, input=code, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.count("TID251") == 2 and "Import dts.search" in done.stdout


def test_every_dependency_is_pinned_within_its_range():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {normal(pin.name): next(iter(pin.specifier)).version for pin in pins}
    assert len(versions) == len(pins) and not any("+" in version for version in versions.values())
    described = project()
    extras = described["optional-dependencies"]
    tested = [
        text
        for name in ("constraints", "dev", "engines", "ray", "serve", "tensorboard", "train")
        for text in extras[name]
    ]
    for text in [*described["dependencies"], *tested]:
        wanted = Requirement(text)
        if wanted.name == described["name"]:  # its own extras, which are in the list
            assert wanted.extras == {"constraints", "engines", "ray", "serve", "tensorboard", "train"}
            continue
        assert wanted.specifier.contains(versions[normal(wanted.name)]), text


def test_the_lowest_versions_are_the_ones_that_were_tested():
    """`make lowest` installs every dependency at its bound, torch apart: that is run at one version only."""
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = {normal(pin.name): pin for pin in map(Requirement, (line for line in lines if not line.startswith("#")))}
    described = project()
    extras = described["optional-dependencies"]
    wanted = [
        *described["dependencies"],
        *(text for name in ("constraints", "ray", "tensorboard", "train") for text in extras[name]),
    ]
    assert {normal(Requirement(text).name) for text in wanted} == set(pins)
    for text in wanted:
        if normal(Requirement(text).name) != "torch":
            assert str(Requirement(text.replace(">=", "=="))) == str(pins[normal(Requirement(text).name)])


# -- version, sdist and wheel ------------------------------------------------------------------------------------------


def needs_build_tools() -> None:
    missing = [name for name in ("build", "setuptools_scm", "twine") if importlib.util.find_spec(name) is None]
    if missing or shutil.which("git") is None:
        pytest.skip(f"needs git and the dev extra ({', '.join(missing) or 'no git'})")
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools>=77, which is part of the dev extra")


def run(folder: Path, *command: str | Path) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "SETUPTOOLS_SCM_"))}
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def git(folder: Path, *command: str) -> str:
    return run(
        folder, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false", *command
    )


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "a change")


def version_of(folder: Path) -> str:
    return run(folder, sys.executable, "-W", "ignore", "-m", "setuptools_scm").splitlines()[-1]


def exported(folder: Path, to: Path) -> Path:
    git(folder, "archive", "--output", str(to.with_suffix(".tar")), "HEAD")
    with tarfile.open(to.with_suffix(".tar")) as archive:
        archive.extractall(to, filter="data")
    return to


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """An sdist and the wheel made of it, from a copy of the tree with a tag, and a file that is not to be in them."""
    needs_build_tools()
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    for folder in ("dts", *LINKED):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    for file in ("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / file, copy / file)
    (copy / "tests").mkdir()
    (copy / "tests" / "test_nothing.py").touch()
    git(copy, "init", "--quiet")
    commit(copy)
    git(copy, "tag", "v7.8.9")
    run(copy, sys.executable, "-m", "build", "--no-isolation", "--outdir", out)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


def test_the_version_is_that_of_the_tag(built):
    assert built["sdist"].name == "maxent_decoding-7.8.9.tar.gz"
    assert built["wheel"].name == "maxent_decoding-7.8.9-py3-none-any.whl"
    assert run(built["wheel"].parent, sys.executable, "-m", "twine", "--no-color", "check", "--strict", *built.values())


def library() -> set[str]:
    """What a wheel must hold: the files that git would track, under dts/."""
    core = {file.relative_to(ROOT).as_posix() for file in sources("dts")}
    kinds = (".py", ".yaml", ".html", ".css", ".js")
    files = [p for folder in LINKED for p in (ROOT / folder).rglob("*") if p.suffix in kinds]
    linked = {f"dts/{p.relative_to(ROOT).as_posix()}" for p in files if "results" not in p.parts}
    return core | linked | {"dts/py.typed"}


def test_a_wheel_holds_the_whole_library_under_dts_and_nothing_else(built):
    names = zipfile.ZipFile(built["wheel"]).namelist()
    about = "maxent_decoding-7.8.9.dist-info"
    assert {name for name in names if not name.startswith(about)} == library()
    assert len(set(names)) == len(names) and f"{about}/licenses/LICENSE" in names


def test_an_sdist_holds_real_files_and_nothing_else(built):
    with tarfile.open(built["sdist"]) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)  # no links
    names = {member.name.split("/", 1)[1] for member in members if member.isfile()}
    written = {name for name in names if name.startswith("maxent_decoding.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    texts = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
    assert names - written - texts == library() and texts - {"MANIFEST.in"} <= names


def test_the_wheel_works_from_another_folder(built, tmp_path):
    code = (
        "import dts, dts.fetch, dts.search, dts.models.registry as r\n"
        "print(dts.__version__, dts.__file__, len(r.MODEL_CONFIGS), dts.search.MaxEnt.__module__)"
    )
    wheel = str(built["wheel"])
    environment = os.environ | {"PYTHONPATH": wheel}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"7.8.9 {wheel}") and "dts.search.maxent" in done.stdout


def test_every_way_to_get_the_sources_has_a_version(tmp_path):
    needs_build_tools()
    project, clone, plain = (tmp_path / name for name in ("project", "clone", "plain"))
    project.mkdir()
    for file in ("pyproject.toml", ".gitattributes", ".git_archival.txt"):
        shutil.copy(ROOT / file, project / file)
    shutil.copytree(project, plain)
    assert version_of(plain) == "0.0"  # a copy without .git
    git(project, "init", "--quiet")
    commit(project)
    commit(project)
    assert re.fullmatch(r"0\.1\.dev2\+g[0-9a-f]+", version_of(project))  # no tags yet
    git(tmp_path, "clone", "--quiet", "--depth", "1", project.as_uri(), str(clone))
    assert re.fullmatch(r"0\.1\.dev1\+g[0-9a-f]+", version_of(clone))  # CI's kind of clone
    assert version_of(exported(project, tmp_path / "early")) == "0.0"
    git(project, "tag", "v0.3.0")
    assert version_of(project) == "0.3.0"
    # What a hosting site offers as the source code of a release:
    assert version_of(exported(project, tmp_path / "export")) == "0.3.0"
    commit(project)
    assert re.fullmatch(r"0\.3\.1\.dev1\+g[0-9a-f]+", version_of(project))


def test_an_installed_copy_says_the_version_of_its_metadata():
    try:
        installed = importlib.metadata.version("maxent-decoding")
    except importlib.metadata.PackageNotFoundError:
        installed = "0.0"
    assert dts.__version__ == installed
