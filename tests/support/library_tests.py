"""transformers' own test modules, downloaded and imported as `transformers_tests`."""

import importlib
import importlib.util
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import transformers
from transformers.models.auto import modeling_auto

from .once import cache_folder, made_once

PACKAGE = "transformers_tests"

# modules that some source distributions leave out although their tests, or this module, import them
MISSING = (
    "distributed_testing_utils",
    "exporters.test_export",
    "generation.test_utils",
    "test_fsdp_mixin",
    "utils.test_configuration_utils",
)


class Stub(types.ModuleType):
    """A module that is missing; every name imported from it is an empty class."""

    __path__: list[str] = []
    config_common_kwargs: dict = {}  # values that ConfigTester checks

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


def fetch(folder: Path) -> None:
    """Download the installed version's source distribution, and keep its folder `tests`."""
    version = transformers.__version__
    with tempfile.TemporaryDirectory(dir=folder) as unpacked:
        pip = [sys.executable, "-m", "pip", "download", f"transformers=={version}", "--dest", unpacked]
        # no dependencies, no isolated build: pip reads the metadata with the setuptools at hand
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        subprocess.run([*pip, *options], check=True)
        (archive,) = Path(unpacked).glob("*.tar.gz")
        with tarfile.open(archive) as source:
            wanted = [file for file in source if file.name.startswith(f"transformers-{version}/tests/")]
            source.extractall(unpacked, wanted, filter="data")
        (Path(unpacked) / f"transformers-{version}" / "tests").rename(folder / "tests")
    (folder / "tests" / "__init__.py").touch()


def load(folder: Path) -> None:
    """Make `transformers_tests` importable from the folder of test modules."""
    spec = importlib.util.spec_from_file_location(PACKAGE, folder / "__init__.py")
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    for path in MISSING:
        if not (folder / f"{path.replace('.', '/')}.py").exists():
            for name in {path.split(".")[0], path}:
                sys.modules[f"{PACKAGE}.{name}"] = Stub(f"{PACKAGE}.{name}")


load(made_once(cache_folder() / f"transformers-{transformers.__version__}", fetch) / "tests")
common = importlib.import_module(f"{PACKAGE}.test_modeling_common")
configuration = importlib.import_module(f"{PACKAGE}.test_configuration_common")
training = importlib.import_module(f"{PACKAGE}.test_training_mixin")
tensor_parallel = importlib.import_module(f"{PACKAGE}.test_tensor_parallel_mixin")
fsdp = importlib.import_module(f"{PACKAGE}.test_fsdp_mixin")

# the tests recognize models by class names; RetroForCausalLM registers itself
modeling_auto.MODEL_MAPPING_NAMES["retro"] = "RetroModel"
