"""Tests that run side by side: those of one file in one process, and all that need the server in one, as there is one server."""

import pytest

# They start first, so that no process is left with a long one at the end when the others have nothing to do.
LONGEST = ["server", "test_failures.py", "test_resuming.py", "test_many_processes.py", "test_conformance.py"]


@pytest.hookimpl(tryfirst=True)  # before the marks are read
def pytest_collection_modifyitems(items):
    def group(item):
        return "server" if item.get_closest_marker("server") else item.path.name

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(group(item), len(LONGEST)))
