"""Models of gpt2-small's size with random weights: GPT-2, RETRO and retro-pytorch.

model_speed.py and gpu.py measure them. No model has dropout.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_retro import RetroConfig, RetroForCausalLM

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of tokens and neighbor ids
SEARCH_LIBRARIES = {"faiss": None, "autofaiss": "build_index"}  # retro-pytorch's imports -> the name it takes from it


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder and its neighbors. The defaults are gpt2-small's and the paper's."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    cca_layers: tuple[int, ...] = (5, 8, 11)
    chunk: int = 64
    neighbors: int = 2
    neighbor_length: int = 128
    encoder_layers: int = 2

    def gpt2_settings(self, length: int) -> dict[str, Any]:
        """Return settings of `GPT2Config` for texts of `length` tokens. No token ends a text."""
        return {
            "n_layer": self.layers,
            "n_embd": self.width,
            "n_head": self.heads,
            "vocab_size": self.vocabulary,
            "n_positions": length,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def random_tokens(self, *shape: int, device: torch.device | None = None) -> torch.Tensor:
        """Return random token ids; 0 is padding to retro-pytorch and left out."""
        return torch.randint(1, self.vocabulary, shape, device=device)

    def random_neighbors(self, batch_size: int, points: int, device: torch.device | None = None) -> torch.Tensor:
        """Return random neighbor ids (batch_size, points, k, r)."""
        return self.random_tokens(batch_size, points, self.neighbors, self.neighbor_length, device=device)


GPT2_SMALL = Sizes()
TINY = Sizes(
    layers=2, width=256, heads=4, vocabulary=211, cca_layers=(1,), chunk=16, neighbor_length=32
)  # the least width of retro-pytorch


def build_gpt2(sizes: Sizes, length: int, **settings: Any) -> GPT2LMHeadModel:
    """Return a GPT-2 for texts of `length` tokens."""
    model = GPT2LMHeadModel(GPT2Config(**sizes.gpt2_settings(length), **settings))
    model.loss_type = "ForCausalLM"  # the library finds it by the class's name, else it warns, which breaks a graph
    return model


def build_retro(sizes: Sizes, length: int, **settings: Any) -> RetroForCausalLM:
    """Return a RETRO for texts of `length` tokens. `settings` are those of `RetroConfig`."""
    own = {
        "cca_layers": list(sizes.cca_layers),
        "chunk_size": sizes.chunk,
        "num_neighbors": sizes.neighbors,
        "neighbor_length": sizes.neighbor_length,
        "encoder_num_layers": sizes.encoder_layers,
    }
    return RetroForCausalLM(RetroConfig(**(sizes.gpt2_settings(length) | own | settings)))


def build_retro_pytorch(sizes: Sizes, length: int) -> torch.nn.Module:
    """Return a model of retro-pytorch 0.3.9 for texts of `length` tokens.

    Raises:
        ImportError: retro-pytorch or einops is not installed.
    """
    return _retro_pytorch_class()(
        num_tokens=sizes.vocabulary,
        max_seq_len=length,
        chunk_size=sizes.chunk,
        enc_dim=sizes.width,
        enc_depth=sizes.encoder_layers,
        enc_cross_attn_layers=(1,),
        dec_dim=sizes.width,
        dec_depth=sizes.layers,
        dec_cross_attn_layers=tuple(layer + 1 for layer in sizes.cca_layers),
        dim_head=sizes.width // 8,  # 0.3.9 ignores `heads` and always has 8
    )


def _retro_pytorch_class() -> Any:
    """Import retro-pytorch's model, without the search libraries that its package imports first.

    Those that are not installed are replaced by empty modules: the model itself does not use them.
    """
    replaced = {name: wanted for name, wanted in SEARCH_LIBRARIES.items() if find_spec(name) is None}
    for name, wanted in replaced.items():
        module = ModuleType(name)
        if wanted is not None:
            setattr(module, wanted, None)
        sys.modules[name] = module
    try:
        from retro_pytorch import RETRO
    finally:
        for name in replaced:
            del sys.modules[name]
    return RETRO


def gpt2_loss(model: torch.nn.Module) -> Loss:
    """Return the loss of a model that reads no neighbors."""
    return lambda tokens, neighbors: model(tokens, labels=tokens, use_cache=False).loss


def retro_loss(model: torch.nn.Module) -> Loss:
    """Return the loss of a RETRO that is given neighbors, as `RetroTrainer` computes it."""
    return lambda tokens, neighbors: (
        model(tokens, labels=tokens, neighbor_ids=neighbors, use_cache=False, skip_logits=True).loss
    )


def retro_pytorch_loss(model: torch.nn.Module) -> Loss:
    """Return the loss of a model of retro-pytorch."""
    # it predicts all of its tokens but the first, so it gets one more
    return lambda tokens, neighbors: model(torch.cat([tokens, tokens[:, :1]], 1), retrieved=neighbors, return_loss=True)
