"""The model card of a RETRO model: its base, its knowledge base, its evaluation and its use."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from configuration_retro import RetroConfig

TAGS = ["retro", "retrieval-augmented"]


def model_card(
    config: RetroConfig,
    repo_id: str,
    knowledge_base: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, float] | None = None,
    is_reader: bool = False,
) -> ModelCard:
    """Build a card for the hub. It names the knowledge base, never its address.

    Args:
        repo_id: the model's name on the hub.
        knowledge_base: the retriever's description of itself, `retriever.describe()`. Its "sources"
            are datasets.
        evaluation: held-out measurements by name.
        is_reader: the repository has what RETRO adds, without the decoder.
    """
    facts: dict[str, Any] = {
        "search": config.search,
        "embedding model": config.embedding_model,
        "collection": config.collection_name,
        "chunk size": f"{config.chunk_size} tokens",
        "neighbors of a search": f"{config.num_neighbors} of up to {config.neighbor_length} tokens",
        **(knowledge_base or {}),
    }
    sources = facts.pop("sources", None) or []
    if sources:
        facts["sources"] = ", ".join(sources)
    base = f"a {config.decoder_type} decoder"
    if config.base_model:
        base = f"[{config.base_model}](https://huggingface.co/{config.base_model})"
    what = "A reader, without its decoder, for" if is_reader else "A"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, config.decoder_type],
        base_model=config.base_model,
        base_model_relation="adapter" if is_reader and config.base_model else None,
        datasets=list(sources) or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id.split('/')[-1]}",
        f"{what} RETRO model ([Borgeaud et al., 2022](https://arxiv.org/abs/2112.04426)) on {base}: a language model "
        f"of {config.n_layer} layers that reads the nearest passages of a knowledge base through "
        f"{_ways_to_read(config)}. With `use_retrieval=False` it is its decoder alone.",
        "## Knowledge base",
        _table(("", ""), {name: value for name, value in facts.items() if value is not None}),
        "## Use",
        (USE_READER if is_reader else USE).format(repo_id=repo_id, decoder=config.base_model or "path/to/the/decoder"),
    ]
    if evaluation:
        numbers = {name.replace("_", " "): f"{value:.4f}" for name, value in evaluation.items()}
        parts[-2:-2] = ["## Evaluation", _table(("held-out text", ""), numbers)]
    return ModelCard("\n\n".join(parts) + "\n")


USE = """```python
from transformers import AutoTokenizer
from modeling_retro import RetroForCausalLM
from retrieval import MilvusRetriever
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
retriever = MilvusRetriever.from_uri("knowledge.db", tokenizer=tokenizer)
model = RetroForCausalLM.from_pretrained("{repo_id}", retriever=retriever)
print(tokenizer.decode(model.generate(**tokenizer("A prompt", return_tensors="pt"), max_new_tokens=100)[0]))
```
Without the packages `modeling_retro` and `retrieval`, `AutoModelForCausalLM.from_pretrained("{repo_id}",
trust_remote_code=True)` opens the model; neighbors are then given as `neighbor_ids`."""


USE_READER = """```python
from transformers import AutoTokenizer
from modeling_retro import RetroForCausalLM
from retrieval import MilvusRetriever
tokenizer = AutoTokenizer.from_pretrained("{decoder}")
retriever = MilvusRetriever.from_uri("knowledge.db", tokenizer=tokenizer)
model = RetroForCausalLM.from_pretrained("{decoder}", reader="{repo_id}", retriever=retriever)
print(tokenizer.decode(model.generate(**tokenizer("A prompt", return_tensors="pt"), max_new_tokens=100)[0]))
```
This repository has only what was added to the decoder."""


def _ways_to_read(config: RetroConfig) -> str:
    layers = ", ".join(map(str, config.cca_layers or ()))
    by = ", by matching tokens" if config.cca_match else ""
    ways = [f"chunked cross-attention (layers {layers}{by})"] if layers else []
    return " and ".join(ways + ["a copy head"] * bool(config.copy_head))


def _table(header: tuple[str, str], rows: Mapping[str, object]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in (header, ("---", "---"), *rows.items()))
