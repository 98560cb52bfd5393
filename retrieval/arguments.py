"""The settings that name a knowledge base, declared once for every script that reads one."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from .retriever import MilvusRetriever
from .tokenization import BulkTokenizer


@dataclass
class KnowledgeBaseArguments:
    """Where neighbors come from; fields for `HfArgumentParser`, to inherit."""

    knowledge_base: str | None = field(
        default=None, metadata={"help": "Milvus Lite file or server URI (token: MILVUS_TOKEN). Default: no retrieval."}
    )
    collection_name: str | None = field(default=None, metadata={"help": "Collection in the knowledge base."})
    embedding_model: str | None = field(
        default=None,
        metadata={"help": "Where to load the knowledge base's embedding model from, if not from its name."},
    )

    def open_retriever(
        self, tokenizer: PreTrainedTokenizerBase | BulkTokenizer, *, collection_name: str | None = None, **kwargs: Any
    ) -> MilvusRetriever:
        """Open the knowledge base that is named.

        Args:
            collection_name: used where the settings name none; None leaves it to `MilvusRetriever.from_uri`.
            **kwargs: as for [`MilvusRetriever`].
        """
        name = self.collection_name or collection_name
        return MilvusRetriever.from_uri(
            self.knowledge_base,
            **({} if name is None else {"collection_name": name}),
            tokenizer=tokenizer,
            embedding_model=self.embedding_model,
            **kwargs,
        )
