"""RetroConfig: a GPT2Config, and what retrieval adds to it."""

from dataclasses import fields
from pathlib import Path

import torch
import transformers
from huggingface_hub.dataclasses import strict
from transformers import GPT2Config

OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = (5, 16), (5, 24)  # (major, minor); all between are supported
OLDEST_TORCH = (2, 8)


def check_versions(
    transformers_version: str = transformers.__version__, torch_version: str = torch.__version__
) -> None:
    """Refuse versions that RETRO was not tested with: they could change results without an error.

    This runs on import, also from the code that is saved beside a model's weights.

    Raises:
        ImportError: names the version that is installed and those that are supported.
    """
    oldest, newest, torch_oldest = (
        ".".join(map(str, bound)) for bound in (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS, OLDEST_TORCH)
    )
    if not OLDEST_TRANSFORMERS <= _major_minor(transformers_version) <= NEWEST_TRANSFORMERS:
        raise ImportError(
            f"This RETRO code supports transformers {oldest} to {newest}; {transformers_version} is installed. Install a "
            f"supported one (pip install 'transformers=={newest}.*'), or a version of transformers-retro that supports yours."
        )
    if _major_minor(torch_version) < OLDEST_TORCH:
        raise ImportError(
            f"This RETRO code needs torch {torch_oldest} or newer; {torch_version} is installed. Install a newer one."
        )


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


check_versions()


@strict
class RetroConfig(GPT2Config):
    r"""Configuration of a RETRO model (Borgeaud et al., 2022, https://arxiv.org/abs/2112.04426) on a GPT-2 decoder.

    Every argument of [`GPT2Config`] keeps its meaning and its default. Further arguments:

    Args:
        chunk_size (`int`, defaults to 64):
            Tokens in a chunk, the paper's m.
        num_neighbors (`int`, defaults to 2):
            Neighbors read for each chunk, the paper's k.
        neighbor_length (`int`, *optional*, defaults to `2 * chunk_size`):
            Tokens of one neighbor, the paper's r: the neighbor chunk, then what follows it in its document.
        cca_layers (`list[int]`, *optional*):
            Decoder layers (0-based) with chunked cross-attention, the paper's P. Default: every third layer from the
            sixth, (5, 8, 11) for 12 layers; the last layer of a decoder with fewer than six. `[]` leaves it, and the
            neighbor encoder, out of a model with a copy head.
        encoder_num_layers (`int`, defaults to 2):
            Layers of the neighbor encoder.
        encoder_cca_layers (`list[int]`, defaults to `[0]`):
            Encoder layers (0-based) that attend to the decoder's states of the chunk; may be empty.
        copy_head (`bool`, defaults to `False`):
            Whether the model may also copy tokens from its neighbors, with a pointer-generator (See et al., 2017,
            https://arxiv.org/abs/1704.04368). It learns to read within minutes.
        cca_match (`bool`, defaults to `False`):
            Whether cross-attention, too, goes by how well the last tokens match those before each token of a neighbor. Not
            in the paper, whose cross-attention has to find that out by itself and takes far longer.
        use_retrieval (`bool`, defaults to `True`):
            `False` switches neighbors off: the model is then its GPT-2 decoder.
        base_model (`str`, *optional*):
            Name of the GPT-2 checkpoint on the hub that the model was built on.
        embedding_model (`str`, *optional*):
            Name of the embedding model of the knowledge base that the model was trained with ("owner/name").
        collection_name (`str`, *optional*):
            Name of that knowledge base's collection. Its address and credentials are never part of the configuration.

    Raises:
        ValueError (as `StrictDataclassClassValidationError`): a size below 1, or a layer outside its stack.
    """

    model_type = "retro"

    chunk_size: int = 64
    num_neighbors: int = 2
    neighbor_length: int | None = None
    cca_layers: list[int] | tuple[int, ...] | None = None
    encoder_num_layers: int = 2
    encoder_cca_layers: list[int] | tuple[int, ...] = (0,)
    copy_head: bool = False
    cca_match: bool = False
    use_retrieval: bool = True
    base_model: str | None = None
    embedding_model: str | None = None
    collection_name: str | None = None

    def __post_init__(self, **kwargs):
        if self.neighbor_length is None:
            self.neighbor_length = 2 * self.chunk_size
        if self.cca_layers is None:
            self.cca_layers = list(range(5, self.n_layer, 3)) or [self.n_layer - 1]
        # lists, sorted: a configuration reads the same before and after JSON
        self.cca_layers = sorted(self.cca_layers)
        self.encoder_cca_layers = sorted(self.encoder_cca_layers)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """A GPT-2 checkpoint's configuration is a RETRO configuration that says nothing of retrieval yet.

        Raises:
            ValueError: the checkpoint is of another architecture.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type not in ("gpt2", cls.model_type):
            raise ValueError(
                f"{pretrained_model_name_or_path} is a {model_type!r} checkpoint; RETRO is built on GPT-2 ones (or "
                "loaded from RETRO ones)."
            )
        # a name of the hub, that is: a path is nobody else's business
        if model_type == "gpt2" and not Path(pretrained_model_name_or_path).exists():
            config_dict["base_model"] = str(pretrained_model_name_or_path)
        return {**config_dict, "model_type": cls.model_type}, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # Merged before the configuration is built, so that what depends on a value (neighbor_length, checks) follows it.
        own = {field.name for field in fields(cls)} & set(kwargs)
        return super().from_dict({**config_dict, **{name: kwargs.pop(name) for name in own}}, **kwargs)

    def validate_retrieval(self):
        """Check the sizes and the places of cross-attention, naming the value that does not fit."""
        for name in ("chunk_size", "num_neighbors", "neighbor_length", "encoder_num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.add_cross_attention:
            raise ValueError(
                "add_cross_attention is True: a RETRO model attends to its neighbors (cca_layers) and to no other encoder. Set "
                "add_cross_attention=False to leave that part of the checkpoint out."
            )
        if not self.cca_layers and not self.copy_head:
            raise ValueError(
                "cca_layers is empty and copy_head is False: nothing would read the neighbors. Name at least one decoder "
                "layer, set copy_head=True, or use GPT2LMHeadModel (use_retrieval=False switches neighbors off)."
            )
        for name, layers, depth in (
            ("cca_layers", self.cca_layers, self.n_layer),
            ("encoder_cca_layers", self.encoder_cca_layers, self.encoder_num_layers),
        ):
            outside = [layer for layer in layers if not 0 <= layer < depth]
            if outside:
                raise ValueError(
                    f"{name}={list(layers)}: layer {outside[0]} does not exist; there are {depth} layers, 0 to {depth - 1}."
                )
            if len(set(layers)) < len(layers):
                raise ValueError(f"{name}={list(layers)} names a layer twice.")


__all__ = ["RetroConfig"]
