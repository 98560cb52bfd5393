"""Checkpoints as earlier versions wrote them, with their parameter names and settings."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

OLD_NAMES = {"copy_head.gate_scale": "copy_head.valve"}  # present name -> name in earlier versions
NEW_SETTINGS = {
    "match_length",
    "match_scale",
    "initial_match_weights",
    "cca_match_output_scale",
    "gate_log_prob_scale",
}


def write_as_of_old(folder: Path, file: str = "model.safetensors") -> None:
    """Rewrite a saved model or adapter with old parameter names and without new settings."""
    weights = load_file(folder / file)
    for present, old in OLD_NAMES.items():
        weights = {name.replace(present, old): weight for name, weight in weights.items()}
    save_file(weights, folder / file, metadata={"format": "pt"})
    config = folder / "config.json"
    if config.exists():
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({name: value for name, value in settings.items() if name not in NEW_SETTINGS}))
