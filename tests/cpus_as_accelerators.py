"""train_hf.py where accelerate takes the CPU for an accelerator: with FSDP and DeepSpeed, it spreads weights over those alone.

Processes talk over gloo; all else is accelerate's, as on GPUs.
"""

import torch
from accelerate import DistributedType, PartialState

import train_hf

PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))

if __name__ == "__main__":
    train_hf.main()
