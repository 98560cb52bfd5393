"""The knowledge base of made-up facts among real text: built, changed, and put back."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from random import Random

from configuration_retro import RetroConfig
from retrieval import (
    DEFAULT_EMBEDDING_MODEL,
    BulkTokenizer,
    Document,
    Embedder,
    EmbedderSettings,
    MilvusRetriever,
    MilvusStore,
    chunk_documents,
    ingest,
)
from retrieval.arguments import KnowledgeBaseArguments

from .made_up_facts import Fact

COLLECTION = "facts"
CHANGED, DELETED, UNTOUCHED = "changed", "deleted", "untouched"
TOLD, REVISED = "told", "revised"  # the states of the knowledge base: before the changes and after


def roles_of(count: int, seed: int) -> list[str]:
    """Draw what becomes of each fact's document: half are changed, a quarter is deleted."""
    roles = [CHANGED] * (count // 2) + [DELETED] * (count // 4)
    roles += [UNTOUCHED] * (count - len(roles))
    Random(seed).shuffle(roles)
    return roles


def enough_text(
    documents: Iterable[Document], tokenizer: BulkTokenizer, chunk_size: int, chunks: int
) -> list[Document]:
    """Return the first documents that have so many chunks together.

    Raises:
        ValueError: all documents have fewer.
    """
    taken: list[Document] = []
    found, last = 0, None
    for chunk in chunk_documents(_noted(documents, taken), tokenizer, chunk_size):
        if found >= chunks and chunk.doc_id != last:
            break
        found, last = found + 1, chunk.doc_id
    if found < chunks:
        raise ValueError(
            f"The texts have {found:,} chunks of {chunk_size} tokens, but the facts are to stand among {chunks:,}. "
            f"Give more --texts, or set --chunks {found} or less."
        )
    end = next(place for place, document in enumerate(taken) if document.id == last)
    return taken[: end + 1]


def _noted(documents: Iterable[Document], into: list[Document]) -> Iterable[Document]:
    for document in documents:
        into.append(document)
        yield document


class FactBase:
    """A knowledge base of facts among real text, which is changed while it is open.

    Writing is idempotent. So a measurement that was broken off brings the knowledge base to the
    state that its next part needs.

    Args:
        settings: how it is searched and embedded. Its `knowledge_base` is not used.
        folder: where the Milvus Lite file is made.
        tokenizer, config: the model's.
        texts: documents of real text.
        facts: the facts.
        roles: what becomes of each fact's document.

    Attributes:
        retriever: finds the model's number of neighbors.
        chunks: the number of chunks when all was told.
    """

    def __init__(
        self,
        settings: KnowledgeBaseArguments,
        folder: Path,
        tokenizer: BulkTokenizer,
        config: RetroConfig,
        texts: Sequence[Document],
        facts: Sequence[Fact],
        roles: Sequence[str],
    ) -> None:
        self.tokenizer, self.facts, self.roles = tokenizer, facts, roles
        search = settings.search or config.search or "dense"
        model = None
        if search != "bm25":
            model = settings.embedding_model or config.embedding_model or DEFAULT_EMBEDDING_MODEL
        file = folder / "facts.db"
        store = MilvusStore(str(file), COLLECTION)
        try:
            embedder = None if model is None else Embedder(model, settings=EmbedderSettings.of(settings))
            documents = [*texts, *(fact.document() for fact in facts)]
            ingest(documents, store, tokenizer, embedder, chunk_size=config.chunk_size, search=search, progress=True)
            self.chunks = store.count()
        finally:
            store.close()
        own = KnowledgeBaseArguments(
            **{declared.name: getattr(settings, declared.name) for declared in fields(KnowledgeBaseArguments)}
        )
        own.knowledge_base, own.embedding_model, own.search = str(file), model, search
        assert config.num_neighbors is not None, "set when a configuration is made"
        self.retriever: MilvusRetriever = own.open_retriever(
            tokenizer,
            num_neighbors=config.num_neighbors,
            neighbor_length=config.neighbor_length,
            cache_size=2 * len(facts),
            collection_name=COLLECTION,
        )
        self._state = TOLD

    def be(self, state: str) -> None:
        """Bring the facts' documents to a state: `TOLD` as they were at first, or `REVISED`."""
        if state != self._state:
            if state == TOLD:
                self._write(fact.document() for fact in self.facts)
            else:
                self._write(fact.document(fact.changed) for fact in self._with_role(CHANGED))
                self.retriever.store.delete_documents([fact.doc_id for fact in self._with_role(DELETED)])
            self._state = state

    def close(self) -> None:
        """Release the knowledge base."""
        self.retriever.close()

    def _with_role(self, role: str) -> list[Fact]:
        return [fact for fact, its in zip(self.facts, self.roles, strict=True) if its == role]

    def _write(self, documents: Iterable[Document]) -> None:
        retriever = self.retriever
        ingest(documents, retriever.store, self.tokenizer, retriever.embedder, chunk_size=retriever.chunk_size)
