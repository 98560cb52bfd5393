"""Each setting of a mixture does what plain Python does with the same rows."""

import json
from collections import Counter

import httpx
import pytest
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError

from data_retro.mixtures import DocumentStream, mix, patiently, row_filter
from retrieval import read_documents


@pytest.fixture
def rows(tmp_path):
    rows = [{"text": f"text {i}", "key": f"k{i}", "lang": "en" if i % 3 else "de", "score": i / 10} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return rows


def ids(stream, **kwargs):
    return [document.id for document in mix([stream], **kwargs)]


def test_a_stream_has_the_ids_and_texts_of_an_ingestion(rows, tmp_path):
    path = str(tmp_path / "rows.jsonl")
    expected = [(document.id, document.text) for document in read_documents(path)]
    assert [(document.id, document.text) for document in mix([DocumentStream(path)])] == expected
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    parquet = DocumentStream(str(tmp_path / "rows.parquet"), doc_id_field="key")
    assert [(document.id, document.text) for document in mix([parquet])] == [(row["key"], row["text"]) for row in rows]


def test_a_folder_of_rows_is_read_file_by_file(rows, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    Dataset.from_list(rows[:10]).to_parquet(folder / "a.parquet")
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, rows[10:])))
    (folder / "c.txt").write_text("a text of its own")
    read = [(document.id, document.text) for document in mix([DocumentStream(str(folder))])]
    expected = [(f"shards/a.parquet#{i}", row["text"]) for i, row in enumerate(rows[:10])]
    expected += [(f"shards/b.jsonl#{i}", row["text"]) for i, row in enumerate(rows[10:])]
    assert read == [*expected, ("shards/c.txt", "a text of its own")]
    by_key = list(mix([DocumentStream(str(folder), doc_id_field="key", filter={"lang": "de"})]))
    assert [document.id for document in by_key] == [row["key"] for row in rows if row["lang"] == "de"]
    with pytest.raises(ValueError, match="Row 0 of shards/a.parquet has no field 'body'; it has 'text', 'key'"):
        list(mix([DocumentStream(str(folder), text_field="body")]))


def high_and_english(row):
    return row["lang"] == "en" and row["score"] > 2


@pytest.mark.parametrize(
    "condition, keeps",
    [
        ({"lang": "de"}, lambda row: row["lang"] == "de"),
        ({"lang": ["de", "fr"], "score": {">=": 1, "<": 2}}, lambda row: row["lang"] == "de" and 1 <= row["score"] < 2),
        ({"score": {"!=": 0.5}}, lambda row: row["score"] != 0.5),
        ({"none": 1}, lambda row: False),
        (f"{__name__}:high_and_english", high_and_english),
    ],
)
def test_shard_filter_skip_and_take_apply_in_this_order(rows, tmp_path, condition, keeps):
    settings = {"num_shards": 2, "shard_index": 1, "skip": 1, "take": 5, "filter": condition, "doc_id_field": "key"}
    kept = [row["key"] for row in rows[1::2] if keeps(row)][1:6]
    assert ids(DocumentStream(str(tmp_path / "rows.jsonl"), **settings)) == kept


def every_third(row, number):
    return row["lang"] == "en" and number % 3 == 1


def late(row, number, least=30):
    return number >= least


def first_letter(row, letter="t"):
    return row["text"][0] == letter


def needs_three(row, number, more):
    return True


