"""`retro-eval compare` measures each row as a slow computation does, and nothing twice."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from evaluation_retro import kept
from evaluation_retro.cli import main
from evaluation_retro.compare import CompareSettings, check, compare
from evaluation_retro.compare_report import write_report
from evaluation_retro.compare_rows import Method, RowSettings
from evaluation_retro.copy_baseline import WEIGHTS
from evaluation_retro.found import find
from evaluation_retro.kept import Kept
from evaluation_retro.key_store import KeyStore
from evaluation_retro.knn_lm import KnnSettings, choose_knn, find_keys
from evaluation_retro.opening import ModelSettings, open_model, plain_decoder
from evaluation_retro.report import Report
from evaluation_retro.windows import TextSettings, Windows, draw_windows

from ..support.evaluated import place_of
from ..support.training_world import CHUNK, NEIGHBOR

WINDOW, STRIDE, K, N = 6 * CHUNK, 4, 2, 2
LISTS = ("texts", "neighbors", "retro_neighbors", "strides", "cost_batches")
EVERY = {"replug": True, "knn_lm": True, "long_window": True}
QUICK = {"strides": CHUNK, "no_costs": True}


def settings_of(world, model, output, **changes):
    """Return the flags of a comparison."""
    given = {
        "model": model,
        **place_of(world),
        "texts": world / "held_out",
        "training_texts": world / "train",
        "output_dir": output,
        "window": WINDOW,
        "neighbors": "1 2",
        "strides": f"{CHUNK} {STRIDE}",
        **{"windows": N, "training_windows": N, "key_window": 32, "key_context": 8, "max_keys": 400},
        **{"new_tokens": 5, "rounds": 2, "cost_batches": 2},
        **changes,
    }
    flags = []
    for name, value in given.items():
        if value is not None:
            flags += [f"--{name}", *(str(value).split() if name in LISTS else [str(value)])]
    return flags


def run(output, world, model, **changes):
    main(["compare", *settings_of(world, model, output, **changes)])
    return json.loads((output / "compare.json").read_text())


@pytest.fixture
def folder(world, copier):
    """The folder of a comparison with every row."""
    output = world / "compared"
    if not output.exists():
        run(output, world, copier, **EVERY)
    return output


@pytest.fixture
def report(folder):
    return json.loads((folder / "compare.json").read_text())


def row_of(report, name):
    (row,) = (row for row in report["rows"] if row["name"] == name)
    return row


class Slow:
    """Computes rows token by token, with a search of its own for each point."""

    def __init__(self, world, model):
        self.opened = open_model(ModelSettings(model=str(model), **place_of(world)))
        self.model, self.decoder = self.opened.model, plain_decoder(self.opened.model)
        self.separator = self.opened.tokenizer.encode_batch(["\n\n"])[0]
        self.windows, self.training = (self.draw(world / part) for part in ("held_out", "train"))

    def draw(self, folder):
        settings = TextSettings(texts=[str(folder)], window=WINDOW, windows=N)
        return draw_windows(settings.documents(), self.opened.tokenizer, settings)

    def search(self, tokens, point, doc_id):
        return self.opened.retriever.retrieve([tokens[point - CHUNK : point]], [[doc_id]])

    def neighbors(self, found, k=K):
        """Return (tokens with the separator, score) of the k best neighbors."""
        parts = zip(found.ids[0, :k], found.attention_mask[0, :k].bool(), found.scores[0, :k].tolist(), strict=True)
        return [(ids[mask].tolist() + self.separator, score) for ids, mask, score in parts if mask.any()]

    @torch.no_grad()
    def probability(self, tokens, wanted, model=None, **arguments):
        logits = (model or self.decoder)(torch.tensor([tokens]), **arguments).logits[0, -1]
        return float(logits.double().softmax(-1)[wanted])

    def nats(self, windows, probability, stride):
        """Return the nats (N,) of the last chunks.

        Args:
            probability: of a token, given the text, what was found, and how much text before it is
                read when the last token with these neighbors is predicted.
        """
        total = np.zeros(len(windows))
        for row, (tokens, doc_id) in enumerate(zip(windows.tokens.tolist(), windows.doc_ids, strict=True)):
            for point in range(WINDOW - CHUNK, WINDOW, stride):
                found = self.search(tokens, point, doc_id)
                for place in range(point, point + stride):
                    likely = probability(tokens[:place], tokens[place], found, point + stride - 1)
                    total[row] -= math.log(likely)
        return total

    def bits_per_byte(self, nats):
        size = sum(len(self.opened.tokenizer.decode_bytes(row[-CHUNK:])) for row in self.windows.tokens.tolist())
        return nats.sum() / math.log(2) / size

    def measured(self, probability, stride=CHUNK):
        return pytest.approx(self.bits_per_byte(self.nats(self.windows, probability, stride)), abs=1e-4)


@pytest.fixture(scope="module")
def opened_once():
    """The slow computations of this module's models, opened once."""
    opened: dict = {}
    yield opened
    for slow in opened.values():
        slow.opened.close()


