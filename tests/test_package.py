"""The wheel and the sdist hold everything that an installed Holdfast needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from places import ROOT

BUILD = "from setuptools import build_meta as b; b.build_sdist('out'); b.build_wheel('out')"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist of a copy of the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("package")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", copy / "src", ignore=ignored)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy / "out"


def sources() -> set[str]:
    """The files of the package, from `src`."""
    files = (
        p for p in (ROOT / "src" / "holdfast").rglob("*") if p.is_file() and "__pycache__" not in p.parts
    )
    return {p.relative_to(ROOT / "src").as_posix() for p in files}


def test_the_wheel_has_every_file_of_the_package(built):
    [wheel] = built.glob("*.whl")
    assert sources() <= set(zipfile.ZipFile(wheel).namelist())


def test_the_sdist_has_every_file_of_the_package(built):
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/src/")[2] for name in archive.getnames()}
    assert sources() <= names


def test_an_installed_wheel_works_outside_the_checkout(built, tmp_path):
    [wheel] = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import holdfast; print(holdfast.__file__);"
        "sys.argv[0] = 'holdfast'; from holdfast.cli.app import main; main()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "site"), "plan", "world", "--no-check"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout.splitlines()[0]
    assert "alignment" in done.stdout
