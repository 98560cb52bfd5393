"""`retro-eval leakage` puts every predicted chunk into its bin, with the numbers of the model."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation_retro.cli import main
from evaluation_retro.leakage import ALONE, WITH_QUERY, Line, bins, verdict
from evaluation_retro.statistics import Gain
from evaluation_retro.windows import TextSettings, draw_windows
from retrieval import BulkTokenizer

from ..support.evaluated import place_of
from ..support.searched import longest_common_run
from ..support.training_world import CHUNK

WINDOW = 4 * CHUNK + 3  # the last chunk is shorter


def flags(settings):
    parts = ((f"--{name}", *(value if isinstance(value, list) else [value])) for name, value in settings.items())
    return [str(part) for flag in parts for part in flag]


def run(folder, world, model, **changes):
    settings = {"model": model, "texts": world / "held_out", "window": WINDOW, "output_dir": folder, **place_of(world)}
    main(["leakage", *flags(settings | changes)])
    return json.loads((folder / "leakage.json").read_text())


def slow_chunks(opened, world):
    """Return for each chunk its two runs, nats off and on, and bytes; one window at a time."""
    settings = TextSettings(texts=[str(world / "held_out")], window=WINDOW)
    windows = draw_windows(settings.documents(), opened.tokenizer, settings)
    points = range(CHUNK, WINDOW, CHUNK)
    for tokens, doc_id in zip(windows.tokens, windows.doc_ids, strict=True):
        found = opened.retriever.retrieve(
            [tokens[point - CHUNK : point].tolist() for point in points], [[doc_id]] * len(points)
        )
        read = {
            "neighbor_ids": found.ids[None],
            "neighbor_attention_mask": found.attention_mask[None],
            "neighbor_scores": found.scores[None].nan_to_num(0.0),
        }
        nats = []
        for arguments in ({"use_retrieval": False}, read):
            logits = opened.model(tokens[None], **arguments).logits[0, :-1]
            nats.append(F.cross_entropy(logits, tokens[1:], reduction="none"))
        for slot, point in enumerate(points):
            texts = [found.ids[slot, i][found.attention_mask[slot, i].bool()].tolist() for i in range(2)]
            end = min(point + CHUNK, WINDOW)
            runs = {
                WITH_QUERY: max(longest_common_run(tokens[point - CHUNK : end].tolist(), text) for text in texts),
                ALONE: max(longest_common_run(tokens[point:end].tolist(), text) for text in texts),
            }
            sums = [float(its[point - 1 : end - 1].sum()) for its in nats]
            yield runs, sums, len(opened.tokenizer.decode_bytes(tokens[point:end].tolist()))


@torch.no_grad()
def test_bins_and_cumulative_lines_are_sums_over_their_chunks(world, opened, copier, tmp_path):
    report = run(tmp_path, world, copier)
    chunks = list(slow_chunks(opened, world))
    assert report["chunks"] == len(chunks) == 16

    def check(line, chosen):
        assert line["chunks"] == len(chosen)
        if chosen:
            size = sum(text_bytes for _, _, text_bytes in chosen) * math.log(2)
            off, on = (sum(sums[place] for _, sums, _ in chosen) / size for place in (0, 1))
            assert line["bits_per_byte"]["decoder"] == pytest.approx(off, abs=1e-4)
            assert line["bits_per_byte"]["on"] == pytest.approx(on, abs=1e-4)
            assert line["gains"]["decoder"]["value"] == pytest.approx(off - on, abs=1e-4)

    for what in (WITH_QUERY, ALONE):
        lines = report["by_longest_run"][what]
        assert sum(line["chunks"] for line in lines) == len(chunks)
        for line, (_, least, most) in zip(lines, bins(CHUNK), strict=True):
            check(line, [chunk for chunk in chunks if least <= chunk[0][what] <= most])
        removed = report["longer_runs_removed"][what]
        for line, limit in zip(removed, (1, 2, 4, 8, 2 * CHUNK), strict=True):
            check(line, [chunk for chunk in chunks if chunk[0][what] <= limit])
    assert len({tuple(chunk[0].values()) for chunk in chunks}) > 2
    text = (tmp_path / "leakage.md").read_text()
    assert "Fewer than 1,000 chunks" in text and "copy baseline is left out" in text and "8-gram" in text
    assert "shuffled" in report["by_longest_run"][ALONE][0]["bits_per_byte"] or lines[0]["chunks"] == 0


def test_the_copy_baseline_is_there_with_training_texts_and_parts_are_kept(world, copier, tmp_path, monkeypatch):
    first = run(tmp_path, world, copier)
    monkeypatch.setattr("evaluation_retro.measuring.WindowNats._forward", None)
    second = run(tmp_path, world, copier, training_texts=world / "train")
    everything = [report["longer_runs_removed"][ALONE][-1] for report in (first, second)]
    assert everything[0].items() > {"label": "all", "chunks": 16}.items()
    both = everything[1]["bits_per_byte"]
    assert both.pop("copy baseline") != pytest.approx(both["decoder"], abs=1e-6)
    assert both == everything[0]["bits_per_byte"]


def test_bins_are_powers_of_two_up_to_a_chunk():
    assert [label for label, _, _ in bins(64)] == ["0", "1", "2–3", "4–7", "8–15", "16–31", "32–63", "64+"]
    for size in (1, 2, 7, 8, 48, 64):
        ranges = [(least, most) for _, least, most in bins(size)]
        for length in range(2 * size + 1):
            assert sum(least <= length <= most for least, most in ranges) == 1


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.2, "There is a gain: the interval excludes zero"),
        (-0.1, 0.2, "No gain is shown: the interval includes zero"),
        (-0.3, -0.1, "There is a loss"),
        (np.nan, np.nan, "One document has no interval"),
    ],
)
def test_the_verdict_says_it_as_it_is(low, high, said):
    value = Gain(0.05, low, high, 0.01)
    assert said in verdict(Line(ALONE, 12, {"decoder": 1.0}, {"decoder": value}))


def test_chunks_that_all_share_a_run_have_no_verdict():
    assert "Every chunk shares a run of 8 tokens" in verdict(Line(ALONE, 0, {}, {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": CHUNK}, "Set --window to 9 or more"),
        ({"window": 5000}, "None of texts is as long as a window of 5000 tokens"),
        ({"windows": 1}, "shuffled neighbors come from another window"),
        ({"texts": "nowhere"}, "'nowhere'"),
    ],
)
def test_bad_settings_end_with_a_sentence(changes, message, world, copier, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, world, copier, **changes)
    assert message in str(ended.value) + capsys.readouterr().err


def test_a_model_without_a_knowledge_base_or_without_readers_is_refused(world, copier, opened, tokenizer, tmp_path):
    with pytest.raises(SystemExit, match="knowledge_base is not given"):
        main(["leakage", "--model", str(copier), "--texts", str(world / "held_out")])
    from evaluation_retro.opening import plain_decoder

    plain_decoder(opened.model).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(SystemExit, match="no weights that read neighbors"):
        run(tmp_path / "report", world, tmp_path / "plain")
    assert isinstance(opened.tokenizer, BulkTokenizer) and not (tmp_path / "report" / "leakage.md").exists()