@pytest.fixture
def slow(world, copier, opened_once):
    return opened_once.get("copier") or opened_once.setdefault("copier", Slow(world, copier))


def cut(before, text, read, is_long=False):
    """Return neighbors, and the text with its beginning cut off."""
    return before + (text if is_long else text[max(0, len(before) + read - WINDOW) :])


def test_the_decoder_stands_alone_and_retro_off_is_the_decoder(slow, report):
    expected = slow.measured(lambda text, token, found, read: slow.probability(text, token))
    assert row_of(report, "decoder")["bits_per_byte"] == expected
    assert row_of(report, "RETRO, off")["bits_per_byte"] == expected


@pytest.mark.parametrize(("k", "stride", "is_long"), [(1, CHUNK, False), (2, STRIDE, False), (2, CHUNK, True)])
def test_in_context_prompts_have_the_neighbors_and_the_rest_of_the_window(slow, report, k, stride, is_long):
    def probability(text, token, found, read):
        before = [t for tokens, _ in reversed(slow.neighbors(found, k)) for t in tokens]
        return slow.probability(cut(before, text, read, is_long), token)

    name = f"in-context, k = {k}, stride {stride}" + ", longer window" * is_long
    assert row_of(report, name)["bits_per_byte"] == slow.measured(probability, stride)


@pytest.mark.parametrize("stride", [CHUNK, STRIDE])
def test_replug_averages_prompts_with_one_neighbor(slow, report, stride):
    def probability(text, token, found, read):
        neighbors = slow.neighbors(found)
        total = sum(math.exp(score) for _, score in neighbors)
        parts = [slow.probability(cut(before, text, read), token) for before, _ in neighbors]
        return sum(math.exp(score) / total * part for (_, score), part in zip(neighbors, parts, strict=True))

    assert row_of(report, f"REPLUG, k = 2, stride {stride}")["bits_per_byte"] == slow.measured(probability, stride)


@pytest.mark.parametrize("stride", [CHUNK, STRIDE])
def test_the_copy_baseline_mixes_with_the_weight_that_training_texts_choose(slow, report, stride):
    def copied(text, token, found):
        """Return the copier's probability of a token; None if it finds nothing."""
        texts = [ids[mask].tolist() for ids, mask in zip(found.ids[0], found.attention_mask[0].bool(), strict=True)]
        for length in (2, 1):
            follow = [t[i] for t in texts for i in range(length, len(t)) if t[i - length : i] == text[-length:]]
            if follow:
                return follow.count(token) / len(follow)
        return None

    def pairs_of(windows):
        pairs = []

        def remember(text, token, found, read):
            pairs.append((slow.probability(text, token), copied(text, token, found)))
            return 1.0

        slow.nats(windows, remember, stride)
        return pairs

    def nats(pairs, w):
        return -sum(math.log(p if c is None else (1 - w) * p + w * c) for p, c in pairs)

    row = row_of(report, f"decoder + copy baseline, k = 2, stride {stride}")
    training = pairs_of(slow.training)
    best = min(WEIGHTS.tolist(), key=lambda w: nats(training, w))
    assert row["chosen_on_training_texts"]["weight"] == pytest.approx(best)
    expected = slow.bits_per_byte(np.array([nats(pairs_of(slow.windows), best)]))
    assert row["bits_per_byte"] == pytest.approx(expected, abs=1e-4)


