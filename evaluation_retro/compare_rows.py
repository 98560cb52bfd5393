"""The rows of the comparison: which there are, and what they need of a window."""

from dataclasses import dataclass, field, replace
from enum import Enum

from modeling_retro import RetroConfig
from retrieval.settings import same_setting

from .key_building import KeySettings

SEPARATOR = "\n\n"  # follows each neighbor that stands in a prompt


class Method(Enum):
    """The ways to predict the same tokens, by their names in the table."""

    DECODER = "decoder"
    COPY_BASELINE = "decoder + copy baseline"
    IN_CONTEXT = "in-context"
    KNN_LM = "kNN-LM"
    REPLUG = "REPLUG"
    RETRO = "RETRO"
    SHUFFLED = "RETRO, shuffled"
    OFF = "RETRO, off"
    BOTH = "RETRO + in-context"

    @property
    def reads_prompts(self) -> bool:
        """True if neighbors stand in the decoder's prompt."""
        return self in (Method.IN_CONTEXT, Method.REPLUG, Method.BOTH)

    @property
    def has_retro(self) -> bool:
        """True if RETRO's own parameters read neighbors."""
        return self in (Method.RETRO, Method.SHUFFLED, Method.BOTH)

    @property
    def is_timed(self) -> bool:
        """True if the costs are measured. Those of the others are the costs of another row."""
        return self not in (Method.SHUFFLED, Method.OFF)


DRAFTED = {Method.RETRO: "drafts", Method.IN_CONTEXT: "prompt lookup"}  # how rows with drafts are called


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        method: the way to predict.
        k: neighbors of a point; None without neighbors.
        stride: tokens between two searches; None without neighbors.
        long_window: the neighbors stand before the whole window. False: the text is shortened.
        drafts: it generates with drafts, one text at a time. They change its time alone.
    """

    method: Method
    k: int | None = None
    stride: int | None = None
    long_window: bool = False
    drafts: bool = False

    @property
    def name(self) -> str:
        """The row's name in the table."""
        parts = [self.method.value]
        if self.k is not None:
            parts += [f"k = {self.k}", f"stride {self.stride}"]
        parts += ["longer window"] * self.long_window
        return ", ".join([*parts, DRAFTED[self.method]] if self.drafts else parts)

    @property
    def key(self) -> str:
        """The row's name among kept parts."""
        parts = [self.method.name.lower()]
        if self.k is not None:
            parts += [f"k{self.k}", f"s{self.stride}"]
        return "_".join(parts + ["long"] * self.long_window + ["drafts"] * self.drafts)

    @property
    def without_drafts(self) -> "Row":
        """The row with the same quality that generates without drafts."""
        return replace(self, drafts=False)

    def is_timed_with(self, batch: int) -> bool:
        """Return True if the row is timed with this many texts at a time."""
        return self.method.is_timed and (batch == 1 or not self.drafts)


@dataclass
class RowSettings:
    """The rows to measure; fields for `HfArgumentParser`, to inherit.

    Raises:
        ValueError: a number is out of its range.
    """

    neighbors: list[int] = field(
        default_factory=lambda: [1, 2, 4], metadata={"help": "Numbers of neighbors of in-context retrieval."}
    )
    retro_neighbors: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Numbers of neighbors that RETRO reads, and with it the copy baseline, REPLUG, and RETRO with "
            "in-context retrieval. Default: the model's."
        },
    )
    strides: list[int] = field(
        default_factory=list,
        metadata={"help": "Tokens between two searches, for each row with neighbors. Default: a chunk."},
    )
    long_window: bool = field(
        default=False,
        metadata={
            "help": "Measure in-context retrieval with a longer window, too: the neighbors stand before the whole text."
        },
    )
    replug: bool = field(default=False, metadata={"help": "Measure REPLUG, too. It reads the text once per neighbor."})
    knn_lm: bool = field(
        default=False, metadata={"help": "Measure kNN-LM, too. Its keys are made of the knowledge base's texts."}
    )
    drafts: bool = field(
        default=False,
        metadata={
            "help": "Time RETRO with drafts from neighbors, and in-context retrieval with prompt lookup, too: for one "
            "text at a time."
        },
    )
    key_store: str | None = field(
        default=None,
        metadata={
            "help": "Keys of kNN-LM: a Milvus Lite file, or a server's URI (its token: MILVUS_TOKEN). Default: "
            "knn_keys.db among the finished parts."
        },
    )
    key_collection: str = same_setting(KeySettings, "key_collection")
    key_index: str = same_setting(KeySettings, "key_index")
    max_keys: int = same_setting(KeySettings, "max_keys")
    key_window: int = same_setting(KeySettings, "key_window")
    key_context: int = same_setting(KeySettings, "key_context")
    batch_size: int = field(default=4, metadata={"help": "Windows in a forward pass of RETRO and of the decoder."})
    no_costs: bool = field(default=False, metadata={"help": "Measure no time and no memory."})
    new_tokens: int = field(
        default=256,
        metadata={
            "help": "Tokens that are generated to measure time. After each chunk of them, rows with neighbors in the "
            "prompt read it again."
        },
    )
    rounds: int = field(default=3, metadata={"help": "Rounds in which all rows are timed in turns."})
    cost_batches: list[int] = field(
        default_factory=lambda: [1, 8], metadata={"help": "Numbers of texts that are generated at a time."}
    )

    def __post_init__(self) -> None:
        for name in ("neighbors", "retro_neighbors", "strides", "cost_batches"):
            values = getattr(self, name)
            values = [values] if isinstance(values, int) else values  # a single one in YAML, not in a list
            setattr(self, name, sorted(set(values)))
            if any(value < 1 for value in values):
                raise ValueError(f"{name} has {min(values)}. Give numbers of at least 1.")
        for name in ("batch_size", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}. Give at least 1.")
        if self.drafts and (self.no_costs or 1 not in self.cost_batches):
            raise ValueError(
                f"drafts change only the time of one text, but no_costs is {self.no_costs} and cost_batches is "
                f"{self.cost_batches}. Leave drafts out, or measure costs with 1 among cost_batches."
            )
        self.key_settings("checked")

    def key_settings(self, key_store: str) -> KeySettings:
        """Return the settings of kNN-LM's keys.

        Args:
            key_store: where the keys are, if the settings do not say.
        """
        return KeySettings(
            self.key_store or key_store,
            self.key_collection,
            self.key_index,
            self.max_keys,
            self.key_window,
            self.key_context,
        )


