"""Compare RETRO with all that could be done instead: one table on the same tokens.

Every row predicts the last chunk of each window, after the same text and with the same neighbors:

    decoder                     no neighbors
    decoder + copy baseline     mixed with an n-gram copier over the neighbors
    in-context                  the neighbors' text stands before the text (Ram et al., 2023)
    kNN-LM                      mixed with what followed the nearest states (Khandelwal et al.,
                                2020)
    REPLUG                      an ensemble of prompts with one neighbor each (Shi et al., 2023)
    RETRO                       with its neighbors, with those of another window (shuffled), and
                                without any (off)
    RETRO + in-context          both together

All have the same window: neighbors in a prompt take the place of the text's beginning. With
`--long_window` they stand before the whole text, too. What rivals can choose (weights, k and
temperature) is chosen on training texts.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from retrieval.settings import same_setting

from .compare_nats import RowNats
from .compare_report import write_report
from .compare_rows import SEPARATOR, Row, RowSettings, Sizes, plan_rows
from .comparison import Comparison
from .found import ONE_WINDOW
from .generation_cost import RowCosts
from .kept import Kept
from .opening import ModelSettings, Opened, open_model, plain_decoder
from .report import Report
from .windows import TextSettings, Windows, draw_windows


@dataclass
class CompareSettings(RowSettings, TextSettings, ModelSettings):
    """The settings of `retro-eval compare`.

    Raises:
        ValueError: a number is out of its range.
    """

    window: int = same_setting(TextSettings, "window", default=768)
    training_texts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Text on which rivals choose their weights: files, folders, or names of datasets. It may be the "
            "knowledge base's own, since a document's own chunks are never its neighbors."
        },
    )
    training_windows: int = field(default=64, metadata={"help": "Windows of training text at most."})
    output_dir: str = field(default="comparison", metadata={"help": "Folder of the report and of finished parts."})

    def __post_init__(self) -> None:
        TextSettings.__post_init__(self)
        RowSettings.__post_init__(self)
        if isinstance(self.training_texts, str):  # a single one in YAML, not in a list
            self.training_texts = [self.training_texts]
        if self.training_windows < 1:
            raise ValueError(f"training_windows is {self.training_windows}. Give at least 1.")


SETTINGS = CompareSettings


def compare(
    opened: Opened, windows: Windows, training: Windows, settings: RowSettings, kept: Kept, seed: int = 0
) -> Comparison:
    """Measure all rows.

    Args:
        opened: RETRO and its knowledge base.
        windows: what is measured: the last chunk of each.
        training: windows of training texts, as long as the others.
        settings: the rows.
        kept: the folder of finished parts.
        seed: of shuffled neighbors, and of the texts that kNN-LM's keys are made of.

    Raises:
        ValueError: the windows do not fit the rows (see [`Sizes.check`]), or no neighbors are
            found.
        KnowledgeBaseError: the knowledge base does not answer.
    """
    rows = check(opened, windows, settings)
    most = max(row.k for row in rows if row.k is not None)
    decoder = plain_decoder(opened.model)
    measured = RowNats(opened, decoder, windows, training, settings, kept, most, seed)
    try:
        nats = {row: measured.of(row) for row in rows}
        costs = RowCosts(measured)
        return Comparison(
            nats,
            windows.text_bytes(opened.tokenizer, measured.first + 1),
            {} if settings.no_costs else costs.measure(rows),
            {row: chosen for row in rows if (chosen := measured.chosen(row)) is not None},
            costs.where,
            measured.repeated(),
        )
    finally:
        measured.close()


def check(opened: Opened, windows: Windows, settings: RowSettings) -> list[Row]:
    """Return the rows to measure, after checking that the windows fit them.

    Raises:
        ValueError: they do not; see [`Sizes.check`].
    """
    assert opened.retriever is not None, "it is opened with a knowledge base"
    config = opened.model.config
    (separator,) = opened.tokenizer.encode_batch([SEPARATOR])
    rows = plan_rows(settings, config)
    Sizes(
        windows.tokens.shape[1],
        config.chunk_size,
        opened.retriever.neighbor_length + len(separator),
        config.n_positions,
        0 if settings.no_costs else settings.new_tokens,
    ).check(rows)
    if settings.knn_lm and settings.key_window > config.n_positions:
        raise ValueError(
            f"key_window is {settings.key_window}, but the decoder has {config.n_positions} positions. Set a smaller "
            "--key_window."
        )
    if len(windows) < 2:
        raise ValueError(ONE_WINDOW)
    return rows


def run(settings: CompareSettings) -> None:
    """Measure, and write the report."""
    if not settings.training_texts:
        raise ValueError(
            "training_texts is empty, but the copy baseline's weight is chosen on training text. Name files, folders "
            "or datasets, such as the texts of the knowledge base."
        )
    documents, training_documents = (list(settings.documents(names)) for names in (None, settings.training_texts))
    opened = open_model(settings)
    try:
        windows = draw_windows(documents, opened.tokenizer, settings)
        of_training = replace(settings, windows=settings.training_windows)
        training = draw_windows(training_documents, opened.tokenizer, of_training, "training_texts")
        check(opened, windows, settings)
        of = opened.describe() | {
            "windows": windows.fingerprint(),
            "training windows": training.fingerprint(),
            "separator": SEPARATOR,
            "seed": settings.seed,
        }
        kept = Kept(Path(settings.output_dir) / "parts", of)
        comparison = compare(opened, windows, training, settings, kept, settings.seed)
    finally:
        opened.close()
    report = Report(Path(settings.output_dir), "compare", f"Comparison of {settings.name}")
    report.text(
        f"The last {opened.model.config.chunk_size} tokens of {len(windows)} windows of {settings.window} tokens, one "
        "of each document. Gains are in bits per byte, with 95 % intervals over documents."
    )
    report.numbers({"window": settings.window, "chunk_size": opened.model.config.chunk_size})
    report.numbers({"new_tokens": settings.new_tokens, "rounds": settings.rounds})
    write_report(report, comparison)