@pytest.mark.parametrize(
    "condition, keeps",
    [
        ({"row_number": {">=": 10, "<": 30}}, lambda row, number: 10 <= number < 30),
        ({"row_number": [1, 5, 6], "lang": "en"}, lambda row, number: number in (1, 5)),
        (f"{__name__}:every_third", every_third),
        (f"{__name__}:late", late),
        (f"{__name__}:first_letter", lambda row, number: True),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_filter_sees_the_number_of_the_row_in_its_source(rows, tmp_path, condition, keeps, shards):
    stream = DocumentStream(
        str(tmp_path / "rows.jsonl"), filter=condition, doc_id_field="key", num_shards=shards, shard_index=shards - 1
    )
    mine = list(enumerate(rows))[shards - 1 :: shards]
    expected = [row["key"] for number, row in mine if keeps(row, number)]
    assert ids(stream) == expected
    shares = [ids(stream, rank=rank, processes=2) for rank in range(2)]
    assert shares == [expected[0::2], expected[1::2]]


def test_a_column_named_row_number_is_the_rows_own(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": str(i), "row_number": 7 - i}) for i in range(8)))
    stream = DocumentStream(str(tmp_path / "rows.jsonl"), filter={"row_number": {"<": 2}})
    assert [document.text for document in mix([stream])] == ["6", "7"]


@pytest.mark.parametrize("shuffle", [0, 5])
def test_the_first_epoch_alone_skips(rows, tmp_path, shuffle):
    settings = {"skip": 3, "take": 30, "doc_id_field": "key", "shuffle_buffer": shuffle}
    stream = DocumentStream(str(tmp_path / "rows.jsonl"), initially_skip=12, **settings)
    whole = [row["key"] for row in rows[3:33]]
    assert sorted(ids(stream)) == sorted(whole[12:])
    assert sorted(ids(stream, epoch=1)) == sorted(whole)
    assert ids(stream) == ids(stream)
    if not shuffle:
        assert ids(stream) == whole[12:] and ids(stream, epoch=1) == whole
        assert [ids(stream, rank=rank, processes=2) for rank in range(2)] == [whole[12::2], whole[13::2]]


@pytest.mark.parametrize("shuffle", [0, 4])
def test_a_source_that_begins_again_reads_what_it_skipped(tmp_path, shuffle):
    for name, count in (("a", 20), ("b", 200)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name}{i}"}) for i in range(count)))
    short = DocumentStream(str(tmp_path / "a.jsonl"), weight=1, initially_skip=15, shuffle_buffer=shuffle)
    long = DocumentStream(str(tmp_path / "b.jsonl"), weight=1)
    read = [document.text for document in mix([short, long]) if document.text[0] == "a"]
    assert sorted(read[:5]) == [f"a{i}" for i in range(15, 20)]
    assert set(read[5:25]) == {f"a{i}" for i in range(20)}


def test_more_skipped_at_first_than_there_are_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="initially_skip is 41, but only 40 rows are left"):
        ids(DocumentStream(str(tmp_path / "rows.jsonl"), initially_skip=41))
    assert ids(DocumentStream(str(tmp_path / "rows.jsonl"), initially_skip=40)) == []


def test_a_shuffle_differs_between_epochs_and_repeats_exactly(rows, tmp_path):
    stream = DocumentStream(str(tmp_path / "rows.jsonl"), shuffle_buffer=16, seed=3)
    first, second = ids(stream), ids(stream, epoch=1)
    assert first != second and sorted(first) == sorted(second) and len(set(first)) == len(rows)
    assert ids(stream) == first and ids(stream, epoch=1) == second


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("weights", [(None, None), (3, 1)])
def test_processes_share_the_documents(tmp_path, weights, processes):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name}{i}"}) for i in range(200)))
    streams = [DocumentStream(str(tmp_path / f"{name}.jsonl"), weight=w) for name, w in zip("ab", weights, strict=True)]
    whole = [document.text for document in mix(streams)]
    ranks = range(processes)
    shares = [[document.text for document in mix(streams, rank=rank, processes=processes)] for rank in ranks]
    assert Counter(whole) == sum(map(Counter, shares), Counter())
    assert shares == [whole[rank::processes] for rank in ranks]
    if weights[0]:  # drawn until both are used up: the second one, drawn less often, ends it
        early = Counter(text[0] for text in whole[:200])
        assert 120 < early["a"] < 180 and set(whole) == {f"{name}{i}" for name in "ab" for i in range(200)}
    else:
        assert whole == [f"{name}{i}" for name in "ab" for i in range(200)]


@pytest.mark.parametrize("weight, shuffle", [(None, 0), (1, 0), (1, 5)])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_files_of_a_dataset_with_ids(monkeypatch, weight, shuffle, processes):
    """If the files can be shared evenly, no process opens a file that another one reads."""
    opened = []

    def generate(shards):
        for shard in shards:
            opened.append(shard)
            yield from ({"key": f"{shard}-{i}", "text": f"text {i}"} for i in range(7))

    dataset = IterableDataset.from_generator(generate, gen_kwargs={"shards": [0, 1, 2, 3]})
    monkeypatch.setattr("retrieval.sources.load_dataset", lambda *args, **kwargs: dataset)
    settings = {"weight": weight, "shuffle_buffer": shuffle}
    stream = DocumentStream("org/data", doc_id_field="key", **settings)
    shares, files = [], []
    for rank in range(processes):
        opened.clear()
        shares.append(ids(stream, rank=rank, processes=processes))
        files.append(set(opened))
        assert ids(stream, rank=rank, processes=processes) == shares[-1]
    assert Counter(sum(shares, [])) == Counter(f"{shard}-{i}" for shard in range(4) for i in range(7))
    assert [len(own) for own in files] == ([2, 2] if processes == 2 else [4, 4, 4])
    # A filter may keep rows of some files alone, so every process reads all files.
    english = DocumentStream("org/data", doc_id_field="key", filter={"key": ["0-0", "0-1", "0-2"]}, **settings)
    kept = [ids(english, rank=rank, processes=processes) for rank in range(processes)]
    assert all(kept) and len(sum(kept, [])) == 3
    # So do they if rows must be counted.
    later = DocumentStream("org/data", doc_id_field="key", initially_skip=3, **settings)
    kept = [ids(later, rank=rank, processes=processes) for rank in range(processes)]
    assert len(sum(kept, [])) == 25
    # Rows without ids are numbered, so every process counts all of them.
    numbered = DocumentStream("org/data", **settings)
    assert {id_ for rank in range(2) for id_ in ids(numbered, rank=rank, processes=2)} == {
        f"org/data#{i}" for i in range(28)
    }


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"weight": -1}, "weight is -1"),
        ({"shuffle_buffer": 1.5}, "shuffle_buffer is 1.5"),
        ({"num_shards": 2, "shard_index": 2}, "shard_index is 2, but there are 2 shards"),
        ({"filter": "no.such:thing"}, "Cannot import the filter 'no.such:thing'"),
        ({"filter": {"score": {"~": 1}}}, "'rows': Unknown comparison '~' for 'score'. Use one of <, <=, >, >=, !="),
        ({"filter": {"score": {}}}, "'rows': The range for 'score' is empty"),
        ({"filter": {"lang": []}}, "'rows': The list of wanted values for 'lang' is empty"),
        ({"filter": "json:__name__"}, "The filter 'json:__name__' is no function, but 'json'"),
        ({"filter": f"{__name__}:needs_three"}, "cannot be called with a row, nor with a row and its number"),
        ({"filter": 7}, "not 7"),
        ({"initially_skip": -1}, "initially_skip is -1"),
        ({"dataset": ""}, "needs the name"),
        ({"metadata_fields": ["lang"]}, "metadata_fields is for a knowledge base"),
    ],
)
def test_a_stream_refuses_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DocumentStream(**{"dataset": "rows", **settings})


