"""A real headless Chromium for tests of pages.

python -m tests.support.browser      installs it if it is missing
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock
from playwright.sync_api import Browser, Playwright, sync_playwright

from .once import cache_folder

NAMES = ("chromium", "chromium-browser", "google-chrome")
APT = ("apt-get", "-o", "DPkg::Lock::Timeout=600")  # seconds to wait for another apt
MISSING = "Chromium is not installed. Run `python -m tests.support.browser`, or install your system's chromium."


def find_chromium(playwright: Playwright) -> str | None:
    """Return the path of the system's Chromium, or of Playwright's own."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    own = playwright.chromium.executable_path
    return found or (own if Path(own).exists() else None)


def open_chromium(playwright: Playwright) -> Browser:
    """Start Chromium without a window.

    Raises:
        RuntimeError: it is not installed.
    """
    path = find_chromium(playwright)
    if path is None:
        raise RuntimeError(MISSING)
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])


def install() -> None:
    """Install Chromium if it is missing. Processes that ask for it meanwhile wait."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_folder() / "chromium.lock"):
        with sync_playwright() as playwright:
            if find_chromium(playwright):
                return
        as_root = () if os.geteuid() == 0 else ("sudo", "-n") if shutil.which("sudo") else None
        if as_root is not None and shutil.which("apt-get"):
            steps = (["update"], ["install", "-y", "chromium"])
            if all(subprocess.run([*as_root, *APT, *step]).returncode == 0 for step in steps):
                return
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)


if __name__ == "__main__":
    install()
