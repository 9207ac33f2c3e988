"""The package works however it got onto the machine: a wheel, an editable install, or a bare clone."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "setup.cfg",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "run_recbole_llm.py",
    "recbole_llm",
    "properties",
)
# ray is barred: RecBole's has no build for Python 3.12, so nothing we import may ask for it.
WHERE = """
import sys
sys.modules["ray"] = None
import recbole_llm.cli, recbole_llm.quick_start
from recbole_llm.config import PROPERTIES
print(recbole_llm.__file__, PROPERTIES, sep="\\n")
"""


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Output of a command that must succeed, run in ``cwd`` with ``path`` as PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def yamls(folder: Path) -> set[str]:
    """The YAML files below a folder, by their path in it."""
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*.yaml")}


def assert_found(python: str | Path, below: Path, cwd: Path, path: Path | None = None) -> None:
    """The package that ``python`` imports lies ``below``, and finds the repository's YAML files."""
    package, properties = run(python, "-c", WHERE, cwd=cwd, path=path).splitlines()[-2:]
    assert Path(package).is_relative_to(below)
    assert yamls(Path(properties)) == yamls(ROOT / "properties") != set()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that builds leave nothing in the repository."""
    copy = tmp_path_factory.mktemp("clone").resolve()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree, cwd=folder)
    return folder


@pytest.fixture
def clean_python(tmp_path: Path) -> Path:
    """An interpreter that has what this one has, except ``recbole_llm``.

    A path file inside a folder that a path file names is not read: an editable install here stays out of it.
    """
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", scheme))
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return Path(sysconfig.get_path("scripts", "venv", scheme)) / "python"


def options(section: str) -> configparser.SectionProxy:
    """A section of setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser[section]


def requirements() -> list[Requirement]:
    """What setup.cfg says the package needs."""
    lines = options("options")["install_requires"].splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_package_is_listed() -> None:
    """setup.cfg lists packages by hand, because properties/ lies beside ``recbole_llm``."""
    folders = [file.parent.relative_to(ROOT) for file in (ROOT / "recbole_llm").rglob("__init__.py")]
    found = {".".join(folder.parts) for folder in folders}
    assert set(options("options")["packages"].split()) == found | {"recbole_llm.properties"}


def test_sdist_is_complete(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {f"properties/{name}" for name in yamls(ROOT / "properties")}
    assert names >= {"LICENSE", "run_recbole_llm.py", "pyproject.toml"}


def test_wheel_installs_only_our_package(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        top = {name.partition("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"recbole_llm"}


def test_wheel_finds_its_properties(built: Path, tmp_path: Path) -> None:
    wheel, site = next(built.glob("*.whl")), tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    assert_found(sys.executable, below=site, cwd=tmp_path, path=site)


def test_editable_install_has_properties_and_command(tree: Path, clean_python: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--python", clean_python)
    run(*pip, "install", "-qq", "--no-deps", "--no-build-isolation", "--editable", tree, cwd=tmp_path)
    assert_found(clean_python, below=tree, cwd=tmp_path)
    assert "compare" in run(clean_python.parent / "recbole-llm", "--help", cwd=tmp_path)


def test_bare_clone_runs(tree: Path, clean_python: Path, tmp_path: Path) -> None:
    assert_found(clean_python, below=tree, cwd=tmp_path, path=tree)
    assert "--dataset" in run(clean_python, tree / "run_recbole_llm.py", "--help", cwd=tmp_path)


def test_python_3_12_asks_for_all_recbole_needs() -> None:
    """From 3.12 on RecBole is installed without its dependencies: ours have to cover them, except ray."""
    newer = {"python_version": "3.12"}
    ours = {r.name: r.specifier for r in requirements() if r.marker is None or r.marker.evaluate(newer)}
    theirs = [Requirement(line) for line in importlib.metadata.requires("recbole") or []]
    needed = {r.name.lower(): r.specifier for r in theirs if r.marker is None}
    assert "recbole" not in ours
    assert set(needed) - {"ray"} <= set(ours)
    pinned = {name for name, specifier in needed.items() if str(specifier).startswith("==")}
    assert {name: ours[name] for name in pinned} == {name: needed[name] for name in pinned}


def interpreter(version: str) -> str:
    """A Python of this version that really starts, or the test is skipped."""
    found = shutil.which(f"python{version}")
    if not found or subprocess.run([found, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no Python {version} here")
    return found


def placeholder_torch(folder: Path) -> str:
    """A wheel that calls itself torch and holds nothing: the real one may weigh gigabytes.

    Returns:
        What to ask pip for.
    """
    files = {
        "METADATA": "Metadata-Version: 2.1\nName: torch\nVersion: 99.0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / "torch-99.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(f"torch-99.0.dist-info/{name}", text)
    return "torch==99.0"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_newer_pythons_resolve(version: str, tmp_path: Path) -> None:
    """pip finds a set of wheels for everything but torch; nothing is installed."""
    run(interpreter(version), "-m", "venv", tmp_path / "environment", cwd=tmp_path)
    pip = [
        tmp_path / "environment" / "bin" / "python",
        "-m",
        "pip",
        "install",
        "-qq",
        "--dry-run",
        "--only-binary=:all:",
        "--find-links",
        tmp_path,
    ]
    wanted = [*map(str, requirements()), placeholder_torch(tmp_path)]
    done = subprocess.run([*map(str, pip), *wanted], cwd=tmp_path, capture_output=True, text=True)
    if "(from versions: none)" in done.stderr and "torch" not in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    run(*pip, "--no-deps", "recbole==1.2.1", cwd=tmp_path)


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\n', encoding="utf-8")
    old.chmod(0o755)
    done = subprocess.run([ROOT / "scripts/setup_env.sh", "run", old], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Python 3.11 or newer" in done.stderr and "3.9.1" in done.stderr
