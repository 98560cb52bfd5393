"""The checks of gpu.py: a device computes what the CPU computes.

Models have random weights, all away from their start, and neighbors that partly repeat the text, so
that cross-attention and the copy head matter. Errors are relative: ‖device − CPU‖ / ‖CPU‖.
"""

import copy
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from gpt2_small import GPT2_SMALL, TINY, Sizes, build_retro
from gpu_decoding import cache_arguments
from gpu_sides import CACHES
from gpu_training import measured_peak

from modeling_retro import RetroForCausalLM

FLOAT32, BFLOAT16 = 1e-4, 5e-2  # the greatest relative errors
GRADIENT = 1e-3  # of the parameter that is furthest off
NOISE = 0.05  # added to each parameter
GATE = 0.5
REPEATED = 12  # tokens of a neighbor that repeat the text before and after its point
SIZES = {"tiny": TINY, "gpt2-small": GPT2_SMALL}

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Check:
    """A comparison.

    Attributes:
        sizes: the model's.
        method: of `Pair`, returns the error.
        argument: its argument.
        tolerance: the greatest error that passes.
    """

    sizes: str
    method: Callable[["Pair", Any], float]
    argument: bool | str
    tolerance: float


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖found − expected‖ / ‖expected‖."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


class Pair:
    """The same float32 model on the CPU and on the device, and inputs for it."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        torch.manual_seed(0)
        self.sizes, self.device, self.length = sizes, device, 3 * sizes.chunk + 5
        self.cpu = build_retro(sizes, 2 * self.length, copy_head=True, cca_match=True).eval()
        with torch.no_grad():
            for parameter in self.cpu.parameters():
                parameter.add_(NOISE * torch.randn_like(parameter))
            self.cpu.copy_head.gate_scale.fill_(GATE)
        self.other = copy.deepcopy(self.cpu).to(device)
        self.inputs = self._inputs(2)
        self._expected: dict[Any, torch.Tensor] = {}

    def _inputs(self, batch_size: int) -> Inputs:
        chunk = self.sizes.chunk
        tokens = self.sizes.random_tokens(batch_size, self.length)
        neighbors = self.sizes.random_neighbors(batch_size, self.length // chunk)
        for point in range(neighbors.shape[1]):
            end = (point + 1) * chunk
            passage = tokens[:, end - REPEATED // 2 : end + REPEATED // 2]
            neighbors[:, point, 0, : passage.shape[1]] = passage
        return {"input_ids": tokens, "neighbor_ids": neighbors}

    def run(self, model: RetroForCausalLM, **arguments: Any) -> Any:
        """Run a model on the inputs, on its device."""
        return model(**{name: value.to(model.device) for name, value in self.inputs.items()}, **arguments)

    def expected_logits(self, use_retrieval: bool) -> torch.Tensor:
        """Return the CPU's logits, computed once."""
        if use_retrieval not in self._expected:
            self._expected[use_retrieval] = self.run(self.cpu, use_retrieval=use_retrieval).logits
        return self._expected[use_retrieval]

    # Each check returns its error.

    @torch.no_grad()
    def logits(self, use_retrieval: bool) -> float:
        """Compare the logits of a forward pass."""
        found = self.run(self.other, use_retrieval=use_retrieval).logits
        return relative_error(found, self.expected_logits(use_retrieval))

    @torch.no_grad()
    def cached_logits(self, use_retrieval: bool) -> float:
        """Compare logits, token by token over a point, with those of one pass on the CPU."""
        tokens, neighbors = (self.inputs[name].to(self.device) for name in ("input_ids", "neighbor_ids"))
        chunk = self.sizes.chunk
        start = 3 * chunk - 3  # the third point is reached three tokens later
        arguments: dict[str, Any] = {"use_retrieval": use_retrieval, "use_cache": True}
        out = self.other(tokens[:, :start], neighbor_ids=neighbors[:, :2], **arguments)
        logits = [out.logits]
        for column in range(start, self.length):
            arguments["past_key_values"] = out.past_key_values if "past_key_values" in out else out.cache
            given = {"neighbor_ids": neighbors[:, 2:]} if column == 3 * chunk - 1 else {}
            out = self.other(tokens[:, column : column + 1], **given, **arguments)
            logits.append(out.logits)
        return relative_error(torch.cat(logits, 1), self.expected_logits(use_retrieval))

    def gradients(self, use_retrieval: bool) -> float:
        """Compare the gradients of all parameters; return the error of the worst."""
        found = {}
        for model in (self.cpu, self.other):
            model.zero_grad()
            labels = self.inputs["input_ids"].to(model.device)
            self.run(model, labels=labels, use_retrieval=use_retrieval, use_cache=False).loss.backward()
            found[model] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
        assert found[self.cpu].keys() == found[self.other].keys()
        largest = max(float(gradient.norm()) for gradient in found[self.cpu].values())
        # a gradient that is all but zero has no relative error
        return max(
            relative_error(found[self.other][name], gradient)
            for name, gradient in found[self.cpu].items()
            if float(gradient.norm()) > 1e-5 * largest
        )

    @torch.no_grad()
    def bfloat16_logits(self, use_retrieval: bool) -> float:
        """Compare the logits of the device in bfloat16 with the CPU's in float32."""
        model = copy.deepcopy(self.other).to(torch.bfloat16)
        found = self.run(model, use_retrieval=use_retrieval).logits
        return relative_error(found, self.expected_logits(use_retrieval))

    def tokens(self, cache: str) -> float:
        """Return the part of greedy tokens that differ from the CPU's, over a point."""
        if "tokens" not in self._expected:
            self._expected["tokens"] = self._write(self.cpu, {})
        written = self._write(self.other, cache_arguments(cache, self.device))
        return float((written != self._expected["tokens"]).double().mean())

    def _write(self, model: RetroForCausalLM, arguments: dict[str, Any]) -> torch.Tensor:
        """Generate greedily over one more point; return the tokens."""
        tokens, neighbors = (self.inputs[name].to(model.device) for name in ("input_ids", "neighbor_ids"))
        written = model.generate(
            tokens,
            neighbor_ids=torch.cat([neighbors, neighbors[:, :1]], 1),
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=self.sizes.chunk,
            do_sample=False,
            pad_token_id=0,
            **arguments,
        )
        return written.cpu()


