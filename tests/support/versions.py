"""Run the tests of the model, generation, conformance and remote code under several versions of transformers.

    python -m tests.support.versions                  the oldest and the newest that are supported, and the installed one
    python -m tests.support.versions oldest newest    CI: the installed one has run every test before
    python -m tests.support.versions 5.16.0           any others

Each version has an environment of its own, `.venv-VERSION`, which shares torch and all else with the environment of the
Python that runs this: it holds transformers, and what that version needs newer or older.
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
# what these tests and the project import, each of which may want other versions beside this transformers
OTHERS = ["accelerate", "datasets", "lm-eval", "peft", "sentence-transformers", "trl"]


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
