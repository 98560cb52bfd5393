"""Run train_hf.py with CPUs in place of accelerators, over which FSDP and DeepSpeed spread weights.

Processes communicate over gloo; all else is as on GPUs. The one argument is a JSON list of runs,
each a list of flags. The runs take turns in the same processes.
"""

import json
import sys

import torch
from accelerate import DistributedType, PartialState

import train_hf

PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))

if __name__ == "__main__":
    for flags in json.loads(sys.argv[1]):
        train_hf.main(flags)
