"""Write the comparison: one table, what RETRO saves over each rival, and plots."""

from functools import partial
from typing import Any

from .compare_rows import Row
from .comparison import Comparison
from .machine import spread
from .report import Report

MEGABYTE = 1e6
NONE = "–"
COUNTED = (
    "Milliseconds are for each new token of greedy generation, with prefill and searches: median (least to most) of "
    "the rounds, in which all rows take turns. With several texts at a time, the tokens of all are counted. Extra "
    "memory is what a row adds to the decoder while one text is generated: parameters, and the larger cache of keys "
    "and values with RETRO's memory of its neighbors. Embedding models and Milvus' memory are not counted. The store "
    "is the knowledge base on disk, or kNN-LM's keys."
)
DRAFTED = (
    "Rows with drafts or prompt lookup write the same tokens as those without, several in one forward, so their "
    "quality is that of the latter. They write one text at a time."
)
REPEATED = (
    "The neighbors of {shares} hold a whole chunk's length of the windows' own text, which is easy to copy. If these "
    "documents are in the knowledge base under other ids, they were not left out: name the texts as they were "
    "ingested, since a folder's name stands in the ids of its files."
)


def write_report(report: Report, comparison: Comparison) -> None:
    """Add tables, plots and numbers to a report, and save it."""
    batches = next((list(cost.milliseconds) for cost in comparison.costs.values()), [])
    columns = ["row", "bits per byte", "gain over the decoder"]
    if batches:
        columns += [*(f"ms, batch {batch}" for batch in batches), "extra memory, MB", "store, MB"]
    rows = [quality_cells(comparison, row) + cost_cells(comparison, row, batches) for row in comparison.rows]
    report.table(columns, rows)
    if batches:
        report.text(f"{COUNTED} Measured on: {comparison.machine}.")
    if any(row.drafts for row in comparison.rows):
        report.text(DRAFTED)
    if len({run for cost in comparison.costs.values() for run in cost.runs}) > 1:
        report.text(
            "The times come from several runs of this command. Those of one row may differ from another's because "
            "the machine was busy. Compare them with care, or measure again in another folder."
        )
    write_pairs(report, comparison, batches)
    if any(comparison.repeated.values()):
        shares = " and ".join(f"{share:.1%} of the {name} windows" for name, share in comparison.repeated.items())
        report.text(REPEATED.format(shares=shares.replace("_", "-")))
    report.plot("gain", lambda axes: draw_gains(axes, comparison))
    for batch in batches:
        report.plot(f"gain_against_time_{batch}", partial(draw_times, comparison=comparison, batch=batch))
    report.numbers(numbers(comparison))
    report.save()


def quality_cells(comparison: Comparison, row: Row) -> list[str]:
    """Return a row's name, bits per byte and gain."""
    gained = "" if row == comparison.rows[0] else str(comparison.gain(row))
    return [row.name, f"{comparison.bits_per_byte(row):.4f}", gained]


def cost_cells(comparison: Comparison, row: Row, batches: list[int]) -> list[str]:
    """Return a row's milliseconds for each number of texts, its extra memory and its store."""
    cost = comparison.costs.get(row)
    if cost is None:
        return [NONE] * (len(batches) + 2) if batches else []
    store = NONE if cost.store_bytes is None else f"{cost.store_bytes / MEGABYTE:.1f}"
    times = [spread(cost.milliseconds[batch]) if batch in cost.milliseconds else NONE for batch in batches]
    return [*times, f"{(cost.parameter_bytes + cost.cache_bytes) / MEGABYTE:.1f}", store]


def write_pairs(report: Report, comparison: Comparison, batches: list[int]) -> None:
    """Add a table of RETRO against each rival."""
    rows = []
    for row, over in comparison.pairs():
        ratios = comparison.time_ratio(row, over)
        times = [f"{ratios[batch]:.2f}" if batch in ratios else NONE for batch in batches]
        rows.append([row.name, over.name, str(comparison.gain(row, over)), *times])
    columns = ["row", "over", "saves, bits per byte", *(f"time ratio, batch {batch}" for batch in batches)]
    report.table(columns, rows, title="RETRO against its rivals, on the same tokens")


def numbers(comparison: Comparison) -> dict[str, Any]:
    """Return all numbers of a comparison, for JSON."""
    return {
        "documents": len(comparison.text_bytes),
        "bytes": int(comparison.text_bytes.sum()),
        "windows_with_own_text_among_neighbors": comparison.repeated,
        "machine": comparison.machine if comparison.costs else None,
        "rows": [row_numbers(comparison, row) for row in comparison.rows],
        "pairs": [
            {
                "row": row.name,
                "over": over.name,
                "gain": comparison.gain(row, over),
                "time_ratio": comparison.time_ratio(row, over),
            }
            for row, over in comparison.pairs()
        ],
    }


def row_numbers(comparison: Comparison, row: Row) -> dict[str, Any]:
    """Return the numbers of one row."""
    described = {
        "name": row.name,
        "method": row.method.value,
        "k": row.k,
        "stride": row.stride,
        "long_window": row.long_window,
        "drafts": row.drafts,
        "bits_per_byte": comparison.bits_per_byte(row),
        "gain_over_decoder": comparison.gain(row),
        "chosen_on_training_texts": comparison.chosen.get(row),
    }
    cost = comparison.costs.get(row)
    if cost is None:
        return described
    return described | {
        "milliseconds_a_token": {
            batch: {"median": cost.median(batch), "rounds": rounds} for batch, rounds in cost.milliseconds.items()
        },
        "parameter_bytes": cost.parameter_bytes,
        "cache_bytes": cost.cache_bytes,
        "store_bytes": cost.store_bytes,
    }


def draw_gains(axes: Any, comparison: Comparison) -> None:
    """Draw the gain of each row over the decoder, with its interval."""
    rows = [row for row in comparison.rows[1:] if not row.drafts]
    for place, row in enumerate(rows):
        gained = comparison.gain(row)
        axes.hlines(place, gained.low, gained.high, color="#4c72b0")
        axes.plot(gained.value, place, "o", color="#4c72b0")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("gain over the decoder, bits per byte")


def draw_times(axes: Any, comparison: Comparison, batch: int) -> None:
    """Draw the gain of each timed row against its milliseconds a new token."""
    for row, cost in comparison.costs.items():
        if batch not in cost.milliseconds:
            continue
        gained, time = comparison.gain(row), cost.median(batch)
        axes.vlines(time, gained.low, gained.high, color="#4c72b0", linewidth=0.8)
        axes.plot(time, gained.value, "o", color="#4c72b0", markersize=4)
        axes.annotate(row.name, (time, gained.value), textcoords="offset points", xytext=(4, 3), fontsize=6)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set_xlabel(f"milliseconds a new token, batch {batch}")
    axes.set_ylabel("gain over the decoder, bits per byte")