def checks() -> dict[str, Check]:
    """Return the checks by name, in the order in which they run."""
    found: dict[str, Check] = {}
    for sizes in SIZES:
        for on in (True, False):
            neighbors = f"neighbors {'on' if on else 'off'}"
            for name, method, most in (
                ("float32 logits", Pair.logits, FLOAT32),
                ("float32 logits with a cache", Pair.cached_logits, FLOAT32),
                ("float32 gradients, worst parameter", Pair.gradients, GRADIENT),
                ("bfloat16 logits", Pair.bfloat16_logits, BFLOAT16),
            ):
                found[f"{sizes}: {name}, {neighbors}"] = Check(sizes, method, on, most)
        for cache in CACHES[:-1]:
            found[f"{sizes}: greedy tokens that differ, {cache} cache"] = Check(sizes, Pair.tokens, cache, 0.0)
    found["tiny: greedy tokens that differ, compiled"] = Check("tiny", Pair.tokens, CACHES[-1], 0.0)
    return found


class Checker:
    """Answers tasks: one check of one model each."""

    def __init__(self, device: torch.device) -> None:
        torch.set_float32_matmul_precision("highest")  # no TF32
        self.device = device
        self.pairs: dict[str, Pair] = {}

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """List the checks, run one of them, or describe the machine."""
        if task["what"] == "list":
            return {
                "checks": [name for name, check in checks().items() if check.sizes == "tiny" or not task["is_small"]]
            }
        if task["what"] == "machine":
            return machine(self.device, task["size"])
        return self.run(task["name"])

    def run(self, name: str) -> dict[str, Any]:
        """Run a check; return its error and the greatest that passes."""
        check = checks()[name]
        if check.sizes not in self.pairs:
            self.pairs[check.sizes] = Pair(SIZES[check.sizes], self.device)
        error = check.method(self.pairs[check.sizes], check.argument)
        return {"relative_error": error, "tolerance": check.tolerance, "passed": error <= check.tolerance}


def machine(device: torch.device, size: int) -> dict[str, Any]:
    """Return the machine, and the FLOP/s of a product of bfloat16 matrices of that size."""
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "transformers": transformers.__version__}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "cores": os.cpu_count(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "peak": measured_peak(device, size),
    }
