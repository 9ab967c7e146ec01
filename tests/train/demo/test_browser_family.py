"""Tokenizers of the family as people see them: groups and rounds, and codes without a table."""

from __future__ import annotations

import demo_browser
import numpy as np
import pytest
from demo_browser import codes, draw_picture, shown, upload, wait_for_other
from PIL import Image

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.demo import pictures

pytestmark = demo_browser.marks()


@pytest.fixture(scope="module")
def served(family_runs, images):
    """Address of the page of each tokenizer, and its process."""
    servers = {}
    try:
        for name, run in family_runs.items():
            words = ["--checkpoint", str(run), "--data", str(images), "--device", "cpu"]
            servers[name] = demo_browser.Server(words)
        yield servers
    finally:
        for server in servers.values():
            server.__exit__()


@pytest.fixture
def opened(served, chromium):
    """opened(name): the page of one; nothing on it may fail."""
    errors: list[str] = []
    pages = []

    def go(name):
        page, asked = demo_browser.open_page(chromium, served[name].address)
        page.on("pageerror", lambda error: errors.append(str(error)))
        pages.append((page, asked, served[name]))
        return page

    yield go
    assert errors == []
    for page, asked, server in pages:
        assert all(url.startswith((server.address, "data:", "blob:")) for url in asked)
        assert "Traceback" not in server.said
        page.context.close()


def last_picture(picture: pictures.TokenPicture) -> np.ndarray:
    return picture.steps[-1].permute(1, 2, 0).int().numpy()


def put_in(page, run, tmp_path):
    """A picture of one's own; gives what is to be seen of it."""
    file = draw_picture(tmp_path / "mine.png")
    tokenizer = TokenFlowTokenizer.from_pretrained(run)
    wait_for_other(page, ".tf-all-steps", lambda: upload(page, file))
    expected = pictures.encode(tokenizer, Image.open(file).convert("RGB"))
    assert codes(page) == expected.tokens.tolist()
    difference = shown(page, ".tf-all-steps").astype(int) - last_picture(expected)
    assert np.abs(difference).max() <= 1
    said = page.locator(".tf-all-steps").first.inner_text()
    assert [f"{value:.1f} dB" in said for value in expected.psnr] == [True] * len(expected.psnr)
    return tokenizer, expected


def test_groups_and_rounds(opened, family_runs, tmp_path):
    page = opened("groups")
    tokenizer, expected = put_in(page, family_runs["groups"], tmp_path)
    titles = page.locator(".tf-all-steps h4").all_inner_texts()
    sides = ("2 × 2", "4 × 4")
    assert [title.rsplit(" ", 2)[0] for title in titles] == [
        f"{side}, round {part}" for side in sides for part in (1, 2)
    ]
    assert page.locator(".tf-step").first.locator("small").all_inner_texts()[1:] == [
        "semantic 1",
        "semantic 2",
        "pixel 1",
        "pixel 2",
    ]
    assert "20 places × 4 groups × 2 rounds" in page.locator(".tf-comparison").first.inner_text()

    # Row 2, column 3 of 4 x 4, group "pixel 2", round 2.
    number = ((4 + 6) * 4 + 3) * 2 + 1
    token = page.locator(f".tf-token[data-number='{number}']")
    wait_for_other(page, ".tf-chosen-code", token.click)
    code = int(expected.tokens[number])
    where = f"Code {code} at 4 × 4, round 2, row 2, column 3, pixel 2"
    assert where in page.locator(".tf-chosen-code").first.inner_text()
    similar = page.locator(".tf-similar [data-number]").first
    other = int(similar.get_attribute("data-number"))
    wait_for_other(page, ".tf-all-steps", similar.click)
    changed = pictures.swap(tokenizer, expected, number, other)
    assert codes(page) == changed.tokens.tolist()
    assert np.abs(shown(page, ".tf-all-steps").astype(int) - last_picture(changed)).max() <= 1
    assert "1 token swapped" in page.locator(".tf-comparison").first.inner_text()
    back = page.get_by_role("button", name="Put this back")
    wait_for_other(page, ".tf-all-steps", back.click)
    assert codes(page) == expected.tokens.tolist()
    page.get_by_label("or any code").fill("16")
    page.get_by_role("button", name="Put it in").click()
    page.get_by_text("a code is a number from 0 to 15, got 16").wait_for()

    # A token of the semantic branch draws nothing, and says so.
    wait_for_other(page, ".tf-effect", page.locator(".tf-token[data-number='0']").click)
    assert "This token is of the semantic branch" in page.locator(".tf-effect").first.inner_text()

    page.get_by_role("tab", name="Codebook").click()
    assert page.locator(".tf-use th").all_inner_texts()[-4:] == [
        "semantic 1",
        "semantic 2",
        "pixel 1",
        "pixel 2",
    ]
    radio = page.get_by_label("pixel 1", exact=True)
    wait_for_other(page, ".tf-plane", radio.click)
    assert page.locator(".tf-plane circle").count() == 16
    assert "By the group pixel 1" in page.locator(".tf-shared").first.inner_text()
    dot = page.locator("circle[data-number='5']")
    wait_for_other(page, ".tf-mapped-code", lambda: dot.click(force=True))
    assert "Code 5" in page.locator(".tf-mapped-code").first.inner_text()


def test_signs(opened, family_runs, tmp_path):
    page = opened("signs")
    tokenizer, expected = put_in(page, family_runs["signs"], tmp_path)
    number = 1  # the pixel branch's token of the first scale
    token = page.locator(f".tf-token[data-number='{number}']")
    wait_for_other(page, ".tf-chosen-code", token.click)
    code = int(expected.tokens[number])
    signs = ["+" if code >> channel & 1 else "\N{MINUS SIGN}" for channel in range(8)]
    assert page.locator(".tf-chosen-code .tf-digits span").all_inner_texts() == signs
    flip = page.locator(".tf-similar [data-number]").nth(2)
    assert "channel 3" in flip.inner_text()
    wait_for_other(page, ".tf-all-steps", flip.click)
    changed = pictures.swap(tokenizer, expected, number, code ^ 4)
    assert codes(page) == changed.tokens.tolist()
    assert np.abs(shown(page, ".tf-all-steps").astype(int) - last_picture(changed)).max() <= 1

    page.get_by_role("tab", name="Codebook").click()
    plane = page.locator(".tf-plane").first
    assert "signs have no table" in plane.inner_text()
    assert "2 to the 6 = 64 patterns" in plane.inner_text()
    wait_for_other(page, ".tf-plane", page.get_by_label("pixel", exact=True).click)
    assert "2 to the 8 = 256 patterns" in plane.inner_text()
    assert page.locator(".tf-channels > div").count() == 8
    one = page.locator(".tf-plane [data-number]").nth(3)
    chosen = one.get_attribute("data-number")
    wait_for_other(page, ".tf-mapped-code", one.click)
    assert f"Code {chosen}" in page.locator(".tf-mapped-code").first.inner_text()
