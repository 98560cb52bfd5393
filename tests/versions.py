"""Run the tests of the model, generation, conformance and remote code under several versions of transformers.

    python tests/versions.py                  the oldest and the newest that pyproject.toml allows, and the installed one
    python tests/versions.py oldest newest    CI: the installed one has run every test before
    python tests/versions.py 5.16.0           any others

Each version has an environment of its own, `.venv-VERSION`, which shares torch and all else with the environment of the
Python that runs this: it holds transformers, and what that version needs newer or older.
"""

import os
import subprocess
import sys
import sysconfig
import time
import venv
from importlib.metadata import requires, version
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.once import made_once  # noqa: E402

TESTS = ["tests/modeling", "tests/conformance", "tests/programs"]
# what these tests and the project import, each of which may want other versions beside this transformers
OTHERS = ["accelerate", "datasets", "lm-eval", "peft", "sentence-transformers", "trl"]


def supported() -> tuple[str, str]:
    """Return the oldest version that the project allows, and the newest line of versions, as pip reads them."""
    (transformers,) = [
        requirement
        for requirement in map(Requirement, requires("transformers-retro"))
        if requirement.name == "transformers" and requirement.marker is None
    ]
    bounds = {bound.operator: bound.version for bound in transformers.specifier}
    major, minor = map(int, bounds["<"].split("."))
    return f"{bounds['>=']}.0", f"{major}.{minor - 1}.*"


def environment(wanted: str) -> Path:
    """Return the Python of the environment that has this version of transformers, made if it is not there."""

    def make(folder: Path) -> None:
        venv.create(folder, with_pip=False)
        (packages,) = folder.glob("lib/python*/site-packages")
        shared = sysconfig.get_path("purelib")
        # its own packages come first; addsitedir, unlike a bare path, reads the .pth files there, too
        (packages / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
        options = ["--disable-pip-version-check", "--no-warn-conflicts", "--no-warn-script-location"]
        subprocess.run([*pip, *options, f"transformers=={wanted}", *OTHERS], check=True)

    return made_once(ROOT / f".venv-{wanted.removesuffix('.*')}", make) / "bin" / "python"


def run(python: Path) -> list[str]:
    """Run the tests; return a row of the table."""
    show = "import transformers; print(transformers.__version__)"
    found = subprocess.run([python, "-c", show], check=True, capture_output=True, text=True).stdout.strip()
    print(f"\n== transformers {found} ==", flush=True)
    report = python.parents[1] / "report.xml"
    report.unlink(missing_ok=True)
    started = time.monotonic()
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", f"--junitxml={report}", *TESTS]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    suite = ElementTree.parse(report).getroot()[0].attrib
    tests, skipped = int(suite["tests"]), int(suite["skipped"])
    failed = int(suite["failures"]) + int(suite["errors"])
    return [found, str(tests - failed - skipped), str(failed), str(skipped), f"{time.monotonic() - started:.0f} s"]


def main() -> None:
    oldest, newest = supported()
    names = {"oldest": oldest, "newest": newest, "installed": version("transformers")}
    wanted = [names.get(name, name) for name in sys.argv[1:] or names]
    rows = [run(environment(name)) for name in wanted]
    for row in [["transformers", "passed", "failed", "skipped", "time"], *rows]:
        print("".join(f"{text:>13}" for text in row))
    failed = sum(int(row[2]) for row in rows)
    print(f"{sum(int(row[1]) for row in rows)} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
