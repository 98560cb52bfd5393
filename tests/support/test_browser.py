"""Chromium is found, or installed once: with apt, and otherwise by Playwright."""

import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from . import browser

# Both processes ask before either installs, and installing takes a second: without the lock, both
# install.
INSTALL = """
import sys, time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from tests.support import browser

root, name, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def run(command, check=False):
    with open(root / "log", "a") as log:
        log.write(name)
    time.sleep(1)
    (root / "chromium").touch()
    return SimpleNamespace(returncode=0)

browser.cache_folder = lambda: root
browser.sync_playwright = lambda: nullcontext(None)
browser.find_chromium = lambda playwright: (root / "chromium").exists()
browser.shutil.which = lambda program: None
browser.subprocess.run = run
(root / name).touch()
while not (root / other).exists():
    time.sleep(0.01)
browser.install()
assert (root / "chromium").exists()
"""


def playwright_with(path):
    return SimpleNamespace(chromium=SimpleNamespace(executable_path=str(path)))


def test_the_systems_chromium_comes_before_playwrights(monkeypatch, tmp_path):
    own = tmp_path / "chrome"
    own.touch()
    monkeypatch.setattr(browser.shutil, "which", {"chromium-browser": "/usr/bin/chromium-browser"}.get)
    assert browser.find_chromium(playwright_with(own)) == "/usr/bin/chromium-browser"
    monkeypatch.setattr(browser.shutil, "which", lambda program: None)
    assert browser.find_chromium(playwright_with(own)) == str(own)


def test_a_missing_chromium_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(browser.shutil, "which", lambda program: None)
    with pytest.raises(RuntimeError, match="Chromium is not installed. Run `python -m tests.support.browser`"):
        browser.open_chromium(playwright_with(tmp_path / "missing"))


@pytest.mark.parametrize(
    "user, programs, failing, expected",
    [
        (0, {"apt-get"}, None, ["apt update", "apt install"]),
        (1000, {"apt-get", "sudo"}, None, ["sudo apt update", "sudo apt install"]),
        (0, {"apt-get"}, "update", ["apt update", "playwright install"]),
        (0, {"apt-get"}, "install", ["apt update", "apt install", "playwright install"]),
        (1000, {"apt-get"}, None, ["playwright install"]),
        (0, set(), None, ["playwright install"]),
    ],
)
def test_apt_installs_before_playwright(monkeypatch, tmp_path, user, programs, failing, expected):
    ran = []

    def run(command, check=False):
        tool = "playwright" if "playwright" in command else "apt"
        step = next(word for word in command if word in ("update", "install"))
        ran.append(" ".join([*command[: command[0] == "sudo"], tool, step]))
        return SimpleNamespace(returncode=int(tool == "apt" and step == failing))

    monkeypatch.setattr(browser, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(browser, "sync_playwright", lambda: nullcontext(playwright_with(tmp_path / "missing")))
    monkeypatch.setattr(browser.os, "geteuid", lambda: user)
    monkeypatch.setattr(browser.shutil, "which", lambda program: program if program in programs else None)
    monkeypatch.setattr(browser.subprocess, "run", run)
    browser.install()
    assert ran == expected


def test_two_processes_install_it_once(tmp_path):
    commands = [[sys.executable, "-c", INSTALL, tmp_path, *names] for names in ("ab", "ba")]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert len((tmp_path / "log").read_text()) == 1
