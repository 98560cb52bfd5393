"""Tests that run side by side: those of one file in one process, and all that need the server in one, as there is one server."""

import pytest


@pytest.hookimpl(tryfirst=True)  # before the marks are read
def pytest_collection_modifyitems(items):
    for item in items:
        group = "server" if item.get_closest_marker("server") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