def test_a_mixture_refuses_wrong_weights_and_rows(tmp_path):
    with pytest.raises(ValueError, match="sum to zero"):
        list(mix([DocumentStream("a", weight=0), DocumentStream("b", weight=0)]))
    with pytest.raises(ValueError, match=r"\['b'\] have none"):
        list(mix([DocumentStream("a", weight=1), DocumentStream("b")]))
    (tmp_path / "rows.jsonl").write_text('{"content": "x"}')
    with pytest.raises(ValueError, match="has no field 'text'; it has 'content'"):
        list(mix([DocumentStream(str(tmp_path / "rows.jsonl"))]))
    assert row_filter(None)({}, 0)
    with pytest.raises(ValueError, match="^Here: In field 'score' of a row, 'high' cannot be compared with 3"):
        row_filter({"score": {">": 3}}, "Here: ")({"score": "high"}, 0)


class TestNetwork:
    """A source that breaks off now and then, as a network connection does."""

    @pytest.fixture(autouse=True)
    def no_pauses(self, monkeypatch):
        monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)

    def source(self, failures, streaming):
        left = list(failures)

        def generate():
            for i in range(30):
                if left and i == left[0]:
                    raise ConnectionError(f"gone after {left.pop(0)} rows")
                yield {"i": i}

        return (lambda: IterableDataset.from_generator(generate)) if streaming else generate

    @pytest.mark.parametrize("streaming", [True, False])
    def test_reading_continues_at_the_same_row(self, streaming):
        rows = patiently(self.source([3, 3, 10, 29], streaming))
        assert [row["i"] for row in rows] == list(range(30))

    def test_reading_gives_up_after_some_attempts(self):
        with pytest.raises(ConnectionError, match="gone after 4 rows"):
            list(patiently(self.source([4] * 50, streaming=False), attempts=3))

    @pytest.mark.parametrize("status, again", [(503, True), (429, True), (404, False), (401, False)])
    def test_a_busy_hub_is_asked_again_and_a_missing_dataset_is_not(self, monkeypatch, status, again):
        """`datasets` raises the same error for both; its cause tells them apart."""
        calls = []

        def load(*args, **kwargs):
            calls.append(1)
            response = httpx.Response(status, request=httpx.Request("GET", "http://hub"))
            raise DatasetNotFoundError("no such dataset") from HfHubHTTPError("says the hub", response=response)

        monkeypatch.setattr("retrieval.sources.load_dataset", load)
        with pytest.raises(FileNotFoundError):
            list(DocumentStream("org/data").documents())
        assert len(calls) == (6 if again else 1)

    def test_another_error_after_a_network_error_is_raised_at_once(self):
        errors = [ConnectionError("gone"), ValueError("row 1 is not JSON")]

        def broken():
            yield {"i": 0}
            raise errors.pop(0)

        rows = patiently(broken)
        assert next(rows) == {"i": 0}
        with pytest.raises(ValueError, match="row 1"):
            next(rows)
        assert not errors

    def test_other_errors_are_raised_at_once(self):
        def broken():
            yield {"i": 0}
            raise ValueError("row 1 is not JSON")

        rows = patiently(broken)
        assert next(rows) == {"i": 0}
        with pytest.raises(ValueError, match="row 1"):
            next(rows)
