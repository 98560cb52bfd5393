"""The inspector's page and static file, in a real Chromium."""

import re

import pytest
import torch
from playwright.sync_api import expect, sync_playwright

from evaluation_retro.inspection import copied_spans, inspect_generation, inspect_text, token_texts
from evaluation_retro.inspection_page import build_page, launch, static_page
from evaluation_retro.inspector import InspectSettings, check_gradio
from retrieval import BulkTokenizer

from ..support.browser import open_chromium
from ..support.training_world import TEXTS

NASTY = "<script>document.title='hurt'</script>\"'><img src=x onerror=alert(1)>"
PROMPT = "The encoder reads each neighbor on its own"
MULTIBYTE = " Käse 数学 🙂 "
QUESTION = "The encoder answers:"  # two chunks of tokens
ADDED, CHANGED = MULTIBYTE[:-1] + "!", " <script>x</script>"  # what a document says next
NEW_TOKENS = 24  # more than either has
PATIENCE = 20_000  # milliseconds that the page has for an answer


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = open_chromium(playwright)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page.hosts, page.dialogs = set(), []
    page.on("request", lambda request: page.hosts.add(request.url.split("/")[2] if "//" in request.url else ""))
    page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
    yield page
    page.close()


@pytest.fixture
def file(opened, tmp_path):
    path = tmp_path / "read.html"
    path.write_text(static_page(inspect_text(opened, PROMPT + MULTIBYTE + NASTY)), encoding="utf-8")
    return path


def test_tokens_joined_are_the_text(tokenizer):
    text = MULTIBYTE
    bulk = BulkTokenizer(tokenizer)
    (tokens,) = bulk.encode_batch([text])
    shown = token_texts(bulk, tokens)
    assert len(shown) == len(tokens) and "".join(shown) == text


def test_copied_spans_are_shared_runs():
    assert copied_spans([9, 1, 2, 3, 4, 5, 9, 2, 3, 4], [1, 2, 3, 4, 5, 8], least=3) == [(1, 6), (7, 10)]
    assert copied_spans([1, 2], [1, 2], least=3) == []
    assert copied_spans([1, 2, 3, 4, 5], [1, 2, 3, 9, 3, 4, 5], least=3) == [(0, 5)]  # no token twice


@torch.no_grad()
def test_log_probs_are_the_models(opened):
    """The model's own search on the paper's grid, in one plain forward, gives the same numbers."""
    shown = inspect_text(opened, TEXTS[0] + TEXTS[1])
    ids = torch.tensor([opened.tokenizer.encode_batch([TEXTS[0] + TEXTS[1]])[0]])
    for values, arguments in ((shown.on, {}), (shown.off, {"use_retrieval": False})):
        log_probs = opened.model(ids, **arguments).logits[0, :-1].log_softmax(-1)
        expected = log_probs.gather(1, ids[0, 1:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(values[1:]), expected, atol=1e-3, rtol=0)
    assert shown.on != shown.off


def test_refusals(opened, monkeypatch):
    with pytest.raises(ValueError, match="The prompt is empty"):
        inspect_generation(opened, "", 4)
    with pytest.raises(ValueError, match="but the model has 128 positions"):
        inspect_generation(opened, PROMPT, 1000)
    with pytest.raises(ValueError, match="give a text of 9 tokens or more"):
        inspect_text(opened, "a")
    with pytest.raises(ValueError, match="one of the two"):
        InspectSettings(model="m", export="x.html")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="inspect"):
        check_gradio()


def test_static_file(file, tab):
    tab.goto(file.as_uri())
    chunks = tab.locator(".chunk")
    assert tab.locator("#on .text").text_content() == PROMPT + MULTIBYTE + NASTY
    assert tab.title() == "RETRO: what it read" and not tab.locator("img").count()
    chunks.nth(1).hover()
    assert tab.locator("#neighbors-title").text_content().startswith("Neighbors of chunk 2 of")
    chunks.nth(1).locator(".token").first.hover()
    assert "with neighbors" in tab.locator("#token").text_content()
    chunks.nth(1).focus()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "neighbors", "one chunk alone is a stop"
    tab.keyboard.press("Shift+Tab")
    tab.keyboard.press("ArrowDown")
    assert tab.locator("#neighbors-title").text_content().startswith("Neighbors of chunk 3 of")
    tab.keyboard.press("ArrowRight")
    assert chunks.nth(2).locator(".token.active").count() == 1
    tab.set_viewport_size({"width": 390, "height": 844})
    for view in ("on", "off", "both"):
        tab.check(f"#view input[value={view}]", force=True)
        assert tab.locator("#off").is_visible() == (view != "on")
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
    tab.check("#view input[value=on]", force=True)
    chunks.last.click()
    for shown in (chunks.last, tab.locator("#neighbors-title"), tab.locator(".neighbor h3").first):
        expect(shown).to_be_in_viewport()
    assert not tab.dialogs and tab.hosts <= {""}


