"""Packages import one way, modules never in a circle, and a model without a knowledge base."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package with those of this project that it may import.
MAY_IMPORT = {
    "configuration_retro": set(),
    "modeling_retro": {"configuration_retro"},
    "retrieval": set(),
    "data_retro": {"configuration_retro", "modeling_retro", "retrieval"},
    "evaluation_retro": {"configuration_retro", "modeling_retro", "retrieval", "data_retro"},
    "training_retro": {"configuration_retro", "modeling_retro", "retrieval", "data_retro", "evaluation_retro"},
}
DOORS = {"train_hf", "generate_hf"}
KNOWLEDGE_BASE_LIBRARIES = {"pymilvus", "milvus_lite", "sentence_transformers"}


def modules(package):
    """Return the files of a package by the names of their modules."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = {name: file for package in MAY_IMPORT for name, file in modules(package).items()}


def imported(module, file):
    """Yield the full names that a module imports anywhere in its code, for types alone too."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_of(name):
    """Return the module of this project that an imported name is or is in, or None."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def test_every_package_of_the_project_has_its_place():
    found = {file.parent.name for file in ROOT.glob("*_retro/__init__.py")} | {"retrieval"}
    assert found == set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_those_below_it(package):
    for module, file in modules(package).items():
        packages = {name.partition(".")[0] for name in imported(module, file)}
        above = packages & (set(MAY_IMPORT) | DOORS) - MAY_IMPORT[package] - {package}
        assert not above, f"{module} imports {sorted(above)}"


@pytest.mark.parametrize("package", ["configuration_retro", "modeling_retro"])
def test_a_model_needs_no_knowledge_base_library(package):
    for module, file in modules(package).items():
        assert not {name.partition(".")[0] for name in imported(module, file)} & KNOWLEDGE_BASE_LIBRARIES, module


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {module_of(name) for name in imported(module, file)} for module, file in MODULES.items()}
    graph = {module: found - {None, module} for module, found in graph.items()}
    # A package's __init__ imports its modules. A module that names its own package makes no circle.
    packages = set(MAY_IMPORT)
    graph = {
        module: found - packages if module.partition(".")[0] in found else found for module, found in graph.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
