"""``tokenflow demo`` as people see it: in a real browser, without a window."""

from __future__ import annotations

import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import demo_browser
import numpy as np
import pytest
from demo_browser import codes, draw_picture, shown, upload, wait_for_other
from PIL import Image

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.demo import pictures
from tokenflow_ext.train.tasks.image_generator import ClassImageGenerator

pytestmark = demo_browser.marks()


def files_below(folder: Path) -> list[str]:
    """All that is in a folder, but for the cache that torch makes room for when it is imported."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(name for name in found if not name.startswith("torchinductor_"))


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Where the server works, is at home, and may write for a while."""
    root = tmp_path_factory.mktemp("served")
    found = {name: root / name for name in ("work", "home", "tmp")}
    for place in found.values():
        place.mkdir()
    return found


# Run by Python when it starts: every name that the process looks up, and every address that it
# connects to.
WATCH = """
import sys

def watch(event, arguments):
    if event == "socket.getaddrinfo":
        place = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        place = arguments[1][0]
    else:
        return
    with open({log!r}, "a") as file:
        file.write(f"{{place}}\\n")

sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def connected(tmp_path_factory) -> Path:
    """A folder whose ``places`` has all that the server has connected to."""
    folder = tmp_path_factory.mktemp("watched")
    script = WATCH.format(log=str(folder / "places"))
    (folder / "sitecustomize.py").write_text(script)
    return folder


@pytest.fixture(scope="module")
def server(image_tokenizer, classes_run, images, places, connected):
    words = ["--checkpoint", str(image_tokenizer), "--checkpoint", str(classes_run)]
    words += ["--data", str(images), "--device", "cpu"]
    environment = {
        "HOME": str(places["home"]),
        "TMPDIR": str(places["tmp"]),
        "PYTHONPATH": f"{connected}:{demo_browser.ROOT}",
    }
    with demo_browser.Server(words, places["work"], **environment) as started:
        yield started


def test_a_picture_goes_in_and_tokens_and_reconstruction_come_out(
    server, chromium, image_tokenizer, tmp_path
):
    file = draw_picture(tmp_path / "mine.png")
    tokenizer = TokenFlowTokenizer.from_pretrained(image_tokenizer)
    expected = pictures.encode(tokenizer, Image.open(file).convert("RGB"))
    page, asked = demo_browser.open_page(chromium, server.address)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    wait_for_other(page, ".tf-all-steps", lambda: upload(page, file))
    assert codes(page) == expected.tokens.tolist()
    made = expected.steps[-1].permute(1, 2, 0).int().numpy()
    assert np.abs(shown(page, ".tf-all-steps").astype(int) - made).max() <= 1
    said = page.locator(".tf-all-steps").first.inner_text()
    assert [f"{value:.1f} dB" in said for value in expected.psnr] == [True] * 3

    # A token is looked at, swapped, and put back.
    wait_for_other(
        page, ".tf-chosen-code", lambda: page.locator("[data-number='2'].tf-token").click()
    )
    code = int(expected.tokens[2])
    assert (
        f"Code {code} at 2 × 2, row 1, column 2"
        in page.locator(".tf-chosen-code").first.inner_text()
    )
    other = int(page.locator(".tf-similar [data-number]").first.get_attribute("data-number"))
    wait_for_other(
        page, ".tf-all-steps", lambda: page.locator(".tf-similar [data-number]").first.click()
    )
    assert codes(page) == [*expected.tokens[:2].tolist(), other, *expected.tokens[3:].tolist()]
    swapped = pictures.swap(tokenizer, expected, 2, other)
    changed = swapped.steps[-1].permute(1, 2, 0).int().numpy()
    assert np.abs(shown(page, ".tf-all-steps").astype(int) - changed).max() <= 1
    assert "1 token swapped" in page.locator(".tf-comparison").first.inner_text()
    page.get_by_label("or any code").fill("7")
    wait_for_other(
        page, ".tf-all-steps", lambda: page.get_by_role("button", name="Put it in").click()
    )
    assert codes(page)[2] == 7
    wait_for_other(
        page, ".tf-all-steps", lambda: page.get_by_role("button", name="Put all back").click()
    )
    assert codes(page) == expected.tokens.tolist()

    page.get_by_role("tab", name="Codebook").click()
    wait_for_other(
        page, ".tf-mapped-code", lambda: page.locator("circle[data-number='5']").click(force=True)
    )
    assert "Code 5" in page.locator(".tf-mapped-code").first.inner_text()
    assert page.locator(".tf-plane circle").count() == 64

    # Nothing was asked for anywhere else, and nothing on the page has failed.
    hosts = {urllib.parse.urlsplit(url).hostname for url in asked if url.startswith("http")}
    assert hosts == {"127.0.0.1"}
    assert len(asked) > 20
    assert errors == []
    page.context.close()


def test_a_class_is_drawn(server, chromium, classes_run):
    page, _ = demo_browser.open_page(chromium, server.address)
    page.get_by_role("tab", name="Draw").click()
    page.get_by_label("what to draw").click()
    page.get_by_role("option", name="cow").click()
    page.get_by_label("seed").fill("5")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("21 tokens, 3 of 3 scales").wait_for()
    [expected] = ClassImageGenerator.load(classes_run).draw(["cow"], [5])
    drawn = shown(page, ".tf-drawn").astype(int)
    assert np.abs(drawn - expected.permute(1, 2, 0).int().numpy()).max() <= 1
    page.context.close()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("broken.png", b"<svg onload='alert(1)'>", "of no known format"),
        ("notes.txt", b"no picture at all", "of no known format"),
        ("empty.png", b"", "it is empty"),
        ("half.png", b"\x89PNG\r\n\x1a\n", "of no known format"),
    ],
)
def test_what_is_no_picture_is_told_in_one_line(server, chromium, tmp_path, name, content, said):
    page, _ = demo_browser.open_page(chromium, server.address)
    before = codes(page)
    (tmp_path / name).write_bytes(content)
    upload(page, tmp_path / name)
    page.get_by_text(f"cannot read the image that you chose: {said}").wait_for()
    assert codes(page) == before
    assert page.locator(".tf-all-steps .tf-step img").first.is_visible()  # nothing is hidden
    # The next one is read, whatever its name.
    draw_picture(tmp_path / "mine.png").rename(tmp_path / "a picture \u00fc without a suffix")
    wait_for_other(
        page, ".tf-all-steps", lambda: upload(page, tmp_path / "a picture \u00fc without a suffix")
    )
    page.context.close()
    assert "Traceback" not in server.said


def test_a_picture_of_too_many_pixels_is_told(server, chromium, tmp_path):
    page, _ = demo_browser.open_page(chromium, server.address)
    before = codes(page)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    upload(page, tmp_path / "huge.png")
    page.get_by_text("Image size (400000000 pixels) exceeds limit").wait_for()
    assert codes(page) == before
    page.context.close()


def test_a_file_that_is_too_large_is_refused(server, chromium, tmp_path):
    page, _ = demo_browser.open_page(chromium, server.address)
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(21 * 2**20)
    upload(page, large)
    page.get_by_text("exceed the maximum allowed size of 20").first.wait_for()
    page.context.close()
    # The server does not take the browser's word for it.
    body = b"--x\r\n" + b'Content-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body += large.read_bytes() + b"\r\n--x--\r\n"
    asked = urllib.request.Request(
        f"{server.address}gradio_api/upload",
        body,
        {"Content-Type": "multipart/form-data; boundary=x"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked, timeout=60)
    assert refused.value.code == 413


def test_two_people_do_not_meet(server, chromium, tmp_path):
    one, _ = demo_browser.open_page(chromium, server.address)
    other, _ = demo_browser.open_page(chromium, server.address)
    begun = codes(other)
    wait_for_other(one, ".tf-all-steps", lambda: upload(one, draw_picture(tmp_path / "mine.png")))
    wait_for_other(
        other, ".tf-chosen-code", lambda: other.locator("[data-number='0'].tf-token").click()
    )
    assert codes(other) == begun
    assert codes(one) != begun
    one.context.close()
    other.context.close()


def test_the_server_connects_to_this_machine_alone(server, connected):
    assert set((connected / "places").read_text().split()) == {"127.0.0.1"}


def test_it_writes_in_a_temporary_folder_and_ends_with_ctrl_c(server, places):
    """The last of the tests: it ends the server."""
    [kept] = places["tmp"].glob("tokenflow-demo-*")
    assert any(kept.rglob("mine.png"))  # what was uploaded
    assert server.stop() == 130
    assert "stopped by Ctrl-C" in server.said
    assert "Traceback" not in server.said
    assert {name: files_below(place) for name, place in places.items()} == {
        "work": [],
        "home": [],
        "tmp": [],
    }
