"""Group tests that run in parallel, by file or by the server they need, and bound their memory."""

import resource

import pytest

MOST_MEMORY = 10 * 2**30  # bytes; a test that takes more fails with a traceback, and does not fill the machine
# The longest groups start first, so that no process works alone at the end.
LONGEST = ["server", "test_failures.py", "test_resuming.py", "test_many_processes.py", "test_conformance.py"]


def pytest_configure():
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MOST_MEMORY if most == resource.RLIM_INFINITY else min(MOST_MEMORY, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    def group(item):
        return "server" if item.get_closest_marker("server") else item.path.name

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(group(item), len(LONGEST)))
