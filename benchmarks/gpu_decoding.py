"""One side of gpu.py's decoding: a model that generates in bfloat16, with one cache or another."""

import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gpt2_small import Sizes, build_gpt2, build_retro
from gpu_sides import DECODING
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList

SETTLING = 8  # first steps that are left out: a compiled step records its CUDA graph there
OPEN_GATE = 0.5  # a fresh copy head is closed and would cost nothing


def cache_arguments(cache: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `generate()` for one of `CACHES`."""
    if cache == "dynamic":
        return {}
    arguments: dict[str, Any] = {"cache_implementation": "static", "disable_compile": cache == "static"}
    if cache == "compiled" and device.type == "cpu":  # the library compiles on GPUs only
        arguments["compile_config"] = CompileConfig(backend="eager", mode="default")
        arguments["compile_config"]._compile_all_devices = True
    return arguments


class Clock(LogitsProcessor):
    """Records when each step's logits are there, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._times: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Record the time, and return the scores as they are."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._times.append(event)
        else:
            self._times.append(time.perf_counter())
        return scores

    def milliseconds(self, first: int) -> list[float]:
        """Return the milliseconds of each step after the `first`."""
        pairs = zip(self._times[first:-1], self._times[first + 1 :], strict=True)
        if self._is_cuda:
            torch.cuda.synchronize()
            return [before.elapsed_time(after) for before, after in pairs]
        return [1000 * (after - before) for before, after in pairs]


class Decoder:
    """A side's model, and the tasks that it answers."""

    def __init__(self, side: str, sizes: Sizes, device: torch.device, prompt: int, new: int) -> None:
        torch.manual_seed(0)
        # graphs of one model: two batch sizes, steps with and without a point, growing lengths
        torch._dynamo.config.recompile_limit = 64
        self.side, self.sizes, self.device, self.new, self.prompt = DECODING[side], sizes, device, new, prompt
        is_gpt2, length = self.side.kind == "gpt2", prompt + new
        model: Any = build_gpt2(sizes, length) if is_gpt2 else build_retro(sizes, length, **self.side.settings)
        if self.side.reads and model.config.copy_head:
            torch.nn.init.constant_(model.copy_head.gate_scale, OPEN_GATE)
        self.model = model.to(device, torch.bfloat16).eval()

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Generate once with a `cache` and some `rows`, timed; or profile one row."""
        return self.count() if task.get("profile") else self.measure(task["cache"], task["rows"])

    def measure(self, cache: str, rows: int) -> dict[str, Any]:
        """Return milliseconds a token, seconds in all, and GiB at most."""
        is_cuda = self.device.type == "cuda"
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        clock = Clock(self.device)
        start = time.perf_counter()
        self._generate(cache, rows, clock)
        steps = clock.milliseconds(min(SETTLING, self.new // 2))
        memory = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0
        return {"ms": sum(steps) / len(steps), "seconds": time.perf_counter() - start, "gib": memory}

    def count(self) -> dict[str, Any]:
        """Return a token's kernels, their time, and the waits by place, with a dynamic cache."""
        if self.device.type != "cuda":
            return {"error": "there is no GPU"}
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self._generate("dynamic", 1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = Counter(
            f"{'/'.join(Path(wait.filename).parts[-2:])}:{wait.lineno}"
            for wait in waits
            if "synchronizing" in str(wait.message)
        )
        found = {"waits": {place: round(number / self.new, 2) for place, number in places.most_common(12)}}
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self._generate("dynamic", 1)
        kernels = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
        milliseconds = sum(event.time_range.elapsed_us() for event in kernels) / 1000
        return found | {"kernels": len(kernels) / self.new, "device_ms": milliseconds / self.new}

    def _generate(self, cache: str, rows: int, *processors: LogitsProcessor) -> None:
        torch.manual_seed(1)
        tokens = self.sizes.random_tokens(rows, self.prompt, device=self.device)
        arguments: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0, "do_sample": False}
        if self.side.reads:
            points = (self.prompt + self.new) // self.sizes.chunk
            arguments["neighbor_ids"] = self.sizes.random_neighbors(rows, points, self.device)
        arguments |= cache_arguments(cache, self.device)
        written = self.model.generate(
            tokens, max_new_tokens=self.new, logits_processor=LogitsProcessorList(processors), **arguments
        )
        assert written.shape == (rows, self.prompt + self.new)
