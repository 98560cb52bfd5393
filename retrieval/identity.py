"""The identity of a collection: the tokenizer, embedding model and chunk size of its rows."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .embedding import Embedder
from .errors import IdentityMismatch, KnowledgeBaseError
from .tokenization import BulkTokenizer

# 2: metadata. 3: special tokens do not count in tokenizer_fingerprint and vocab_size.
FORMAT_VERSION = 3
READABLE_VERSIONS = (2, 3)

# Least cosine of two probes of the same model. Half precision and other hardware stay above 0.9999;
# other models are far below.
PROBE_SIMILARITY = 0.999


@dataclass(frozen=True)
class Identity:
    """The tokenizer, embedding model and chunk size that a collection is made with.

    It is stored with the collection and checked on opening.

    Attributes:
        tokenizer: name, for people and as a default to load.
        tokenizer_fingerprint: hash of everything that decides which ids a text becomes. This is
            compared. In format 2 it is the hash of the whole tokenizer.
        vocab_size: every id in a chunk is below this.
        embedding_model: name, for people and as a default to load.
        embedding_dimension: components of an embedding.
        embedding_probe: first numbers of a fixed sentence's embedding. They are compared by cosine:
            the same model passes under any name, another model fails under the same name.
        chunk_size: tokens in a chunk.
        format_version: version of a row's columns and of this identity.
        embedding_settings: prompts and truncation of the embedding model, those that have an
            effect; see [`Embedder.vector_settings`]. They are compared.
    """

    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int
    embedding_model: str
    embedding_dimension: int
    embedding_probe: Sequence[float]
    chunk_size: int
    format_version: int = FORMAT_VERSION
    embedding_settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: BulkTokenizer, embedder: Embedder, chunk_size: int) -> "Identity":
        """Return the identity of a collection that is built with these three."""
        return cls(
            tokenizer=tokenizer.name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            embedding_model=embedder.label,
            embedding_dimension=embedder.dimension,
            embedding_probe=embedder.probe,
            chunk_size=chunk_size,
            embedding_settings=embedder.vector_settings,
        )

    def to_json(self) -> str:
        """Return the identity as JSON. Without embedding settings, older versions read it, too."""
        fields = dataclasses.asdict(self)
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
                return cls(**fields)
        except (ValueError, TypeError, KeyError) as error:
            raise KnowledgeBaseError(
                f"{where} has a damaged identity: {error!r}. Ingest its documents into a new collection."
            ) from error
        raise KnowledgeBaseError(
            f"{where} has format version {version}; this installation reads versions "
            f"{' and '.join(map(str, READABLE_VERSIONS))}. "
            "Ingest its documents again, or install the version of transformers-retro that wrote it."
        )

    def differences(self, other: "Identity") -> list[str]:
        """List the reasons why two collections cannot share rows. Names do not count."""
        different = [
            f"{name} is {getattr(self, name)!r} and {getattr(other, name)!r}"
            for name in ("format_version", "tokenizer_fingerprint", "embedding_dimension", "chunk_size")
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
        if embedder is not None and embedder.dimension != self.embedding_dimension:
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


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """List the settings that differ: the name, and both values for people."""
    return [
        (name, repr(a[name]) if name in a else "not set", repr(b[name]) if name in b else "not set")
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    norms = math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0
