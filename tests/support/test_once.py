"""A folder is made once, even if two processes ask for it or a run was interrupted."""

import subprocess
import sys

import pytest

from .once import made_once

# Both processes start before either continues, and the folder takes a second: without a lock, both
# make it.
MAKE = """
import sys, time
from pathlib import Path
from tests.support.once import made_once

root, name, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def make(folder):
    with open(root / "log", "a") as log:
        log.write(name)
    (folder / "part 1").touch(exist_ok=False)
    time.sleep(1)
    (folder / "part 2").touch(exist_ok=False)

(root / name).touch()
while not (root / other).exists():
    time.sleep(0.01)
made = made_once(root / "made", make)
assert (made / "part 1").exists() and (made / "part 2").exists()
"""


def test_two_processes_make_a_folder_once_and_both_get_it(tmp_path):
    commands = [[sys.executable, "-c", MAKE, tmp_path, *names] for names in ("ab", "ba")]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert len((tmp_path / "log").read_text()) == 1


def test_a_folder_left_half_made_is_made_again(tmp_path):
    def interrupted(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "made", interrupted)
    made = made_once(tmp_path / "made", lambda folder: (folder / "whole").touch())
    assert (made / "whole").exists() and not (made / "half").exists()
    assert made_once(made, interrupted) == made
