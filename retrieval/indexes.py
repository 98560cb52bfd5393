"""Vector indexes: their kinds and parameters, and a recommendation for a number of rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import KnowledgeBaseError


@dataclass(frozen=True)
class Kind:
    """One type of index.

    Attributes:
        build, search: parameter → (least, most, default). With None, Milvus chooses the default.
        since: first version of Milvus that has it.
        lite: True if Milvus Lite can build it. (It accepts the names of others and fails later.)
    """

    build: Mapping[str, tuple[int, int, int | None]] = field(default_factory=dict)
    search: Mapping[str, tuple[int, int, int | None]] = field(default_factory=dict)
    since: tuple[int, int] = (2, 2)
    lite: bool = False


_LISTS = {"nlist": (1, 65536, 1024)}
_PROBES = {"nprobe": (1, 65536, 128)}
KINDS: dict[str, Kind] = {
    "FLAT": Kind(lite=True),
    "HNSW": Kind({"M": (2, 2048, 16), "efConstruction": (8, 10_000, 200)}, {"ef": (1, 32768, 64)}, lite=True),
    "IVF_FLAT": Kind(_LISTS, _PROBES, lite=True),
    "IVF_SQ8": Kind(_LISTS, _PROBES, lite=True),
    "IVF_PQ": Kind({**_LISTS, "m": (1, 65536, None), "nbits": (1, 16, 8)}, _PROBES),
    "IVF_RABITQ": Kind(_LISTS, {**_PROBES, "rbq_query_bits": (0, 8, 0)}, since=(2, 6)),
    "DISKANN": Kind(search={"search_list": (1, 65535, 100)}),
    "AUTOINDEX": Kind(search={"level": (1, 10, None)}, lite=True),
    "GPU_CAGRA": Kind(
        {"intermediate_graph_degree": (2, 1024, 64), "graph_degree": (2, 1024, 32)},
        {"itopk_size": (1, 1024, 128), "search_width": (1, 1024, 4)},
        since=(2, 4),
    ),
}
SMALL = 50_000  # up to so many rows, an exact search takes some hundredths of a second on a laptop
GRAPH_IN_MEMORY = 100_000_000  # up to so many rows, a graph and all vectors are kept in memory


@dataclass(frozen=True)
class IndexSettings:
    """An index type with all its parameters.

    Build one with [`IndexSettings.parse`], [`IndexSettings.of`] or [`recommend`].

    Attributes:
        kind: a name in `KINDS`.
        build: parameters for building it.
        search: parameters for searching.
    """

    kind: str
    build: Mapping[str, int]
    search: Mapping[str, int]

    @classmethod
    def parse(cls, text: str) -> "IndexSettings":
        """Read "HNSW" or "HNSW:M=32,efConstruction=400,ef=128". The rest has its defaults.

        Raises:
            ValueError: the index or a parameter is unknown, or a value is out of its range.
        """
        name, _, rest = text.partition(":")
        name = name.strip().upper()
        pairs: dict[str, Any] = {}
        for item in filter(None, (item.strip() for item in rest.split(","))):
            key, equals, value = item.partition("=")
            if not equals:
                raise ValueError(f"{item!r} in {text!r} is not of the form parameter=value, such as M=32.")
            pairs[key.strip()] = value.strip()
        return cls.of(name, pairs)

    @classmethod
    def of(cls, kind: str, parameters: Mapping[str, Any]) -> "IndexSettings":
        """Return settings of this kind with some parameters given.

        Raises:
            ValueError: as [`IndexSettings.parse`].
        """
        if kind not in KINDS:
            raise ValueError(f"There is no index {kind!r}; there are {', '.join(KINDS)}.")
        known = {**KINDS[kind].build, **KINDS[kind].search}
        values: dict[str, int] = {}
        for name, value in parameters.items():
            if name not in known:
                raise ValueError(f"{kind} has no parameter {name!r}; it has {', '.join(known) or 'none'}.")
            least, most, _ = known[name]
            try:
                values[name] = int(value)
            except (TypeError, ValueError):
                raise ValueError(f"{name} of {kind} must be a whole number, not {value!r}.") from None
            if not least <= values[name] <= most:
                raise ValueError(f"{name} of {kind} must be between {least} and {most}, not {values[name]}.")
        values = {name: default for name, (_, _, default) in known.items() if default is not None} | values
        build = {name: values[name] for name in KINDS[kind].build if name in values}
        search = {name: values[name] for name in KINDS[kind].search if name in values}
        if search.get("nprobe", 1) > build.get("nlist", 65536):
            search["nprobe"] = build["nlist"]
        return cls(kind, build, search)

    def check(self, where: str, *, is_lite: bool, version: tuple[int, ...], dimension: int) -> None:
        """Check that Milvus can build this index, before anything is built.

        Args:
            where: name of the collection in errors.

        Raises:
            KnowledgeBaseError: this Milvus does not have the index.
            ValueError: the parameters do not suit the dimension.
        """
        kind = KINDS[self.kind]
        if is_lite and not kind.lite:
            can = ", ".join(name for name, other in KINDS.items() if other.lite)
            raise KnowledgeBaseError(
                f"{where}: Milvus Lite cannot build {self.kind}; it has {can}. Use one of these, or a server."
            )
        if not is_lite and version < kind.since:
            raise KnowledgeBaseError(
                f"{where}: {self.kind} needs Milvus {'.'.join(map(str, kind.since))} or newer, this server is "
                f"{'.'.join(map(str, version))}."
            )
        if self.kind == "IVF_PQ" and dimension % self.parts(dimension):
            raise ValueError(f"m of IVF_PQ must divide the dimension {dimension}, and {self.build['m']} does not.")

    def parts(self, dimension: int) -> int:
        """Return `m` of IVF_PQ, the number of parts of a vector.

        By default a part has two numbers, which keeps recall high.
        """
        return self.build.get("m") or max(1, dimension // 2)

    def build_params(self, dimension: int) -> dict[str, int]:
        """Return the parameters for building, as Milvus takes them."""
        return {**self.build, "m": self.parts(dimension)} if self.kind == "IVF_PQ" else dict(self.build)

    def search_params(self, limit: int) -> dict[str, dict[str, int]]:
        """Return the parameters of a search for the `limit` nearest rows.

        The list of candidates is never shorter than `limit`.
        """
        params = dict(self.search)
        for name in ("ef", "search_list", "itopk_size"):
            if name in params:
                params[name] = max(params[name], limit)
        return {"params": params}


def recommend(rows: int, *, is_lite: bool) -> IndexSettings:
    """Return the index for about this many rows.

    Small collections get exact search. Larger ones get a graph, which finds the true neighbors
    soonest. The graph lies on disk when it no longer fits the memory of a few machines.
    """
    if rows <= SMALL:
        return IndexSettings.parse("FLAT")
    return IndexSettings.parse("HNSW" if is_lite or rows <= GRAPH_IN_MEMORY else "DISKANN")
