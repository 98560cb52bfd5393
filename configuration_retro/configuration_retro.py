"""RetroConfig: the settings of retrieval, and those of the decoder that reads."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, GPT2Config, PreTrainedConfig

from .decoders import FOLLOWED_SETTINGS, decoder_config, followed_settings

OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = (5, 16), (5, 24)  # (major, minor); all between are supported
OLDEST_TORCH = (2, 8)

SEARCHES = ("dense", "bm25", "hybrid")  # the ways to search a knowledge base

# the initial weights of matches of 1, 2, … tokens; those of longer matches are as the last
INITIAL_MATCH_WEIGHTS = (8.0, 6.0, 4.0, 3.0, 2.0)


def check_versions(
    transformers_version: str = transformers.__version__, torch_version: str = torch.__version__
) -> None:
    """Refuse versions that RETRO was not tested with, since they could silently change results.

    This runs on import, also from the code that is saved beside a model's weights.

    Raises:
        ImportError: names the installed version and the supported ones.
    """
    oldest, newest, torch_oldest = (
        ".".join(map(str, bound)) for bound in (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS, OLDEST_TORCH)
    )
    if not OLDEST_TRANSFORMERS <= _major_minor(transformers_version) <= NEWEST_TRANSFORMERS:
        raise ImportError(
            f"This RETRO code supports transformers {oldest} to {newest}; {transformers_version} is installed. Install "
            f"a supported one (pip install 'transformers=={newest}.*'), or a version of transformers-retro that "
            "supports yours."
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
    r"""The configuration of a RETRO model on GPT-2, or on another decoder.

    RETRO is Borgeaud et al., 2022, https://arxiv.org/abs/2112.04426. Without `text_config` the
    decoder is GPT-2, and every argument of [`GPT2Config`] keeps its meaning and its default. With
    it, the sizes, the vocabulary and the special tokens are the decoder's, and the other arguments
    of [`GPT2Config`] are those of the neighbor encoder. Further arguments:

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            The configuration of a decoder other than GPT-2: any causal language model of
            transformers whose layers are all attention.
        chunk_size (`int`, defaults to 64):
            Tokens in a chunk, the paper's m.
        num_neighbors (`int`, *optional*):
            Neighbors of each chunk, the paper's k. Default: 2; 4 with `text_config`.
        neighbor_length (`int`, *optional*, defaults to `2 * chunk_size`):
            Tokens of one neighbor, the paper's r: the neighbor chunk and its continuation in its
            document.
        retrieval_stride (`int`, *optional*, defaults to `chunk_size`):
            Tokens between two retrieval points, from 1 to `chunk_size`. A smaller stride searches
            more often. The paper searches once a chunk.
        cca_layers (`list[int]`, *optional*):
            Decoder layers (0-based) with chunked cross-attention, the paper's P. Default: every
            third layer from the sixth, (5, 8, 11) for 12 layers; the last layer of a decoder with
            fewer than six. `[]` leaves it, and the neighbor encoder, out of a model with a copy
            head; it is the default with `text_config`.
        encoder_num_layers (`int`, defaults to 2):
            Layers of the neighbor encoder.
        encoder_cca_layers (`list[int]`, defaults to `[0]`):
            Encoder layers (0-based) that attend to the decoder's states of the chunk; may be empty.
        attention_branch (`str`, *optional*):
            Name of the module in a decoder layer whose output is added to the layer's input as the
            attention branch. Cross-attention follows it. Default: found when the model is built.
        copy_head (`bool`, *optional*):
            Adds a pointer-generator (See et al., 2017, https://arxiv.org/abs/1704.04368) that
            copies tokens from the neighbors. It learns to use them within minutes. Default:
            `False`; `True` with `text_config`.
        cca_match (`bool`, defaults to `False`):
            Adds to the scores of cross-attention how well the last tokens match those before each
            neighbor token. The paper's cross-attention lacks this and takes far longer to learn it.
        match_length (`int`, defaults to 6):
            The most tokens that the copy head and `cca_match` compare: the last one and those
            before it.
        match_scale (`float`, defaults to 30.0):
            Factor on the weights of matches and of the copy gate's features. They are stored
            divided by it.
        initial_match_weights (`list[float]`, *optional*):
            Initial weights of matches of 1, 2, … `match_length` tokens, times `match_scale`.
            Default: 8, 6, 4, 3, then 2 for all longer ones. The same last token then outweighs
            hundreds of other places.
        cca_match_output_scale (`float`, defaults to 4.0):
            Factor on the output of cross-attention with `cca_match`. A larger one makes it learn
            faster.
        gate_log_prob_scale (`float`, defaults to 10.0):
            Divisor of a feature of the copy gate, the decoder's expected log-probability of the
            copied token.
        use_retrieval (`bool`, defaults to `True`):
            `False` switches neighbors off: the model is then its decoder.
        base_model (`str`, *optional*):
            Name of the decoder's checkpoint on the hub that the model was built on.
        embedding_model (`str`, *optional*):
            Name of the embedding model of the knowledge base that the model was trained with
            ("owner/name").
        collection_name (`str`, *optional*):
            Name of that knowledge base's collection. Its address and credentials are never part of
            the configuration.
        search (`str`, *optional*):
            The search that the model was trained with: "dense", "bm25" or "hybrid".

    Raises:
        ValueError: `text_config` is of a model that RETRO cannot be built on.
        ValueError (as `StrictDataclassClassValidationError`): a size below 1, a stride above
            `chunk_size`, an unknown search, a scale of 0 or below, a layer outside its stack, or
            another number of match weights than `match_length`.
    """

    model_type = "retro"
    sub_configs = {"text_config": AutoConfig}  # type: ignore[dict-item]  # as the library's composite ones

    text_config: dict | PreTrainedConfig | None = None
    chunk_size: int = 64
    num_neighbors: int | None = None
    neighbor_length: int | None = None
    retrieval_stride: int | None = None
    cca_layers: list[int] | tuple[int, ...] | None = None
    encoder_num_layers: int = 2
    encoder_cca_layers: list[int] | tuple[int, ...] = (0,)
    attention_branch: str | None = None
    copy_head: bool | None = None
    cca_match: bool = False
    match_length: int = 6
    match_scale: float | int = 30.0
    initial_match_weights: list[float | int] | tuple[float | int, ...] | None = None
    cca_match_output_scale: float | int = 4.0
    gate_log_prob_scale: float | int = 10.0
    use_retrieval: bool = True
    base_model: str | None = None
    embedding_model: str | None = None
    collection_name: str | None = None
    search: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is not None:
            self.text_config = decoder_config(self.text_config)
            self.follow_decoder()
            # the library sets these in `text_config`, too; None would switch off its causal mask
            # and its fast experts. RETRO's own parts have no experts.
            kwargs["attn_implementation"] = kwargs.get("attn_implementation") or self.text_config._attn_implementation
            kwargs["experts_implementation"] = {"": None, "text_config": self.text_config._experts_implementation}
        on_gpt2 = self.text_config is None
        if self.copy_head is None:
            self.copy_head = not on_gpt2
        if self.num_neighbors is None:
            self.num_neighbors = 2 if on_gpt2 else 4
        if self.neighbor_length is None:
            self.neighbor_length = 2 * self.chunk_size
        if self.retrieval_stride is None:
            self.retrieval_stride = self.chunk_size
        if self.cca_layers is None:
            self.cca_layers = (list(range(5, self.n_layer, 3)) or [self.n_layer - 1]) if on_gpt2 else []
        if self.initial_match_weights is None:
            longer = (INITIAL_MATCH_WEIGHTS[-1],) * self.match_length
            self.initial_match_weights = (INITIAL_MATCH_WEIGHTS + longer)[: self.match_length]
        # sorted lists: a configuration is the same before and after JSON
        self.cca_layers = sorted(self.cca_layers)
        self.encoder_cca_layers = sorted(self.encoder_cca_layers)
        self.initial_match_weights = list(map(float, self.initial_match_weights))
        experts = None if self.text_config is None else self.text_config._experts_implementation
        super().__post_init__(**kwargs)
        if self.text_config is not None and experts is not None:  # likewise; RETRO itself has none
            self.text_config._experts_implementation = experts

    def follow_decoder(self) -> None:
        """Set what follows from `text_config`, such as the size of the vocabulary."""
        assert isinstance(self.text_config, PreTrainedConfig), "built with the configuration"
        for name, value in followed_settings(self.text_config).items():
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by name.

        A stride that is the chunk size is None, since it follows it. What follows the decoder is
        left out.
        """
        settings = super().to_dict()
        if settings.get("text_config") is not None:
            settings = {name: value for name, value in settings.items() if name not in FOLLOWED_SETTINGS}
            settings["text_config"].pop("_name_or_path", None)  # it may be a local path, which is private
        if settings.get("retrieval_stride") == settings.get("chunk_size"):
            settings["retrieval_stride"] = None
        return settings

    @property
    def stored_match_weights(self) -> list[float]:
        """The initial match weights as parameters hold them, divided by `match_scale`."""
        assert self.initial_match_weights is not None, "set when the configuration is built"
        return [weight / self.match_scale for weight in self.initial_match_weights]

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a checkpoint's configuration. A decoder's gets the defaults of retrieval.

        Raises:
            ValueError: RETRO cannot be built on a model of this type.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type == cls.model_type:
            return config_dict, kwargs
        if model_type != "gpt2":
            config_dict = {"text_config": decoder_config(config_dict)}
        # record hub names only; local paths are private
        if not Path(pretrained_model_name_or_path).exists():
            config_dict["base_model"] = str(pretrained_model_name_or_path)
        return {**config_dict, "model_type": cls.model_type}, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from a dictionary; arguments of the same names win.

        Raises:
            ValueError: an argument follows the decoder's configuration.
        """
        # merged before the configuration is built, so that derived values (neighbor_length) and
        # checks see them
        own = {field.name for field in fields(cls)} & set(kwargs)
        if config_dict.get("text_config") is not None and (followed := sorted(own & set(FOLLOWED_SETTINGS))):
            raise ValueError(
                f"{', '.join(followed)} cannot be set: a {config_dict['model_type']!r} model on another decoder has "
                "the decoder's. Leave them out."
            )
        return super().from_dict({**config_dict, **{name: kwargs.pop(name) for name in own}}, **kwargs)

    def validate_retrieval(self) -> None:
        """Check the sizes, the scales and the layers with cross-attention.

        Raises:
            ValueError: names the value that does not fit.
        """
        for name in ("chunk_size", "num_neighbors", "neighbor_length", "encoder_num_layers", "match_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. Give at least 1.")
        if self.retrieval_stride is None or not 1 <= self.retrieval_stride <= self.chunk_size:
            raise ValueError(
                f"retrieval_stride is {self.retrieval_stride}. Give a number from 1 to chunk_size ({self.chunk_size})."
            )
        if self.search not in (None, *SEARCHES):
            raise ValueError(f"search is {self.search!r}. Give one of {', '.join(map(repr, SEARCHES))}, or None.")
        for name in ("match_scale", "cca_match_output_scale", "gate_log_prob_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}. Give a number above 0.")
        if len(self.initial_match_weights or ()) != self.match_length:
            raise ValueError(
                f"initial_match_weights={self.initial_match_weights} does not have match_length ({self.match_length}) "
                "numbers. Give as many, or set it to None for the default."
            )
        if self.add_cross_attention:
            raise ValueError(
                "add_cross_attention is True, but a RETRO model attends to its neighbors (cca_layers) and to no other "
                "encoder. Set add_cross_attention=False to leave that part of the checkpoint out."
            )
        if not self.cca_layers and not self.copy_head:
            raise ValueError(
                "cca_layers is empty and copy_head is False, so nothing would use the neighbors. Name at least one "
                "decoder layer, set copy_head=True, or use the decoder alone. (use_retrieval=False switches neighbors "
                "off.)"
            )
        self._check_layers("cca_layers", self.n_layer)
        self._check_layers("encoder_cca_layers", self.encoder_num_layers)

    def _check_layers(self, name: str, depth: int) -> None:
        """Refuse layers outside a stack of `depth` layers, and layers that are named twice."""
        layers = getattr(self, name)
        outside = [layer for layer in layers if not 0 <= layer < depth]
        if outside:
            raise ValueError(
                f"{name}={layers}: layer {outside[0]} does not exist. There are {depth} layers, 0 to {depth - 1}."
            )
        if len(set(layers)) < len(layers):
            raise ValueError(f"{name}={layers} names a layer twice. Name each once.")

    @property
    def output_width(self) -> int:
        """The width of the states that enter the output embeddings. OPT's may be narrower."""
        return getattr(self.text_config, "word_embed_proj_dim", self.n_embd)

    @property
    def decoder_type(self) -> str:
        """The decoder's `model_type`."""
        return self.text_config.model_type if isinstance(self.text_config, PreTrainedConfig) else "gpt2"

    @property
    def norm(self) -> str:
        """The norm of RETRO's own parts, as in the decoder: "rms" or "layer"."""
        return "rms" if hasattr(self.text_config, "rms_norm_eps") else "layer"


__all__ = ["RetroConfig"]