@pytest.fixture
@torch.no_grad()
def copying(opened):
    """The copier with its gate opened by hand: it continues the longest match."""
    head = opened.model.copy_head
    for parameter in (head.similarity, head.gate_hidden, head.gate_features):
        parameter.zero_()
    head.match.copy_(torch.tensor(opened.model.config.stored_match_weights))
    head.gate_bias.fill_(1.0)  # log odds, divided by match_scale
    head.gate_scale.fill_(1.0)
    return opened


@pytest.fixture
def address(copying):
    page = build_page(copying, NEW_TOKENS, 0.0)
    yield launch(page, "127.0.0.1", None, block=False)
    page.close()


@pytest.mark.filterwarnings("ignore:.*no_silent_downcasting")  # Gradio's statistics, with pandas 3
def test_page(address, tab):
    """The answer follows a document that is added, changed and removed. Its text stays text."""
    frame = tab.frame_locator("#view iframe")
    text, neighbors = frame.locator("#on .text"), frame.locator("#neighbors")
    said, changed = (tab.locator(f"#{name}").locator("textarea, input") for name in ("said", "changed"))

    def put(document):
        tab.fill("#doc_text textarea", document)
        tab.click("#put")

    tab.goto(address)
    tab.click("#generate")
    expect(said).to_have_value(re.compile("The prompt is empty"))
    tab.fill("#prompt textarea", QUESTION)
    tab.click("#generate")
    expect(said).to_have_value(f"Wrote {NEW_TOKENS} tokens.")
    expect(text).to_contain_text(QUESTION)
    before = text.text_content(), neighbors.text_content()
    assert ADDED not in "".join(before)

    tab.click("#knowledge_base button")
    tab.fill("#doc_id textarea, #doc_id input", NASTY)
    put(QUESTION + ADDED)
    expect(changed).to_have_value(re.compile("chunks written"))
    tab.click("#generate")
    expect(text).to_contain_text(QUESTION + ADDED)
    expect(frame.locator(".neighbor h3").first).to_contain_text(NASTY)
    expect(frame.locator("mark").first).to_contain_text(ADDED[:4])

    put(QUESTION + CHANGED)
    tab.click("#generate")
    expect(text).to_contain_text(QUESTION + CHANGED)
    expect(neighbors).to_contain_text(CHANGED[:8])
    assert ADDED not in text.text_content() and ADDED[:8] not in neighbors.text_content()

    put("")
    expect(changed).to_have_value(re.compile("The document has no text"))
    tab.click("#remove")
    expect(changed).to_have_value(re.compile("Removed"))
    tab.click("#generate")
    expect(text).not_to_contain_text(CHANGED)
    assert (text.text_content(), neighbors.text_content()) == before
    tab.click("#remove")
    expect(changed).to_have_value(re.compile("has no document"))

    for view in ("off", "both", "on"):
        frame.locator(f"#view input[value={view}]").check(force=True)
        assert frame.locator("#off").is_visible() == (view != "on")
        assert text.is_visible() == (view != "off")
    tab.set_viewport_size({"width": 390, "height": 844})
    for width in ("document", "document.querySelector('#view iframe').contentDocument"):
        widths = tab.evaluate(f"[{width}.documentElement.scrollWidth, {width}.documentElement.clientWidth]")
        assert widths[0] == widths[1]
    switch = frame.locator("#view").evaluate("(made) => [made.scrollWidth - made.clientWidth, made.offsetHeight]")
    assert switch[0] == 0 and switch[1] < 40, "one line, not clipped"
    assert not tab.dialogs and tab.hosts <= {"", address.split("/")[2]}
