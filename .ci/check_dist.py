"""Checks the wheel and the sdist in dist/, and runs the wheel in a new environment.

The environment takes torch and the other dependencies from the one that runs this script, since they are gigabytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "import abtrain; print(abtrain.__file__); assert abtrain.ABTraining and abtrain.recipes.ab_outer(1_000)"


def only(pattern: str) -> Path:
    """Returns the one file in dist/ that matches."""
    found = list((ROOT / "dist").glob(pattern))
    assert len(found) == 1, f"dist/ has {len(found)} files like {pattern}, but must have one: run make dist"
    return found[0]


def check_wheel(wheel: Path) -> None:
    """The wheel has all files of the package, the licence, the command, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = next(name.split("/")[0] for name in names if ".dist-info/" in name)
        metadata = archive.read(f"{about}/METADATA").decode()
        commands = archive.read(f"{about}/entry_points.txt").decode()
    files = (path for path in (ROOT / "src" / "abtrain").rglob("*") if path.is_file() and path.suffix != ".pyc")
    package = {path.relative_to(ROOT / "src").as_posix() for path in files}
    assert {"abtrain/py.typed", "abtrain/commands/page.html.j2"} <= package
    rest = {name for name in names if not name.startswith(f"{about}/")}
    assert rest == package, f"only in the wheel or in src/: {sorted(rest ^ package)}"
    assert f"{about}/licenses/LICENSE" in names
    assert "abtrain = abtrain.commands.cli:main" in commands
    assert "# abtrain" in metadata, "README is not the description"


def check_sdist(sdist: Path) -> None:
    """The sdist has the sources, and what a reader or a packager looks for."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "src/abtrain/py.typed", "tests/conftest.py"}
    assert needed <= names, f"missing: {sorted(needed - names)}"


def run_installed(wheel: Path) -> None:
    """Installs the wheel alone in a new environment, and runs its commands in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "venv"
        venv.create(place, symlinks=True)
        python, abtrain = place / "bin" / "python", place / "bin" / "abtrain"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
        site = next((place / "lib").glob("python*")) / "site-packages"
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

        def run(*command: object) -> str:
            words = list(map(str, command))
            return subprocess.run(words, check=True, text=True, stdout=-1, cwd=folder, env=environment).stdout

        assert run(python, "-c", PROGRAM).startswith(str(site))
        assert run(abtrain, "--version").split()[-1] == wheel.name.split("-")[1]
        assert "ab_outer" in run(abtrain, "recipes")
        run(abtrain, "train", "ddp", "--task", "digits-mlp", "--steps", 1, "--workers", 1, "--out", "run")
        assert (Path(folder) / "run" / "model.safetensors").exists()


if __name__ == "__main__":
    check_wheel(only("*.whl"))
    check_sdist(only("*.tar.gz"))
    run_installed(only("*.whl"))
    print("the wheel and the sdist are complete, and the wheel runs")
