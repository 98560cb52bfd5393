"""The inspector's page and static file, in a real Chromium."""

import pytest
import torch
from playwright.sync_api import sync_playwright

from evaluation_retro.inspection import copied_spans, inspect_generation, inspect_text, token_texts
from evaluation_retro.inspection_page import build_page, launch, static_page
from evaluation_retro.inspector import InspectSettings, check_gradio
from retrieval import BulkTokenizer

from ..support.browser import open_chromium
from ..support.training_world import TEXTS

NASTY = "<script>document.title='hurt'</script>\"'><img src=x onerror=alert(1)>"
PROMPT = "The encoder reads each neighbor on its own"
SECONDS = 20_000  # milliseconds that the page has for an answer


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = open_chromium(playwright)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(SECONDS)
    page.hosts, page.dialogs = set(), []
    page.on("request", lambda request: page.hosts.add(request.url.split("/")[2] if "//" in request.url else ""))
    page.on("dialog", lambda dialog: (page.dialogs.append(dialog.message), dialog.dismiss()))
    yield page
    page.close()


@pytest.fixture
def file(opened, tmp_path):
    path = tmp_path / "read.html"
    path.write_text(static_page(inspect_text(opened, PROMPT + NASTY)), encoding="utf-8")
    return path


def test_tokens_joined_are_the_text(tokenizer):
    text = "Käse 数学 🙂!"
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
    assert tab.locator("#on .text").text_content().endswith(NASTY)
    assert tab.title() == "RETRO: what it read" and not tab.locator("img").count()
    chunks.nth(1).hover()
    assert tab.locator("#neighbors-title").text_content().startswith("Neighbors of chunk 2 of")
    chunks.nth(1).locator(".token").first.hover()
    assert "with neighbors" in tab.locator("#token").text_content()
    chunks.nth(1).focus()
    tab.keyboard.press("ArrowDown")
    assert tab.locator("#neighbors-title").text_content().startswith("Neighbors of chunk 3 of")
    tab.keyboard.press("ArrowRight")
    assert chunks.nth(2).locator(".token.active").count() == 1
    tab.set_viewport_size({"width": 390, "height": 844})
    for view in ("on", "off", "both"):
        tab.check(f"#view input[value={view}]", force=True)
        assert tab.locator("#off").is_visible() == (view != "on")
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert not tab.dialogs and tab.hosts <= {""}


@pytest.fixture
def address(opened):
    page = build_page(opened, 8, 0.0)
    yield launch(page, "127.0.0.1", None, block=False)
    page.close()


def test_page(address, tab):
    def click(name, said, expected):
        tab.click(f"#{name}")
        tab.wait_for_function(
            "([id, text]) => document.querySelector(`#${id} textarea, #${id} input`).value.includes(text)",
            arg=[said, expected],
        )

    def documents():
        frame = tab.frame_locator("#view iframe")
        frame.locator(".chunk").first.wait_for()
        return frame.locator(".neighbor h3").all_text_contents(), frame.locator("#on .text").text_content()

    tab.goto(address)
    tab.fill("#prompt textarea", PROMPT)
    click("generate", "said", "Wrote 8 tokens")
    before = documents()
    tab.click("#knowledge_base button")
    tab.fill("#doc_id textarea, #doc_id input", NASTY)
    tab.fill("#doc_text textarea", PROMPT)
    click("put", "changed", "chunks written")
    tab.click("#generate")
    tab.frame_locator("#view iframe").get_by_text(NASTY).first.wait_for()
    with_document = documents()
    assert with_document[1] != before[1], "the answer changes"
    tab.fill("#doc_text textarea", TEXTS[0])
    click("put", "changed", "has")
    tab.click("#generate")
    tab.frame_locator("#view iframe").locator(".neighbor p", has_text=TEXTS[0][:20]).or_(
        tab.frame_locator("#view iframe").locator("#neighbors")
    ).first.wait_for()
    tab.fill("#doc_text textarea", "")
    click("put", "changed", "The document has no text")
    click("remove", "changed", "Removed")
    tab.click("#generate")
    tab.frame_locator("#view iframe").get_by_text(NASTY).first.wait_for(state="detached")
    assert documents() == before
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    assert not tab.dialogs and tab.hosts <= {"", address.split("/")[2]}