def on_disk(path):
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def test_knn_lm_excludes_own_documents_and_chooses_on_training_texts(slow, report, folder):
    keys = KeyStore(folder / "parts" / "knn_keys.db", "knn_keys")
    keys.connection.load_collection("knn_keys")
    first = WINDOW - CHUNK - 1
    own = {name: [[doc_id] for doc_id in getattr(slow, name).doc_ids] for name in ("windows", "training")}
    found = {name: find_keys(slow.decoder, keys, getattr(slow, name).tokens, own[name], first=first) for name in own}
    keys.close()
    row = row_of(report, "kNN-LM")
    chosen = KnnSettings(**row["chosen_on_training_texts"])
    best = choose_knn([found["training"]])
    assert (chosen.k, chosen.weight) == (best.k, best.weight)
    expected = slow.bits_per_byte(found["windows"].mixed(chosen)[:, first:].double().numpy())
    assert row["bits_per_byte"] == pytest.approx(expected, abs=1e-4)
    assert row["store_bytes"] == pytest.approx(on_disk(folder / "parts" / "knn_keys.db"), rel=0.2)


def as_arguments(founds):
    """Return a forward's arguments with the neighbors of several searches, a point each."""
    return {
        "neighbor_ids": torch.cat([found.ids for found in founds])[None],
        "neighbor_attention_mask": torch.cat([found.attention_mask for found in founds])[None],
        "neighbor_scores": torch.cat([found.scores for found in founds])[None],
    }


@pytest.mark.parametrize("which", ["copier", "attender"])
def test_retro_reads_alone_and_together_with_the_prompt(which, world, request, tmp_path):
    if which == "copier":
        slow, report = (request.getfixturevalue(name) for name in ("slow", "report"))
    else:
        slow = Slow(world, request.getfixturevalue(which))
        report = run(tmp_path, world, request.getfixturevalue(which), **QUICK)
        assert "milliseconds_a_token" not in row_of(report, "decoder") and report["machine"] is None
    docs = {tuple(tokens): doc for tokens, doc in zip(slow.windows.tokens.tolist(), slow.windows.doc_ids, strict=True)}

    def alone(text, token, found, read):
        (doc,) = (doc for tokens, doc in docs.items() if list(tokens[: len(text)]) == text)
        points = range(CHUNK, len(text) + 1, CHUNK)
        return slow.probability(text, token, slow.model, **as_arguments([slow.search(text, p, doc) for p in points]))

    def together(text, token, found, read):
        before = [t for tokens, _ in reversed(slow.neighbors(found)) for t in tokens]
        prompt = cut(before, text, read)
        point = len(prompt) - (len(text) - (WINDOW - CHUNK))
        first = CHUNK + (point - CHUNK) % CHUNK
        slot = (point - first) // CHUNK
        nothing = {name: torch.zeros_like(value) for name, value in as_arguments([found]).items()}
        given = [nothing] * slot + [as_arguments([found])]
        arguments = {name: torch.cat([part[name] for part in given], 1) for name in nothing}
        return slow.probability(prompt, token, slow.model, first_point=torch.tensor([first]), **arguments)

    assert row_of(report, f"RETRO, k = 2, stride {CHUNK}")["bits_per_byte"] == slow.measured(alone)
    assert row_of(report, f"RETRO + in-context, k = 2, stride {CHUNK}")["bits_per_byte"] == slow.measured(together)
    shuffled = find(slow.opened.retriever, slow.windows).shuffled(0)
    with torch.no_grad():
        logits = slow.model(slow.windows.tokens, **shuffled.inputs.as_arguments()).logits[:, -CHUNK - 1 : -1]
    nats = -logits.double().log_softmax(-1).gather(-1, slow.windows.tokens[:, -CHUNK:, None])
    expected = slow.bits_per_byte(nats.numpy())
    assert row_of(report, f"RETRO, shuffled, k = 2, stride {CHUNK}")["bits_per_byte"] == pytest.approx(
        expected, abs=1e-4
    )
    if which == "attender":
        slow.opened.close()


