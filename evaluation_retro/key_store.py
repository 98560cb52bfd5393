"""KeyStore: the keys of kNN-LM, with the token that follows each, in a Milvus collection.

Milvus searches by inner product, which it computes for many queries at once. One more number in
each vector makes that the order of the squared distance: with x' = (x, −|x|²/2) and q' = (q, 1),

    |q − x|² = |q|² − 2 q'·x'

Shapes: n queries, k keys found for each, d hidden size.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pymilvus import DataType, MilvusClient

from retrieval import IndexSettings, KnowledgeBaseError, MilvusAddress, MilvusConnection
from retrieval.collection import check_collection_name
from retrieval.rows import doc_key

IDENTITY = "retro.keys"  # the property that says what the keys were made of
STATES = "state"  # the column of vectors, and the name of its index
ROWS_PER_CALL = 500
QUERIES_PER_CALL = 128  # bounds what Milvus Lite needs: 100 MB for 200,000 keys
NUMBERS_OF_A_ROW = 3  # int64: the key's number, the token, the document


class KeyStore:
    """Keys (states of a decoder), their tokens and documents in a collection of their own.

    Args:
        uri: a Milvus Lite file (.db) or a server, as for [`MilvusAddress`].
        collection_name: the collection.

    Raises:
        KnowledgeBaseError: Milvus cannot be reached, or the file cannot be opened.
        ValueError: Milvus allows no collection of that name.
    """

    def __init__(self, uri: str | os.PathLike[str] | MilvusAddress, collection_name: str) -> None:
        check_collection_name(collection_name)
        self.connection = MilvusConnection(MilvusAddress.of(uri))
        self.collection_name = collection_name
        self._identity: dict[str, Any] = {}

    @property
    def where(self) -> str:
        """The collection's name and address, for messages."""
        return f"collection {self.collection_name!r} at {self.connection.uri}"

    def open(self, identity: Mapping[str, Any], dimension: int, index: str) -> None:
        """Make the collection if it does not exist, and load it.

        Args:
            identity: what the keys are made of; JSON.
            dimension: d.
            index: the index, such as "FLAT" (exact), as for [`IndexSettings.parse`].

        Raises:
            KnowledgeBaseError: the collection has the keys of something else or another index, or
                was made by another program; or Milvus does not know the index.
            ValueError: there is no such index, or it has no such parameter.
        """
        identity = {**identity, "index": index}
        if not self.connection.has_collection(self.collection_name):
            self._create(identity, dimension)
        there = self.identity()
        if other := [name for name, value in identity.items() if there.get(name) != value]:
            raise KnowledgeBaseError(
                f"{self.where} has keys of another {' and '.join(other)}. Name another file or collection for these "
                "keys, or delete this one."
            )
        if STATES not in self.connection.list_indexes(self.collection_name):  # killed before it was built
            self._build_index(dimension)
        if self.connection.owns_file:  # keys that a killed process left in the log are slow to search
            self.flush()
        self.connection.load_collection(self.collection_name)

    def _create(self, identity: Mapping[str, Any], dimension: int) -> None:
        is_lite, version = self.connection.is_lite, self.connection.version
        index = IndexSettings.parse(identity["index"])
        index.check(self.where, is_lite=is_lite, version=version, dimension=dimension + 1)
        text = json.dumps(identity)
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=text)
        schema.add_field("number", DataType.INT64, is_primary=True)
        schema.add_field("token", DataType.INT64)
        schema.add_field("doc_key", DataType.INT64)
        schema.add_field(STATES, DataType.FLOAT_VECTOR, dim=dimension + 1)
        self.connection.create_collection(self.collection_name, schema, {IDENTITY: text})

    def _build_index(self, dimension: int) -> None:
        index, is_lite = self._index(), self.connection.is_lite
        build = index.build_params(dimension + 1)
        parameters = MilvusClient.prepare_index_params()
        # pymilvus sends each parameter by itself, Milvus Lite reads those that lie in "params"
        sent: dict[str, Any] = {"params": build} if is_lite else build
        parameters.add_index(STATES, index_type=index.kind, metric_type="IP", params=sent)
        self.connection.create_index(self.collection_name, parameters, wait=not is_lite)

    def _index(self) -> IndexSettings:
        return IndexSettings.parse(self.identity()["index"])

    def identity(self) -> dict[str, Any]:
        """Return what the keys are made of.

        Raises:
            KnowledgeBaseError: the collection does not say so; another program made it.
        """
        if not self._identity:
            description = self.connection.describe_collection(self.collection_name)
            text = description.get("properties", {}).get(IDENTITY) or description.get("description")
            try:
                self._identity = dict(json.loads(text or ""))
            except ValueError:
                raise KnowledgeBaseError(f"{self.where} is no store of keys. Name another collection.") from None
        return self._identity

    def write(self, number: int, states: np.ndarray, tokens: Sequence[int], doc_ids: Sequence[str]) -> None:
        """Write keys; those with a number that exists are replaced.

        Args:
            number: the first key's; the others follow.
            states: (n, d) float32.
            tokens, doc_ids: what follows each key, and the document that it comes from.
        """
        halves = np.square(states, dtype=np.float64).sum(1, keepdims=True) / 2
        vectors = np.concatenate([states, -halves.astype(np.float32)], axis=1)
        keys = {doc_id: doc_key(doc_id) for doc_id in set(doc_ids)}
        rows = [
            {"number": number + place, "token": int(token), "doc_key": keys[doc_id], STATES: vectors[place]}
            for place, (token, doc_id) in enumerate(zip(tokens, doc_ids, strict=True))
        ]
        for start in range(0, len(rows), ROWS_PER_CALL):
            self.connection.upsert(self.collection_name, rows[start : start + ROWS_PER_CALL])

    def count(self) -> int:
        """Return how many keys are there."""
        (total,) = self.connection.query(self.collection_name, "", ["count(*)"])
        return int(total["count(*)"])

    def search(
        self, states: np.ndarray, k: int, exclude_doc_ids: Sequence[Collection[str]] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the squared distances (n, k) and tokens (n, k) of the nearest keys, nearest first.

        Where there are fewer keys, the distance is infinite and the token 0.

        Args:
            states: (n, d) float32.
            k: keys to find for each.
            exclude_doc_ids: for each state, documents whose keys are left out.

        Raises:
            KnowledgeBaseError: Milvus does not answer, or finds no keys though there are some.
        """
        distances = np.full((len(states), k), np.inf, dtype=np.float32)
        tokens = np.zeros((len(states), k), dtype=np.int64)
        queries = np.concatenate([states, np.ones((len(states), 1))], axis=1, dtype=np.float32)
        squares = np.square(states, dtype=np.float64).sum(1)
        excluded = [frozenset(ids) for ids in exclude_doc_ids or [()] * len(states)]
        for ids, places in _parts(excluded):
            keys = sorted(doc_key(doc_id) for doc_id in ids)
            found = self.connection.search(
                self.collection_name,
                list(queries[places]),
                column=STATES,
                limit=k,
                expression=f"doc_key not in {keys}" if keys else "",
                fields=["token"],
                parameters=self._index().search_params(k),
            )
            if not keys and not all(found):
                raise KnowledgeBaseError(f"{self.where} has keys, but none was found. Try again when it is loaded.")
            for place, hits in zip(places, found, strict=True):
                scores = np.array([hit["distance"] for hit in hits], dtype=np.float64)
                distances[place, : len(hits)] = np.maximum(squares[place] - 2 * scores, 0.0)
                tokens[place, : len(hits)] = [hit["entity"]["token"] for hit in hits]
        return distances, tokens

    def num_bytes(self) -> int:
        """Return the bytes of a Milvus Lite file on disk; on a server, those of the rows."""
        on_disk = self.connection.address.bytes_on_disk()
        if on_disk is not None:
            return on_disk
        dimension = next(
            int(field["params"]["dim"])
            for field in self.connection.describe_collection(self.collection_name)["fields"]
            if field["name"] == STATES
        )
        return self.count() * (4 * dimension + 8 * NUMBERS_OF_A_ROW)

    def flush(self) -> None:
        """Flush pending writes to disk."""
        self.connection.flush(self.collection_name)

    def close(self) -> None:
        """Close the connection; another process can then open a Milvus Lite file."""
        self.connection.close()


def _parts(excluded: Sequence[frozenset[str]]) -> Iterator[tuple[frozenset[str], list[int]]]:
    """Yield the queries of each call: places with the same excluded documents, not too many."""
    places: dict[frozenset[str], list[int]] = {}
    for place, ids in enumerate(excluded):
        places.setdefault(ids, []).append(place)
    for ids, all_places in places.items():
        for start in range(0, len(all_places), QUERIES_PER_CALL):
            yield ids, all_places[start : start + QUERIES_PER_CALL]
