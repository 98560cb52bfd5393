"""The identity of a collection: tokenizer, embedding model, search and chunk size of its rows."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .analyzers import Analyzer, parse_analyzer
from .embedding import Embedder, EmbedderSettings
from .errors import IdentityMismatch, KnowledgeBaseError
from .tokenization import BulkTokenizer

SEARCHES = ("dense", "bm25", "hybrid")  # by meaning, by words, by both

# 2: metadata. 3: special tokens do not count in tokenizer_fingerprint and vocab_size.
# 4: search by words; dense collections stay in format 3.
FORMAT_VERSION = 3
WORDS_FORMAT_VERSION = 4
READABLE_VERSIONS = (2, 3, 4)

# Least cosine of two probes of the same model. Half precision and other hardware stay above 0.9999;
# other models are far below.
PROBE_SIMILARITY = 0.999


@dataclass(frozen=True)
class Identity:
    """The tokenizer, embedding model, search and chunk size that a collection is made with.

    It is stored with the collection and checked on opening.

    Attributes:
        tokenizer: name, for people and as a default to load.
        tokenizer_fingerprint: hash of everything that decides which ids a text becomes. This is
            compared. In format 2 it is the hash of the whole tokenizer.
        vocab_size: every id in a chunk is below this.
        embedding_model: name, for people and as a default to load. This and the next two are None
            if the collection has no embeddings.
        embedding_dimension: components of an embedding.
        embedding_probe: first numbers of a fixed sentence's embedding. They are compared by cosine:
            the same model passes under any name, another model fails under the same name.
        chunk_size: tokens in a chunk.
        format_version: version of a row's columns and of this identity.
        search: what its rows are searched by: "dense" (their embeddings), "bm25" (their words) or
            "hybrid" (both).
        analyzer: how Milvus cuts text into words; None in a dense collection. See
            [`parse_analyzer`].
        embedding_settings: prompts and truncation of the embedding model, those that have an
            effect; see [`Embedder.vector_settings`]. They are compared.
    """

    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    embedding_model: str | None
    embedding_dimension: int | None
    embedding_probe: Sequence[float] | None
    chunk_size: int
    format_version: int = FORMAT_VERSION
    search: str = "dense"
    analyzer: Analyzer | None = None
    embedding_settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tokenizer: BulkTokenizer,
        embedder: Embedder | None,
        chunk_size: int,
        search: str = "dense",
        analyzer: str | Analyzer | None = None,
    ) -> "Identity":
        """Return the identity of a collection that is built with these.

        Args:
            embedder: the embedding model; None for "bm25".
            search: "dense", "bm25" or "hybrid".
            analyzer: as for [`parse_analyzer`]; None in a dense collection.

        Raises:
            ValueError: the search is unknown, or does not go together with the embedding model or
                the analyzer; or the tokenizer loses text.
        """
        tokenizer.check_keeps_text()
        check_search(search, embedding_model=embedder.label if embedder else None, analyzer=analyzer)
        if embedder is None and search != "bm25":
            raise ValueError(f"Search {search!r} needs an embedding model. Give one, or search by 'bm25'.")
        return cls(
            tokenizer=tokenizer.name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            embedding_model=embedder.label if embedder else None,
            embedding_dimension=embedder.dimension if embedder else None,
            embedding_probe=embedder.probe if embedder else None,
            chunk_size=chunk_size,
            format_version=FORMAT_VERSION if search == "dense" else WORDS_FORMAT_VERSION,
            search=search,
            analyzer=None if search == "dense" else parse_analyzer(analyzer),
            embedding_settings=embedder.vector_settings if embedder else {},
        )

    @property
    def has_words(self) -> bool:
        """True if rows hold their text, to be searched by words."""
        return self.search != "dense"

    @property
    def has_vectors(self) -> bool:
        """True if rows hold their embedding, to be searched by meaning."""
        return self.search != "bm25"

    def to_json(self) -> str:
        """Return the identity as JSON, without what is not used, so that older versions read it."""
        fields = dataclasses.asdict(self)
        if not self.has_words:
            del fields["search"], fields["analyzer"]
        if not self.embedding_settings:
            del fields["embedding_settings"]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str, where: str) -> "Identity":
        """Read an identity from JSON.

        Args:
            where: name of the collection in errors.

        Raises:
            KnowledgeBaseError: it is damaged, or its format is unknown.
        """
        try:
            fields = json.loads(text)
            version = fields["format_version"]
            if version in READABLE_VERSIONS:
                identity = cls(**fields)
                check_search(identity.search)
                return identity
        except (ValueError, TypeError, KeyError) as error:
            raise KnowledgeBaseError(
                f"{where} has a damaged identity: {error!r}. Ingest its documents into a new collection."
            ) from error
        raise KnowledgeBaseError(
            f"{where} has format version {version}; this installation reads versions "
            f"{', '.join(map(str, READABLE_VERSIONS))}. "
            "Ingest its documents again, or install the version of transformers-retro that wrote it."
        )

    def differences(self, other: "Identity") -> list[str]:
        """List the reasons why two collections cannot share rows. Names do not count."""
        names = ("format_version", "search", "analyzer", "tokenizer_fingerprint", "embedding_dimension", "chunk_size")
        different = [
            f"{name} is {getattr(self, name)!r} and {getattr(other, name)!r}"
            for name in names
            if getattr(self, name) != getattr(other, name)
        ]
        different += [
            f"{name} is {mine} and {theirs}"
            for name, mine, theirs in _unequal(self.embedding_settings, other.embedding_settings)
        ]
        if not different and (cosine := _cosine(self.embedding_probe, other.embedding_probe)) < PROBE_SIMILARITY:
            different.append(
                f"embedding_model is {self.embedding_model!r} and {other.embedding_model!r} (cosine {cosine:.4f})"
            )
        return different

    def accepts(self, tokenizer: BulkTokenizer) -> bool:
        """Return True if the tokenizer gives every text the same ids as in this collection.

        Special tokens may differ, since no text becomes one. Format 2 has only a hash that counts
        special tokens: there, more of them may follow the ones it was built with.
        """
        if self.format_version == 2:
            return tokenizer.whole_fingerprint(self.vocab_size) == self.tokenizer_fingerprint
        return tokenizer.fingerprint == self.tokenizer_fingerprint

    def check(
        self,
        where: str,
        *,
        tokenizer: BulkTokenizer | None = None,
        embedder: Embedder | None = None,
        chunk_size: int | None = None,
        search: str | None = None,
        analyzer: Analyzer | None = None,
    ) -> None:
        """Compare a collection's identity with the caller's parts. None is not compared.

        Args:
            where: name of the collection in errors.

        Raises:
            IdentityMismatch: a part differs. The message names both sides of each difference.
        """
        differences = []
        if tokenizer is not None and not self.accepts(tokenizer):
            differences.append(
                f"its tokenizer is {self.tokenizer!r} ({self.vocab_size} ids, fingerprint "
                f"{self.tokenizer_fingerprint[:12]}), yours is {tokenizer.name!r} ({tokenizer.vocab_size} ids, "
                f"fingerprint {tokenizer.fingerprint[:12]})"
            )
        for name, mine, yours in (("search", self.search, search), ("analyzer", self.analyzer, analyzer)):
            if yours is not None and yours != mine:
                differences.append(f"its {name} is {mine!r}, yours is {yours!r}")
        if embedder is not None and not self.has_vectors:
            differences.append(f"it has no embeddings, yours are those of {embedder.label!r}")
        elif embedder is not None and embedder.dimension != self.embedding_dimension:
            differences.append(
                f"its embedding model is {self.embedding_model!r} with dimension {self.embedding_dimension}, yours is "
                f"{embedder.label!r} with dimension {embedder.dimension}"
            )
        elif embedder is not None and (similarity := _cosine(self.embedding_probe, embedder.probe)) < PROBE_SIMILARITY:
            differences.append(
                f"its embedding model is {self.embedding_model!r}, yours is {embedder.label!r}: they embed the same "
                f"sentence differently (cosine {similarity:.4f})"
            )
        if embedder is not None:
            differences += [
                f"its {name} is {its}, yours is {yours}"
                for name, its, yours in _unequal(self.embedding_settings, embedder.vector_settings)
            ]
        if chunk_size is not None and chunk_size != self.chunk_size:
            differences.append(f"its chunk_size is {self.chunk_size}, yours is {chunk_size}")
        if differences:
            raise IdentityMismatch(
                f"{where} was built differently: {'; '.join(differences)}. Use what it was built with, or ingest into "
                "another collection."
            )


def check_search(
    search: str,
    *,
    embedding_model: str | None = None,
    embedding_settings: EmbedderSettings | None = None,
    analyzer: str | Analyzer | None = None,
) -> None:
    """Raise ValueError unless there is such a search, and it uses what is given."""
    if search not in SEARCHES:
        raise ValueError(f"There is no search {search!r}. Use one of {', '.join(SEARCHES)}.")
    if search == "bm25" and embedding_model is not None:
        raise ValueError(
            f"The embedding model {embedding_model!r} is given, but search 'bm25' uses none. Leave it out, or search "
            "by 'dense' or 'hybrid'."
        )
    if search == "bm25" and embedding_settings is not None and (given := embedding_settings.given()):
        raise ValueError(
            f"Settings of an embedding model are given ({', '.join(given)}), but search 'bm25' uses none. Leave them "
            "out, or search by 'dense' or 'hybrid'."
        )
    if search == "dense" and analyzer is not None:
        raise ValueError(
            f"The analyzer {analyzer!r} is given, but search 'dense' looks at no words. Leave it out, or search by "
            "'bm25' or 'hybrid'."
        )


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """List the settings that differ: the name, and both values for people."""
    return [
        (name, repr(a[name]) if name in a else "not set", repr(b[name]) if name in b else "not set")
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]


def _cosine(a: Sequence[float] | None, b: Sequence[float] | None) -> float:
    """Return the cosine of two probes; 1 if there are none to compare."""
    if a is None or b is None:
        return 1.0
    norms = math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0