def test_table_json_and_pairs_agree(report, folder):
    lines = (folder / "compare.md").read_text().partition("**RETRO against")[0].splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ") for line in lines if " | " in line}
    names = [row["name"] for row in report["rows"]]
    assert len(set(names)) == len(names) == 23
    for row in report["rows"]:
        _, bits, gained, *costs = cells[row["name"]]
        assert float(bits) == pytest.approx(row["bits_per_byte"], abs=1e-4)
        if row["name"] == "decoder":
            continue
        assert float(gained.split()[0]) == pytest.approx(row["gain_over_decoder"]["value"], abs=1e-4)
        difference = row_of(report, "decoder")["bits_per_byte"] - row["bits_per_byte"]
        assert row["gain_over_decoder"]["value"] == pytest.approx(difference)
        if "milliseconds_a_token" not in row:
            assert row["method"] in ("RETRO, shuffled", "RETRO, off") and costs == ["–"] * 3
            continue
        times = row["milliseconds_a_token"]["2"]
        assert times["median"] == pytest.approx(np.median(times["rounds"])) and len(times["rounds"]) == 2
        assert float(costs[0].split()[0]) == pytest.approx(times["median"], abs=0.06)
    for pair in report["pairs"]:
        row, over = (row_of(report, pair[side]) for side in ("row", "over"))
        assert pair["gain"]["value"] == pytest.approx(over["bits_per_byte"] - row["bits_per_byte"])
        for batch, ratio in pair["time_ratio"].items():
            medians = [side["milliseconds_a_token"][batch]["median"] for side in (row, over)]
            assert ratio == pytest.approx(medians[0] / medians[1])
    over = [pair["over"] for pair in report["pairs"] if pair["row"] == f"RETRO, k = 2, stride {CHUNK}"]
    assert f"in-context, k = 2, stride {CHUNK}" in over and f"decoder + copy baseline, k = 2, stride {CHUNK}" in over
    assert len(list(folder.glob("*.svg"))) == 2


def test_memory_is_what_a_row_adds(slow, report, world):
    decoder = sum(parameter.numel() for parameter in slow.decoder.parameters())
    added = sum(parameter.numel() for parameter in slow.model.parameters()) - decoder
    layers, states = slow.model.config.n_layer, slow.model.config.n_embd
    token = 2 * layers * states * 4  # bytes of keys and values
    read = WINDOW - CHUNK + 5 - 1  # the last of five new tokens is not read
    own = {row["name"]: row for row in report["rows"]}
    assert own["decoder"]["cache_bytes"] == own["decoder"]["parameter_bytes"] == 0
    assert own["kNN-LM"]["cache_bytes"] == own[f"decoder + copy baseline, k = 2, stride {CHUNK}"]["cache_bytes"] == 0
    longest = own[f"in-context, k = 2, stride {CHUNK}, longer window"]["cache_bytes"]
    assert 0 < longest <= K * (NEIGHBOR + len(slow.separator)) * token
    assert longest % token == 0
    assert own[f"REPLUG, k = 2, stride {CHUNK}"]["cache_bytes"] == K * WINDOW * token - read * token
    assert own[f"RETRO, k = 2, stride {CHUNK}"]["parameter_bytes"] == 4 * added
    stored = own[f"RETRO, k = 2, stride {CHUNK}"]["store_bytes"]
    assert stored == pytest.approx(on_disk(world / "kb.db"), rel=0.2)


@pytest.fixture
def saved(monkeypatch):
    """The parts that are computed and kept, in their order."""
    names, save = [], kept._save

    def remember(part, arrays):
        names.append(part.parent.name + "/" + part.name)
        save(part, arrays)

    monkeypatch.setattr(kept, "_save", remember)
    return names


def test_a_comparison_that_broke_off_goes_on_and_gets_new_rows(slow, tmp_path, saved, monkeypatch):
    settings = RowSettings(neighbors=[1], cost_batches=[1], rounds=1, new_tokens=3)

    def measure(name, settings):
        return compare(slow.opened, slow.windows, slow.training, settings, Kept(tmp_path / name, {}))

    whole = measure("whole", settings)
    parts, remember = len(saved), kept._save
    assert parts >= 20
    for broken_at in (parts + 5, 2 * parts - 3):

        def break_off(part, arrays, broken_at=broken_at):
            if len(saved) == broken_at:
                raise KeyboardInterrupt
            remember(part, arrays)

        monkeypatch.setattr(kept, "_save", break_off)
        with pytest.raises(KeyboardInterrupt):
            measure("broken", settings)
    monkeypatch.setattr(kept, "_save", remember)
    again = measure("broken", settings)
    assert len(saved) == 2 * parts and len({*saved}) == 2 * parts  # each part was computed once
    for row in whole.rows:
        assert np.array_equal(again.nats[row], whole.nats[row]), row.name

    before = len(saved)
    more = measure("broken", replace(settings, replug=True))
    assert len(saved) > before and all("replug" in name for name in saved[before:])
    assert {row.method for row in more.rows} - {row.method for row in whole.rows} == {Method.REPLUG}
    assert [more.costs[row].milliseconds for row in again.costs] == [c.milliseconds for c in again.costs.values()]


