"""The machine that a measurement ran on, and the spread of what was measured in turns."""

import importlib.metadata
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

PACKAGES = ("torch", "sentence-transformers", "pymilvus", "milvus-lite")


def machine() -> str:
    """Return CPU, cores, memory and versions, in a line."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1] for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    cpu = names[0].strip() if names else platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    installed = {distribution.name.replace("_", "-").lower() for distribution in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if name in installed)
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {sys.version.split()[0]}, {versions}"


def computing_on(device: torch.device) -> str:
    """Return the device, PyTorch's threads and the machine, in a line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, {torch.get_num_threads()} threads; {machine()}"


def spread(values: Sequence[float], unit: str = "", digits: int = 1) -> str:
    """Return median, least and most of some numbers, as text."""
    numbers = [f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values))]
    return f"{numbers[0]}{unit} ({numbers[1]} to {numbers[2]})"
