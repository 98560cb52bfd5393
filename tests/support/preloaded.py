"""Modules that forked test processes find imported."""

import torch
import torch.distributed
import transformers.trainer

import generate_hf
import retrieval.cli
import train_hf

__all__ = ["generate_hf", "retrieval", "torch", "train_hf", "transformers"]