def test_drafts_are_timed_for_one_text_with_the_quality_of_the_row_without(slow, tmp_path, saved):
    settings = RowSettings(neighbors=[1], cost_batches=[1, 2], rounds=1, new_tokens=3)
    kept_in = Kept(tmp_path / "parts", {})
    plain = compare(slow.opened, slow.windows, slow.training, settings, kept_in)
    before = len(saved)
    comparison = compare(slow.opened, slow.windows, slow.training, replace(settings, drafts=True), kept_in)
    assert all("drafts" in name for name in saved[before:])
    drafted = [row for row in comparison.rows if row not in plain.rows]
    assert [row.name for row in drafted] == [
        f"in-context, k = 1, stride {CHUNK}, prompt lookup",
        f"RETRO, k = 2, stride {CHUNK}, drafts",
    ]
    for row in drafted:
        assert np.array_equal(comparison.nats[row], plain.nats[row.without_drafts])
        assert [*comparison.costs[row].milliseconds] == [1]
    assert (drafted[1], drafted[0]) in comparison.pairs()
    assert [pair for pair in comparison.pairs() if pair not in plain.pairs()] == [(drafted[1], drafted[0])]
    write_report(Report(tmp_path, "compare", "Drafts"), comparison)
    lines = (tmp_path / "compare.md").read_text().splitlines()
    cells = next(line.strip("| ").split(" | ") for line in lines if line.startswith(f"| {drafted[1].name} |"))
    assert float(cells[3].split()[0]) > 0 and cells[4] == "–"


def test_texts_that_are_there_under_other_ids_are_told(world, copier, report, tmp_path, capsys):
    shares = "windows_with_own_text_among_neighbors"
    assert report[shares]["held_out"] == 0
    texts = f"{world}/train/0.txt {world}/train/1.txt"  # there as train/0.txt and train/1.txt
    told = run(tmp_path, world, copier, texts=texts, **QUICK)
    assert told[shares]["held_out"] == 1
    assert "100.0% of the held-out windows" in (tmp_path / "compare.md").read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbors": 3}, "too short for in-context, k = 3"),
        ({"training_texts": None}, "training_texts is empty"),
        ({"knowledge_base": None}, "knowledge_base is not given"),
        ({"texts": "nowhere"}, "'nowhere'"),
        ({"neighbors": 0}, "neighbors has 0"),
    ],
)
def test_bad_settings_end_with_a_sentence_and_leave_nothing(changes, message, world, copier, tmp_path, capsys):
    output = tmp_path / "output"
    with pytest.raises(SystemExit) as ended:
        run(output, world, copier, **changes)
    assert message in str(ended.value) + capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("window", "changes", "message"),
    [
        (WINDOW + 1, {}, f"Set --window to a multiple of {CHUNK}"),
        (CHUNK, {}, f"a multiple of {CHUNK}, {2 * CHUNK} or more"),
        (WINDOW, {"neighbors": [1], "retro_neighbors": [3]}, "too short for RETRO \\+ in-context, k = 3"),
        (WINDOW, {"strides": [3]}, "strides has 3, which does not divide the chunk of 8"),
        (WINDOW, {"strides": [16]}, "strides has 16, which does not divide"),
        (80, {"neighbors": [3], "long_window": True}, "the decoder has 128 positions"),
        (136, {}, "has 136 tokens, but the decoder has 128 positions"),
        (WINDOW, {"new_tokens": 200}, "the decoder has 128 positions"),
        (WINDOW, {"knn_lm": True, "key_window": 500}, "key_window is 500, but the decoder has 128 positions"),
    ],
)
def test_windows_that_do_not_fit_the_rows_are_refused(window, changes, message, slow):
    windows = Windows(torch.zeros(1, window, dtype=torch.long), ["a"])
    settings = {"neighbors": [1], "new_tokens": 5, "key_window": 32, "key_context": 8} | changes
    with pytest.raises(ValueError, match=message):
        check(slow.opened, windows, RowSettings(**settings))


@pytest.mark.parametrize("costs", [{"no_costs": True}, {"cost_batches": [8]}])
def test_drafts_that_nothing_would_time_are_refused(costs):
    with pytest.raises(ValueError, match="drafts change only the time of one text"):
        RowSettings(drafts=True, **costs)


def test_a_single_value_in_yaml_is_a_list():
    settings = CompareSettings(model="m", strides=4, neighbors=2, texts="a", training_texts="b")
    assert (settings.strides, settings.neighbors, settings.texts, settings.training_texts) == ([4], [2], ["a"], ["b"])
