"""MilvusConnection: typed calls of Milvus, retried while it is away."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pymilvus import AnnSearchRequest, RRFRanker
from pymilvus.milvus_client import IndexParams
from pymilvus.orm.schema import CollectionSchema

from .session import MilvusSession

Row = dict[str, Any]

RRF_K = 60  # of reciprocal rank fusion, from Cormack et al. (2009): a row of rank r gains 1 / (60 + r)


class MilvusConnection(MilvusSession):
    """The calls of Milvus that a knowledge base needs, each retried while Milvus is unavailable.

    Arguments, attributes and errors as for [`MilvusSession`].
    """

    def list_collections(self) -> list[str]:
        """Return the names of all collections."""
        return self._call("list_collections", None, lambda client: client.list_collections(timeout=self.timeout))

    def has_collection(self, name: str) -> bool:
        """Return True if the collection exists."""
        return self._call("has_collection", name, lambda client: client.has_collection(name, timeout=self.timeout))

    def describe_collection(self, name: str) -> dict[str, Any]:
        """Return the collection's fields and properties."""
        return self._call(
            "describe_collection", name, lambda client: client.describe_collection(name, timeout=self.timeout)
        )

    def create_collection(self, name: str, schema: CollectionSchema, properties: dict[str, str]) -> None:
        """Make a collection without an index."""
        self._call(
            "create_collection",
            name,
            lambda client: client.create_collection(name, schema=schema, properties=properties, timeout=self.timeout),
        )

    def drop_collection(self, name: str) -> None:
        """Delete a collection with all its rows."""
        self._call("drop_collection", name, lambda client: client.drop_collection(name, timeout=self.timeout))

    def load_collection(self, name: str) -> None:
        """Load a collection into memory; only a loaded one can be read."""
        self._call("load_collection", name, lambda client: client.load_collection(name, timeout=self.timeout))

    def release_collection(self, name: str) -> None:
        """Take a collection out of memory."""
        self._call("release_collection", name, lambda client: client.release_collection(name, timeout=self.timeout))

    def alter_properties(self, name: str, properties: dict[str, str]) -> None:
        """Set properties of a collection."""
        self._call(
            "alter_collection_properties",
            name,
            lambda client: client.alter_collection_properties(name, properties, timeout=self.timeout),
        )

    def load_state(self, name: str) -> str:
        """Return the name of the collection's load state, such as "Loaded"."""
        state = self._call("get_load_state", name, lambda client: client.get_load_state(name, timeout=self.timeout))
        return state["state"].name

    def stored_rows(self, name: str) -> int:
        """Return how many rows are stored, whether or not a search can see them yet."""
        stats = self._call(
            "get_collection_stats", name, lambda client: client.get_collection_stats(name, timeout=self.timeout)
        )
        return int(stats["row_count"])

    def flush(self, name: str) -> None:
        """Flush pending writes to disk."""
        self._call("flush", name, lambda client: client.flush(name, timeout=self.timeout))

    def create_index(self, name: str, parameters: IndexParams, *, wait: bool) -> None:
        """Build an index; `wait` until it is complete."""
        self._call(
            "create_index",
            name,
            lambda client: client.create_index(name, parameters, sync=wait, timeout=self.timeout),
        )

    def drop_index(self, name: str, index: str) -> None:
        """Drop an index; the collection must not be loaded."""
        self._call("drop_index", name, lambda client: client.drop_index(name, index, timeout=self.timeout))

    def list_indexes(self, name: str) -> list[str]:
        """Return the names of a collection's indexes."""
        return self._call("list_indexes", name, lambda client: client.list_indexes(name, timeout=self.timeout))

    def describe_index(self, name: str, index: str) -> dict[str, Any]:
        """Return the type, parameters and progress of an index."""
        return self._call(
            "describe_index", name, lambda client: client.describe_index(name, index, timeout=self.timeout)
        )

    def query(
        self,
        name: str,
        expression: str,
        fields: Sequence[str],
        *,
        limit: int | None = None,
        consistency: str = "Strong",
        in_key_order: bool = False,
    ) -> list[Row]:
        """Return the rows that match a filter expression.

        Args:
            fields: columns to read.
            limit: rows to return at most; None for all.
            consistency: "Strong" waits for all writes; "Session" sees this process's own.
            in_key_order: return the rows that come first in the order of their keys.
        """
        options: dict[str, Any] = {} if limit is None else {"limit": limit}
        # servers always sort by key; Milvus Lite does so only in an iteration
        options |= {"iterator": "True"} if in_key_order and self.is_lite else {}
        return self._call(
            "query",
            name,
            lambda client: client.query(
                name,
                filter=expression,
                output_fields=list(fields),
                consistency_level=consistency,
                timeout=self.timeout,
                **options,
            ),
        )

    def search(
        self,
        name: str,
        queries: list[np.ndarray] | list[str],
        *,
        column: str,
        limit: int,
        expression: str,
        fields: Sequence[str],
        parameters: dict[str, Any],
        consistency: str = "Session",
    ) -> list[list[Row]]:
        """Return, for each query, the nearest rows that match a filter expression, best first.

        Args:
            queries: vectors, or texts for a column of words.
            column: the column that is searched.
            limit: rows for each query, at most.
            fields: columns to read.
            parameters: the index's search parameters.
            consistency: as for `query`.
        """
        return self._call(
            "search",
            name,
            lambda client: client.search(
                name,
                queries,
                anns_field=column,
                limit=limit,
                filter=expression,
                output_fields=list(fields),
                search_params=parameters,
                consistency_level=consistency,
                timeout=self.timeout,
            ),
        )

    def hybrid_search(
        self,
        name: str,
        requests: list[AnnSearchRequest],
        *,
        limit: int,
        fields: Sequence[str],
        consistency: str = "Session",
    ) -> list[list[Row]]:
        """Make several searches at once and fuse their results by reciprocal rank, best first.

        Args:
            requests: the searches, of one query each for every result.
            limit: rows of each fused result, at most.
            fields, consistency: as for `search`.
        """
        return self._call(
            "hybrid_search",
            name,
            lambda client: client.hybrid_search(
                name,
                requests,
                RRFRanker(RRF_K),
                limit=limit,
                output_fields=list(fields),
                consistency_level=consistency,
                timeout=self.timeout,
            ),
        )

    def upsert(self, name: str, rows: list[Row]) -> None:
        """Write rows; those with a key that exists are replaced."""
        self._call("upsert", name, lambda client: client.upsert(name, rows, timeout=self.timeout))

    def delete(self, name: str, keys: list[str]) -> None:
        """Delete rows by primary key."""
        self._call("delete", name, lambda client: client.delete(name, ids=keys, timeout=self.timeout))
