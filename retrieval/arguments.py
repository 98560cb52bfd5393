"""The settings that name a knowledge base, declared once for every program that reads one."""

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from .embedding import Backend, EmbedderSettings
from .identity import SEARCHES
from .reranking import RerankerSettings
from .retriever import COLLECTION_NAME, MilvusRetriever
from .settings import same_setting
from .tokenization import BulkTokenizer


@dataclass
class KnowledgeBaseArguments:
    """The knowledge base that neighbors come from; fields for `HfArgumentParser`, to inherit."""

    knowledge_base: str | None = field(
        default=None,
        metadata={
            "help": "Knowledge base: a Milvus Lite file, or a server's URI (its token: MILVUS_TOKEN). Without one, "
            "nothing is retrieved."
        },
    )
    collection_name: str | None = field(
        default=None,
        metadata={
            "help": "Collection in the knowledge base. By default the model's own when generating, else "
            f"{COLLECTION_NAME!r}."
        },
    )
    embedding_model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name to load the embedding model from. By default the name stored in the knowledge "
            "base. Search by words needs none."
        },
    )
    search: str | None = field(
        default=None,
        metadata={
            "help": "How the knowledge base is searched: dense (by meaning), bm25 (by words) or hybrid (by both). By "
            "default as the knowledge base was built.",
            "choices": list(SEARCHES),
        },
    )
    query_prompt: str | None = same_setting(EmbedderSettings, "query_prompt")
    document_prompt: str | None = same_setting(EmbedderSettings, "document_prompt")
    truncate_dim: int | None = same_setting(EmbedderSettings, "truncate_dim")
    backend: Backend = same_setting(EmbedderSettings, "backend")
    trust_remote_code: bool = same_setting(EmbedderSettings, "trust_remote_code")
    reranker: str | None = same_setting(RerankerSettings, "reranker")
    rerank_candidates: int = same_setting(RerankerSettings, "rerank_candidates")

    def open_retriever(
        self,
        tokenizer: PreTrainedTokenizerBase | BulkTokenizer,
        *,
        num_neighbors: int,
        neighbor_length: int | None = None,
        cache_size: int = 0,
        collection_name: str | None = None,
    ) -> MilvusRetriever:
        """Open the knowledge base that is named.

        Args:
            tokenizer, num_neighbors, neighbor_length, cache_size: as for [`MilvusRetriever`].
            collection_name: the collection, if the settings name none.
        """
        return MilvusRetriever.from_uri(
            self.knowledge_base,
            self.collection_name or collection_name or COLLECTION_NAME,
            tokenizer=tokenizer,
            embedding_model=self.embedding_model,
            search=self.search,
            num_neighbors=num_neighbors,
            neighbor_length=neighbor_length,
            cache_size=cache_size,
            embedding_settings=EmbedderSettings.of(self),
            reranker=self.reranker,
            rerank_candidates=self.rerank_candidates,
        )
