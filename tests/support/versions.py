"""Run the tests of model, conformance and other programs under several versions of transformers.

    python -m tests.support.versions                  # oldest, newest and installed version
    python -m tests.support.versions oldest newest    # in CI, which tests the installed one anyway
    python -m tests.support.versions 5.16.0           # any other version

Each version has an environment of its own, `.venv-VERSION`. It holds transformers and the packages
that need another version with it; all else is shared with the Python that runs this.
"""

import os
import re
import subprocess
import sys
import sysconfig
import time
import venv
from importlib.metadata import version
from pathlib import Path

from configuration_retro.configuration_retro import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS

from .once import made_once

ROOT = Path(__file__).parents[2]
TESTS = ["tests/modeling_retro", "tests/conformance", "tests/programs"]
# Packages that the tests and the project import, and that may need another version with
# transformers.
OTHERS = ["accelerate", "datasets", "lm-eval", "peft", "sentence-transformers", "trl"]


def environment(wanted: str) -> Path:
    """Return the Python of a version's environment, which is made if it does not exist."""

    def make(folder: Path) -> None:
        venv.create(folder, with_pip=False)
        (packages,) = folder.glob("lib/python*/site-packages")
        shared = sysconfig.get_path("purelib")
        # Its own packages come first. addsitedir, unlike a bare path, reads the .pth files there,
        # too.
        (packages / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
        pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
        options = ["--disable-pip-version-check", "--no-warn-conflicts", "--no-warn-script-location"]
        subprocess.run([*pip, *options, f"transformers=={wanted}", *OTHERS], check=True)

    return made_once(ROOT / f".venv-{wanted.removesuffix('.*')}", make) / "bin" / "python"


def run(python: Path) -> list[str]:
    """Run the tests with a Python; return a row of the table."""
    show = "import transformers; print(transformers.__version__)"
    found = subprocess.run([python, "-c", show], check=True, capture_output=True, text=True).stdout.strip()
    print(f"\n== transformers {found} ==", flush=True)
    started = time.monotonic()
    side_by_side = ["-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]
    command = [python, "-m", "pytest", "-q", *side_by_side, *TESTS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    closing = ""
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as tests:
        for line in tests.stdout:
            print(line, end="", flush=True)
            closing = line if re.search(r"\d (passed|failed|error).* in [\d.]+s", line) else closing
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", closing)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if not counts or (tests.returncode and not failed):
        sys.exit(f"pytest ended with status {tests.returncode} under transformers {found}.")
    numbers = counts.get("passed", 0), failed, counts.get("skipped", 0)
    return [found, *map(str, numbers), f"{time.monotonic() - started:.0f} s"]


def main() -> None:
    (oldest, newest) = (".".join(map(str, line)) for line in (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS))
    names = {"oldest": f"{oldest}.0", "newest": f"{newest}.*", "installed": version("transformers")}
    wanted = [names.get(name, name) for name in sys.argv[1:] or names]
    rows = [run(environment(name)) for name in wanted]
    for row in [["transformers", "passed", "failed", "skipped", "time"], *rows]:
        print("".join(f"{text:>13}" for text in row))
    failed = sum(int(row[2]) for row in rows)
    print(f"{sum(int(row[1]) for row in rows)} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
