"""The tab *ask* as people see it: a picture and a question go in, words come out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import demo_browser
import numpy as np
import pytest
import torch
from demo_browser import draw_picture, shown, upload
from PIL import Image

from tokenflow_ext.models.understanding.squares import to_square
from tokenflow_ext.train.demo.temporary import folder_of_gradio
from tokenflow_ext.train.evaluation.answering import Answerer

pytestmark = demo_browser.marks()

VIEW = ".tf-asked-about img"
USER, MODEL = "[data-testid=user]", "[data-testid=bot]"
# All that the last answer has been.
WATCH = """
window.seen = [];
new MutationObserver(() => {
  const said = [...document.querySelectorAll("[data-testid=bot]")].map((one) => one.innerText);
  if (said.length && window.seen.at(-1) != said.at(-1)) window.seen.push(said.at(-1));
}).observe(document.body, {subtree: true, childList: true, characterData: true});
"""


@pytest.fixture(scope="module")
def server(answers_run):
    with demo_browser.Server(["--checkpoint", str(answers_run), "--device", "cpu"]) as started:
        yield started


@pytest.fixture(scope="module")
def answerer(answers_run) -> Answerer:
    return Answerer(answers_run, torch.device("cpu"))


@pytest.fixture
def page(server, chromium):
    opened, asked = demo_browser.open_page(
        chromium, server.address, ready=".tf-examples button:visible"
    )
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    assert errors == []
    assert all(url.startswith((server.address, "data:", "blob:")) for url in asked)
    opened.context.close()
    assert "Traceback" not in server.said


def put_in(page, file: Path) -> None:
    """A picture, until it is seen."""
    before = page.locator(VIEW).get_attribute("src") if page.locator(VIEW).count() else ""
    upload(page, file)
    page.wait_for_function(
        "([view, before]) => ![before, undefined].includes(document.querySelector(view)?.src)",
        arg=[VIEW, before],
    )


def press_until(page, press: Callable[[], object], seen: Callable[[], bool]) -> None:
    """Press until something is seen: the page takes no question before it knows that the last one
    is answered, which is a little after the words are there."""
    end = time.monotonic() + demo_browser.WAIT
    while not seen():
        assert time.monotonic() < end
        press()
        page.wait_for_timeout(500)


def send(page, press: Callable[[], object] | None = None) -> None:
    """Send a question, until it stands in the conversation."""
    before = page.locator(USER).count()
    if press is None:
        press = page.get_by_role("button", name="Ask", exact=True).click
    press_until(page, press, lambda: page.locator(USER).count() > before)


def ask(page, question: str, answer: str, longest: int) -> None:
    """A question, until it is answered."""
    page.get_by_label("number input for longest answer").fill(str(longest))
    page.get_by_label("question").fill(question)
    send(page)
    page.locator(MODEL).filter(has_text=answer).last.wait_for()


def answer_of(answerer: Answerer, file: Path, said: list[str], longest: int) -> str:
    """What the model answers: questions and answers, the first with the picture."""
    picture = Image.open(file).convert("RGB")
    roles = ("user", "assistant")
    chat = [{"role": roles[at % 2], "content": text} for at, text in enumerate(said)]
    chat[0]["content"] = "<image>\n" + chat[0]["content"]
    [answer] = answerer.answer([chat], [[picture]], longest)
    return answer


def test_words_stream_out_and_a_second_question_goes_on(page, answerer, tmp_path):
    file = draw_picture(tmp_path / "mine.png")
    first, second = "What color is the shape?", "Is there a blue triangle?"
    expected = answer_of(answerer, file, [first], 150)
    assert len(expected.split()) > 50
    put_in(page, file)
    seen = np.asarray(to_square(Image.open(file).convert("RGB"), 16, True))
    assert np.array_equal(shown(page, ".tf-asked-about"), seen)
    page.evaluate(WATCH)
    page.get_by_label("number input for longest answer").fill("150")
    page.get_by_label("question").fill(first)
    send(page)
    page.locator(MODEL).wait_for()
    page.wait_for_function(
        "asked => [...document.querySelectorAll('textarea')].every((one) => one.value != asked)",
        arg=first,
    )
    page.get_by_label("question").fill(second)  # while the first is being answered
    page.locator(MODEL).filter(has_text=expected).wait_for()
    grown = [" ".join(text.split()) for text in page.evaluate("window.seen")]
    assert grown[-1] == expected
    assert len(grown) > 3  # it came in pieces, each the one before and more
    assert all(one.startswith(other) for other, one in itertools.pairwise(grown))
    assert page.get_by_label("question").input_value() == second

    again = answer_of(answerer, file, [first, expected, second], 40)
    assert again != answer_of(answerer, file, [second], 40)  # what was said before matters
    ask(page, second, again, 40)
    assert page.locator(USER).all_inner_texts() == [first, second]
    assert page.locator(MODEL).all_inner_texts() == [expected, again]

    # Another picture begins anew.
    other = draw_picture(tmp_path / "other.png", side=300)
    put_in(page, other)
    page.wait_for_function("document.querySelectorAll('[data-testid=user]').length == 0")
    ask(page, second, answer_of(answerer, other, [second], 40), 40)
    assert page.locator(USER).all_inner_texts() == [second]


def test_an_example_is_asked_about_until_the_conversation_is_cleared(page, answerer, tmp_path):
    def press() -> None:
        page.get_by_label("question").fill("What?")
        page.get_by_label("question").press("Enter")

    example = tmp_path / "example.png"
    with folder_of_gradio():
        from tokenflow_ext.train.demo.parts import Examples
    Examples(None).open(1).save(example)
    first = answer_of(answerer, example, ["What?"], 5)
    second = answer_of(answerer, example, ["What?", first, "What?"], 5)
    page.locator(".tf-examples button").nth(1).click()
    page.wait_for_selector(VIEW)
    page.evaluate(WATCH)
    page.get_by_label("number input for longest answer").fill("512")
    send(page, press)
    page.locator(MODEL).wait_for()
    # While it is being written: then the answer ends.
    page.get_by_label("Clear").first.click()
    page.wait_for_function("document.querySelectorAll('[data-testid=user]').length == 0")
    page.get_by_label("number input for longest answer").fill("5")
    for answer in (first, second):
        send(page, press)
        page.locator(MODEL).filter(has_text=answer).last.wait_for()
    assert page.locator(MODEL).all_inner_texts() == [first, second]
    # Of 512 words few came.
    assert 0 < max(len(text.split()) for text in page.evaluate("window.seen")) < 400


def test_what_cannot_be_asked_is_told_and_the_conversation_stays(page, answerer, tmp_path):
    def told(words: str, act: Callable[[], object]) -> None:
        toast = page.locator(".toast-body").filter(has_text=words)
        press_until(page, act, lambda: toast.count() > 0)
        while page.locator(".toast-close").count():
            page.locator(".toast-close").first.click()
            page.wait_for_timeout(500)
        assert page.get_by_text("Error", exact=True).count() == 0

    press = page.get_by_role("button", name="Ask", exact=True).click
    told("pick a picture first", press)
    file = draw_picture(tmp_path / "mine.png")
    put_in(page, file)
    answer = answer_of(answerer, file, ["What?"], 20)
    ask(page, "What?", answer, 20)
    told("the question is empty", press)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"GIF89a but not really")
    told("cannot read the image that you chose", lambda: upload(page, broken))
    page.get_by_label("question").fill("x" * 2000)
    told("do not fit into the model's context of 2048", press)
    # All is as it was, and the next question is answered.
    assert page.locator(USER).all_inner_texts() == ["What?"]
    assert page.locator(MODEL).all_inner_texts() == [answer]
    ask(page, "Why?", answer_of(answerer, file, ["What?", answer, "Why?"], 20), 20)


def test_two_people_ask_at_once_and_one_leaves(server, chromium, answerer, tmp_path):
    files = [draw_picture(tmp_path / f"{side}.png", side) for side in (70, 200)]
    people = [
        demo_browser.open_page(chromium, server.address, ready=".tf-examples button:visible")[0]
        for _ in files
    ]
    for person, file in zip(people, files, strict=True):
        put_in(person, file)
    one, other = people
    for person, longest in ((one, "512"), (other, "30")):
        person.get_by_label("number input for longest answer").fill(longest)
        person.get_by_label("question").fill("What?")
    for person in people:
        person.get_by_role("button", name="Ask", exact=True).click()
    one.locator(MODEL).wait_for()
    one.context.close()  # in the middle of its answer, or after it
    expected = answer_of(answerer, files[1], ["What?"], 30)
    other.locator(MODEL).filter(has_text=expected).wait_for()
    assert other.locator(MODEL).all_inner_texts() == [expected]
    other.context.close()
    assert "Traceback" not in server.said


def test_what_is_said_is_shown_to_the_letter(page, tmp_path):
    """Nothing that is typed, or that a model says, becomes a part of the page."""
    put_in(page, draw_picture(tmp_path / "mine.png"))
    question = "Is 1 < 2 & <b>bold</b> &lt; <img src='http://127.0.0.1:9/x.png'> **so**?"
    page.get_by_label("question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(MODEL).wait_for()
    assert page.locator(USER).inner_text() == question
    assert page.locator(f"{USER} img, {USER} b").count() == 0
