"""Group tests that run in parallel: by file, and in one group all that need the Milvus server."""

import pytest

# The longest groups start first, so that no process works alone at the end.
LONGEST = ["server", "test_failures.py", "test_resuming.py", "test_many_processes.py", "test_conformance.py"]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    def group(item):
        return "server" if item.get_closest_marker("server") else item.path.name

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(group(item), len(LONGEST)))
