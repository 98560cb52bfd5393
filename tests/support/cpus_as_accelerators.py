"""train_hf.py where accelerate takes the CPU for an accelerator: with FSDP and DeepSpeed, it spreads weights over those alone.

Processes talk over gloo; all else is accelerate's, as on GPUs. The one argument is a JSON list of runs, each the list of
its flags: they take turns in the same processes.
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