def plan_rows(settings: RowSettings, config: RetroConfig) -> list[Row]:
    """Return all rows that the settings ask for, in the table's order."""
    strides = sorted(settings.strides, reverse=True) or [config.chunk_size]
    assert config.num_neighbors is not None, "set when the configuration is built"
    read = settings.retro_neighbors or [config.num_neighbors]
    windows = (False, True) if settings.long_window else (False,)

    def grid(method: Method, counts: list[int], windows: tuple[bool, ...] = (False,)) -> list[Row]:
        rows = [Row(method, k, stride, long) for long in windows for stride in strides for k in counts]
        if settings.drafts and method in DRAFTED:
            rows += [replace(row, drafts=True) for row in rows]
        return rows

    return [
        Row(Method.DECODER),
        *grid(Method.COPY_BASELINE, read),
        *grid(Method.IN_CONTEXT, settings.neighbors, windows),
        *([Row(Method.KNN_LM)] if settings.knn_lm else []),
        *(grid(Method.REPLUG, read) if settings.replug else []),
        *grid(Method.RETRO, read),
        *grid(Method.SHUFFLED, read),
        Row(Method.OFF),
        *grid(Method.BOTH, read, windows),
    ]


@dataclass(frozen=True)
class Sizes:
    """The numbers of tokens that decide whether rows can be measured.

    Attributes:
        window: of each window.
        chunk: m, of a chunk.
        neighbor: of a neighbor in a prompt at most, with its separator.
        positions: that the decoder has.
        new: that are generated to measure time; 0 without.
    """

    window: int
    chunk: int
    neighbor: int
    positions: int
    new: int

    def check(self, rows: list[Row]) -> None:
        """Check that all rows can be measured.

        Raises:
            ValueError: the window is no multiple of the chunk, is too short, or is longer than the
                decoder's positions; or a stride does not divide the chunk.
        """
        window, chunk = self.window, self.chunk
        if window % chunk or window < 2 * chunk:
            raise ValueError(
                f"window is {window}, but the last chunk of {chunk} tokens is measured. Set --window to a multiple of "
                f"{chunk}, {2 * chunk} or more."
            )
        for row in rows:
            if row.stride is not None and chunk % row.stride:
                raise ValueError(
                    f"strides has {row.stride}, which does not divide the chunk of {chunk} tokens. Give strides such "
                    f"as {chunk} and {max(1, chunk // 4)}."
                )
            self._check_prompt(row)
        longest = max([window, *(self.longest(row) for row in rows)])
        if longest > self.positions:
            raise ValueError(
                f"The longest text that is read has {longest} tokens, but the decoder has {self.positions} positions. "
                "Set a smaller --window, fewer --neighbors or --new_tokens, or leave --long_window out."
            )

    def _check_prompt(self, row: Row) -> None:
        """Check that a row's neighbors leave room in the window for the text that must follow."""
        if not row.method.reads_prompts or row.long_window:
            return
        assert row.k is not None and row.stride is not None, "these rows have neighbors"
        before = self.neighbor * (1 if row.method is Method.REPLUG else row.k)
        if before + row.stride > self.window:
            raise ValueError(
                f"A window of {self.window} tokens is too short for {row.name}: the neighbors may have {before} "
                f"tokens, and {row.stride} tokens of text must follow. Set --window to "
                f"{-(-(before + row.stride) // self.chunk) * self.chunk} or more, or ask for fewer --neighbors and "
                "--retro_neighbors."
            )

    def longest(self, row: Row) -> int:
        """Return how many tokens the decoder reads at most, measuring or generating."""
        text = max(self.window, self.window - self.chunk + self.new if row.method.is_timed else 0)
        if row.long_window:
            assert row.k is not None, "these rows have neighbors"
            return text + self.neighbor * row.k
        return self.window if row.method.reads_prompts else text
