"""Readers: what RETRO adds to a decoder, stored and shared without the decoder.

A reader is a folder, or a repository on the hub, with its weights, its settings and a card. A copy
head alone takes a few kilobytes.
"""

import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import cached_file

from configuration_retro import RetroConfig

from .wrapping import OWN_SETTINGS, RETRO_SETTINGS

WEIGHTS, SETTINGS, CARD = "reader.safetensors", "reader_config.json", "README.md"
ZERO_SHOT = "zero-shot"  # the reader in this package, which fits every decoder
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
OF_THE_DECODER = {"text_config", "base_model"}  # settings that are not the reader's


@dataclass
class Reader:
    """A stored reader.

    Attributes:
        name: where it is from.
        decoder: what is known of its decoder: "name" (on the hub, or None), "model_type", "n_embd",
            "n_layer", "vocab_size". Empty: it fits every decoder.
        settings: settings of `RetroConfig`.
        weights: parameters by name.
    """

    name: str
    decoder: dict[str, Any]
    settings: dict[str, Any]
    weights: dict[str, torch.Tensor]

    def check_fit(self, config: RetroConfig) -> None:
        """Compare the reader's decoder with a model's.

        Raises:
            ValueError: they differ; names both.
        """
        given = describe_decoder(config)
        both_named = self.decoder.get("name") and given["name"]
        differences = [
            f"{fact} is {given[fact]!r}, not {value!r}"
            for fact, value in self.decoder.items()
            if value != given.get(fact) and (fact != "name" or both_named)
        ]
        if differences:
            raise ValueError(
                f"The reader {self.name} is for another decoder: {'; '.join(differences)}. Give it the decoder that it "
                "was trained on, or train a reader for this one."
            )

    def put_on(self, model: nn.Module, config: RetroConfig) -> set[str]:
        """Copy the weights into a model; return the names of its parameters that they are for.

        Raises:
            ValueError: the model has no such parameter, or one of another shape.
        """
        weights = dict(self.weights)
        if not self.decoder:
            weights["copy_head.gate_hidden"] = torch.zeros(config.output_width)
        parameters = dict(model.named_parameters())
        for name, weight in weights.items():
            shape = None if name not in parameters else tuple(parameters[name].shape)
            if shape != tuple(weight.shape):
                raise ValueError(
                    f"The reader {self.name} has {name} of shape {tuple(weight.shape)}, the model {shape}. Leave out "
                    "settings that change RETRO's parts (cca_layers, neighbor_length, match_length …)."
                )
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)
        return set(weights)


def describe_decoder(config: RetroConfig) -> dict[str, Any]:
    """Return what tells a model's decoder from others."""
    sizes = {name: getattr(config, name) for name in ("n_embd", "n_layer", "vocab_size")}
    return {"name": config.base_model, "model_type": config.decoder_type, **sizes}


def open_reader(name: str | Path, kwargs: dict[str, Any]) -> Reader:
    """Open a reader: a folder, a name on the hub, or "zero-shot".

    Args:
        kwargs: arguments of `from_pretrained`; those that concern the hub are used.

    Raises:
        OSError: there is no such reader.
        ValueError: its files are damaged.
    """
    if str(name) == ZERO_SHOT:
        stored = json.loads(resources.files(__package__).joinpath("zero_shot.json").read_text(encoding="utf-8"))
        weights = {
            f"copy_head.{name}": torch.tensor(value) for name, value in stored.items() if isinstance(value, list)
        }
        settings = {name: value for name, value in stored.items() if not isinstance(value, list)}
        return Reader(ZERO_SHOT, {}, {"copy_head": True, "cca_layers": [], **settings}, weights)
    location = {argument: kwargs[argument] for argument in HUB_ARGUMENTS if argument in kwargs}
    try:
        files: list[Any] = [cached_file(str(name), file, **location) for file in (SETTINGS, WEIGHTS)]
    except OSError as error:
        raise OSError(
            f"{name} is not a reader: it has no {SETTINGS} or no {WEIGHTS}. Give a folder that save_reader() wrote, "
            f'the name of such a repository on the hub, or "{ZERO_SHOT}".'
        ) from error
    try:
        stored = json.loads(Path(files[0]).read_text(encoding="utf-8"))
        return Reader(str(name), stored["decoder"], stored["settings"], load_file(files[1]))
    except (ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"The reader {name} is damaged ({type(error).__name__}: {error}). Save or download it again."
        ) from error


def write_reader(folder: str | Path, config: RetroConfig, weights: dict[str, torch.Tensor], card: str) -> None:
    """Write a reader into a folder. Files there are replaced when all of it is written."""
    stored = config.to_dict()
    names = (RETRO_SETTINGS if config.text_config is None else OWN_SETTINGS) - OF_THE_DECODER
    settings = {name: stored[name] for name in sorted(names)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    parts = {name: Path(folder, f"{name}.part") for name in (WEIGHTS, SETTINGS, CARD)}
    weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(weights, parts[WEIGHTS], metadata={"format": "pt"})
    text = json.dumps({"decoder": describe_decoder(config), "settings": settings}, indent=2, sort_keys=True)
    parts[SETTINGS].write_text(text + "\n", encoding="utf-8")
    parts[CARD].write_text(card, encoding="utf-8")
    for name, part in parts.items():
        os.replace(part, Path(folder, name))


def upload_reader(folder: str | Path, repo_id: str, private: bool | None, token: str | bool | None) -> str:
    """Upload a reader's files to the hub; return the repository's full name."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=[WEIGHTS, SETTINGS, CARD])
    return repo_id
