"""Conversations: what is read and left out, which ids are learned, which sample is which."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import serve
from tiny_models import CODES, SCALES, image_tokenizer
from understanding_models import picture, text_tokenizer

from tokenflow_ext.models import ConfigError
from tokenflow_ext.models.understanding.build import with_image_token
from tokenflow_ext.models.understanding.chat import IMAGE, SYSTEM, Turn
from tokenflow_ext.models.understanding.squares import to_pixels
from tokenflow_ext.train.cli.commands.tokenize import tokenize
from tokenflow_ext.train.config import ConversationConfig
from tokenflow_ext.train.data import DataError, conversations
from tokenflow_ext.train.data.captions import Form
from tokenflow_ext.train.data.conversations import IGNORED, Conversations, Example, Writer
from tokenflow_ext.train.data.crops import counted_rng

FORM = Form(16, [(side, side) for side in SCALES], CODES)


def text(chatml=False):
    made = with_image_token(text_tokenizer())
    if chatml:
        made.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return made


def entry(*said, image="a.png", **more):
    roles = ("human", "gpt")
    turns = [{"from": roles[i % 2], "value": value} for i, value in enumerate(said)]
    found = {"conversations": turns, **more}
    return found if image is None else {"image": image, **found}


@pytest.fixture
def folder(tmp_path):
    """Three pictures, and a file with `entries` written into it."""

    def build(*entries, name="data.json"):
        for i, stem in enumerate("abc"):
            picture(i).save(tmp_path / f"{stem}.png")
        content = json.dumps(list(entries))
        if name.endswith(".jsonl"):
            content = "".join(json.dumps(line) + "\n" for line in entries)
        (tmp_path / name).write_text(content)
        return tmp_path / name

    return build


def opened(path, form="vicuna", length=2048, **options):
    writer = Writer(text(form == "chatml"), form, 16, "")
    config = ConversationConfig(length=length, **options)
    return conversations.open_source(path, None, None, writer, FORM, config, 2, 0)


# -- which ids are learned ------------------------------------------------------------------------


def shown(made, ids, labels):
    """Runs of ids that are learned, as text."""
    runs, run = [], []
    for token, label in zip(ids, labels, strict=True):
        if label == IGNORED:
            if run:
                runs.append(made.decode(run))
            run = []
        else:
            assert label == token
            run.append(token)
    return runs + ([made.decode(run)] if run else [])


TURNS = [
    Turn("user", f"{IMAGE}\nWhat color?"),
    Turn("assistant", "red"),
    Turn("user", "Is it a circle?"),
    Turn("assistant", "yes, it is"),
]


@pytest.mark.parametrize(
    ("form", "mask", "turns", "learned"),
    [
        ("vicuna", "answers", TURNS, [" red</s>", " yes, it is</s>"]),
        ("chatml", "answers", TURNS, ["red<|im_end|>", "yes, it is<|im_end|>"]),
        ("plain", "answers", TURNS[:2], ["red\n"]),
        ("vicuna", "answers", TURNS[2:], [" yes, it is</s>"]),
    ],
)
def test_answers_and_their_ends_are_learned(form, mask, turns, learned):
    made = text(form == "chatml")
    ids, labels = Writer(made, form, 16, None, mask)(turns)
    assert [run.strip() for run in shown(made, ids, labels)] == [run.strip() for run in learned]
    image = made.convert_tokens_to_ids(IMAGE)
    assert ids.count(image) == 16 * sum(turn.text.count(IMAGE) for turn in turns)
    assert all(label == IGNORED for id_, label in zip(ids, labels, strict=True) if id_ == image)


def test_the_originals_mask_of_chatml():
    made = text(chatml=True)
    ids, labels = Writer(made, "chatml", 16, None, "original")(TURNS)
    marks = {made.convert_tokens_to_ids(x) for x in ("<|im_start|>", "<|im_end|>")}
    assert all(label != IGNORED for id_, label in zip(ids, labels, strict=True) if id_ in marks)
    said = "".join(shown(made, ids, labels))
    for part in ("assistant\nred", "assistant\nyes, it is"):
        assert part in said.replace("assistant \n", "assistant\n")
    for part in ("What color", "Is it", "system", "helpful"):
        assert part not in said
    few = Writer(made, "chatml", 16, None)(TURNS)[1]
    assert sum(x != IGNORED for x in labels) > sum(x != IGNORED for x in few)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["vicuna", "chatml"]),
    st.lists(st.text("ab ?!\n'", min_size=1, max_size=9), min_size=1, max_size=4),
    st.sampled_from([None, "", "Be brief."]),
)
def test_ids_are_those_of_the_whole_text(form, words, system):
    """The ids are the text tokenizer's of the whole prompt, and every answer's ids are learned."""
    made = text(form == "chatml")
    turns = [Turn(("user", "assistant")[i % 2], word) for i, word in enumerate(words * 2)]
    ids, labels = Writer(made, form, 16, system)(turns)
    from tokenflow_ext.models.understanding.chat import pieces

    parts = pieces(turns, form, "</s>", system)
    assert ids == made("".join(part.text for part in parts))["input_ids"]
    ends = {"vicuna": "</s>", "chatml": "<|im_end|>"}[form]
    end = made.convert_tokens_to_ids(ends)
    learned = [label for label in labels if label != IGNORED]
    assert learned.count(end) == len(turns) // 2


def test_the_prompt_of_a_question_is_the_beginning_of_its_training_ids():
    from understanding_models import understanding

    _, processor = understanding()
    made = processor.tokenizer
    ids, labels = Writer(made, "vicuna", 16)(TURNS[:2])
    messages = [{"role": "user", "content": TURNS[0].text}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    given = processor(text=prompt, images=picture())["input_ids"][0]
    first = next(i for i, label in enumerate(labels) if label != IGNORED)
    assert ids[:first] == given
    assert SYSTEM["vicuna"][:6] in made.decode(ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chatml",), r"no id for <\|im_start\|>"),
        (("vicuna", 16, None, "original"), "of data.template 'chatml' alone"),
        (("none",), "template must be one of"),
    ],
)
def test_writers_that_cannot_be(arguments, message):
    form, *rest = arguments
    with pytest.raises(ConfigError, match=message):
        Writer(text(), form, *(rest or [16]))


def test_a_text_without_an_id_for_pictures():
    with pytest.raises(ConfigError, match="no id for <image>"):
        Writer(text_tokenizer(), "vicuna", 16)


# -- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_all_forms_are_read(folder, name):
    path = folder(
        entry(f"What is this? {IMAGE}", "a", id="first", kind="shape"),
        entry("Hello", "you", image=None),
        entry(f"{IMAGE} and {IMAGE}?", "same", "Sure?", "yes", image=["a.png", "b.png"], weight=2),
        name=name,
    )
    source = opened(path)
    first, second, third = source.conversations
    assert (first.name, first.kind, first.pictures) == ("first", "shape", ("a.png",))
    assert first.turns[0].text == f"{IMAGE}\nWhat is this?"
    assert (second.pictures, second.name) == ((), "2")
    assert third.turns[0].text == f"{IMAGE} and {IMAGE}?"
    assert source.weights.tolist() == [1, 1, 2]
    assert source.some_without_picture
    example = source[2]
    assert len(example.pictures) == 2
    for found, seed in zip(example.pictures, (0, 1), strict=True):
        assert found.equal(torch.from_numpy(to_pixels(picture(seed), 16, True)))


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("text", "no objects"),
        ({"image": "a.png"}, "without a conversation"),
        (entry("hi", "a"), "number of <image> is not that of its pictures"),
        (entry(f"{IMAGE}{IMAGE} hi", "a"), "number of <image> is not that of its pictures"),
        (entry(f"{IMAGE} hi", "a", image=None), "number of <image> is not that of its pictures"),
        (entry(f"{IMAGE} hi", IMAGE, image=["a.png", "b.png"]), "<image> in an answer"),
        (entry(f"{IMAGE} hi", "a", image="none.png"), "whose picture is not there (none.png)"),
        (entry(f"{IMAGE} hi", "a", image="../a.png"), "whose picture is not there (../a.png)"),
        (entry(f"{IMAGE} hi", "a", image="/etc/passwd"), "whose picture is not there"),
        (entry(f"{IMAGE} hi", "a", image=3), "whose image is no name"),
        (entry(f"{IMAGE} hi"), "do not go from human to gpt"),
        (entry(f"{IMAGE} hi", "a", "b"), "do not go from human to gpt"),
        (entry(f"{IMAGE} hi", " "), "with an empty turn"),
        (entry(f"{IMAGE} hi", "a", weight=-1), "weight is no number"),
        (entry(f"{IMAGE} hi", "a", kind=1), "kind is no text"),
        (entry(f"{IMAGE} " + "long " * 900, "a"), "of more than 512 ids"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "with a turn that is not"),
        ({"conversations": [3]}, "with a turn that is not"),
    ],
)
def test_what_cannot_be_used_is_counted_and_named(folder, capsys, bad, why):
    good = entry(f"{IMAGE} hi", "a")
    source = opened(folder(good, bad, good), length=512)
    assert len(source) == 2
    said = capsys.readouterr().err
    assert "2 conversations; left out: 1 conversations" in said
    assert why in said


def test_nothing_that_can_be_used(folder, tmp_path):
    with pytest.raises(DataError, match=r"no conversation in .* can be used.*is not there"):
        opened(folder(entry(f"{IMAGE} hi", "a", image="none.png")))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="must hold a list"):
        opened(tmp_path / "x.json")
    with pytest.raises(DataError, match="no conversations at"):
        opened(tmp_path / "none.json")
    with pytest.raises(DataError, match="without shards"):
        opened(tmp_path)


def test_a_length_is_exact(folder):
    """As many ids as the context holds are used, one more is not."""
    path = folder(entry(f"{IMAGE} what is it called?", "something"), entry("a", "b", image=None))
    count = len(opened(path)[0].ids)
    assert len(opened(path, length=count)) == 2
    assert len(opened(path, length=count - 1)) == 1


def test_a_picture_that_cannot_be_read(folder, tmp_path):
    source = opened(folder(entry(f"{IMAGE} hi", "a")))
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cannot read the image .*a\.png"):
        source[0]


def test_padding_is_an_option(folder):
    source = opened(folder(entry(f"{IMAGE} hi", "a")), pad=False)
    assert source[0].pictures[0].equal(torch.from_numpy(to_pixels(picture(0), 16, False)))


def test_tokens_in_the_place_of_pictures(folder, tmp_path):
    path = folder(
        entry(f"{IMAGE} hi", "a", image="b.png"), entry(f"{IMAGE} hi", "a", image="z.png")
    )
    model = image_tokenizer()
    model.save_pretrained(tmp_path / "tokenizer")
    images = tmp_path / "images"
    images.mkdir()
    for i, stem in enumerate("abc"):
        picture(i, 16, 16).save(images / f"{stem}.png")
    tokenize(str(images), str(tmp_path / "tokenizer"), str(tmp_path / "tokens"))
    writer = Writer(text(), "vicuna", 16, "")
    source = conversations.open_source(
        path, None, str(tmp_path / "tokens"), writer, FORM, ConversationConfig(), 2, 0
    )
    assert len(source) == 1
    pixels = torch.from_numpy(to_pixels(picture(1, 16, 16), 16, True))
    assert source[0].pictures[0].equal(model.eval().encode(pixels[None])[0])
    other = Form(16, FORM.scales, CODES + 1)
    with pytest.raises(DataError, match="tokens of 48 codes"):
        conversations.open_source(
            path, None, str(tmp_path / "tokens"), writer, other, ConversationConfig(), 2, 0
        )


def write_shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_shards(tmp_path, capsys):
    def png(seed):
        file = io.BytesIO()
        picture(seed).save(file, "PNG")
        return file.getvalue()

    def said(*words):
        return json.dumps(entry(*words)).encode()

    write_shard(
        tmp_path / "0.tar",
        [
            ("a.png", png(0)),
            ("a.json", said(f"{IMAGE} what?", "first")),
            ("b.png", png(1)),
            ("b.json", said("no place", "second")),
            ("c.png", png(2)),
            ("d.png", png(2)),
            ("d.json", b"{"),
            ("e.png", png(2)),
            ("e.json", said(f"what? {IMAGE}", "fifth")),
        ],
    )
    source = opened(tmp_path)
    found = conversations.some(source, 10)
    assert [said.turns[1].text for said, _ in found] == ["first", "fifth"]
    assert found[1][1].pictures[0].equal(torch.from_numpy(to_pixels(picture(2), 16, True)))
    data = Conversations(source, True, 2, 0)
    drawn = [data[g].pictures[0] for g in range(8)]
    assert {tuple(x.flatten().tolist()) for x in drawn} == {
        tuple(example.pictures[0].flatten().tolist()) for _, example in found
    }
    err = capsys.readouterr().err
    for why in ("number of <image>", "without a conversation", "JSON cannot be read"):
        assert why in err
    said = "".join(conversations.texts(tmp_path, 10, "vicuna", ""))
    assert said == "USER: \nwhat? ASSISTANT: firstUSER: \nwhat? ASSISTANT: fifth"
    writer = Writer(text(), "vicuna", 16, "")
    with pytest.raises(DataError, match="have their pictures inside"):
        conversations.open_source(tmp_path, "x", None, writer, FORM, ConversationConfig(), 2, 0)
    with serve(tmp_path) as server:  # the same by pattern and URL
        for place in (f"{tmp_path}/{{0..0}}.tar", f"{server.url}/0.tar"):
            again = Conversations(opened(place), True, 2, 0)
            for g in range(4):
                assert again[g].pictures[0].equal(drawn[g])
                assert again[g].ids == data[g].ids
            assert "".join(conversations.texts(place, 10, "vicuna", "")) == said


# -- which sample is which ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 9), st.integers(0, 99))
def test_batches_of_like_length_hold_every_sample_once(count, joint, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 500, count)
    order = rng.permutation(count)
    found = conversations.by_length(order, lengths, joint, counted_rng(seed, 2, 0))
    assert sorted(found) == list(range(count))
    again = conversations.by_length(order, lengths, joint, counted_rng(seed, 2, 0))
    assert np.array_equal(found, again)
    whole = count // joint * joint
    if whole and joint > 1 and count >= 40 * joint:

        def spread(rows):
            return np.ptp(lengths[rows][:whole].reshape(-1, joint), axis=1).mean()

        assert spread(found) < 0.5 * spread(order)


def test_samples_depend_on_seed_and_number_alone(folder):
    path = folder(*(entry(f"{IMAGE} {'hm ' * i}?", str(i)) for i in range(7)))
    source = opened(path)
    first, second = (Conversations(source, True, 2, 5) for _ in range(2))
    numbers = list(range(21))
    forward = [first[g].ids for g in numbers]
    backward = [second[g].ids for g in reversed(numbers)][::-1]
    assert forward == backward
    for round_ in range(3):
        seen = {tuple(ids) for ids in forward[7 * round_ : 7 * round_ + 7]}
        assert len(seen) == 7
    assert forward[:7] != forward[7:14]
    other = Conversations(source, True, 2, 6)
    assert forward != [other[g].ids for g in numbers]


def test_weights_say_how_often(folder):
    path = folder(
        *(entry("q", str(i), image=None, weight=3.0 if i == 0 else 1.0) for i in range(4))
    )
    data = Conversations(opened(path), False, 1, 0)
    heavy = data.source[0].ids
    share = np.mean([data[g].ids == heavy for g in range(400)])
    assert abs(share - 0.5) < 0.05


def test_collate():
    images = [torch.full((3, 2, 2), float(i)) for i in range(3)]
    batch = conversations.collate(
        7,
        [
            Example([1, 2, 3], [IGNORED, 2, 3], images[:2]),
            Example([4], [IGNORED], []),
            Example([5, 6], [5, IGNORED], images[2:]),
        ],
    )
    assert batch.ids.tolist() == [[1, 2, 3], [4, 7, 7], [5, 6, 7]]
    assert batch.labels.tolist() == [[-100, 2, 3], [-100] * 3, [5, -100, -100]]
    assert batch.valid.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.pictures.equal(torch.stack(images))
    assert conversations.collate(0, [Example([4], [4], [])]).pictures is None
