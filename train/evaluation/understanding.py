"""How often an understanding model answers right: exact matches by kind of question, beside what
answering without looking gives."""

from __future__ import annotations

import html
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from tokenflow_ext.models.understanding.chat import IMAGE
from tokenflow_ext.train.data import DataError, conversations, open_image
from tokenflow_ext.train.data.conversations import Conversation
from tokenflow_ext.train.data.outputs import Outputs, json_text
from tokenflow_ext.train.data.text_files import Tally, inside, printable, say
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.logs import table

from .answering import Answerer, Message
from .report import data_uri, environment

FILES = ("answers.jsonl", "answers.html", "metrics.json")
_ALL = "all"
_CONFUSED = 20  # pairs of answers that the page shows


class Item(NamedTuple):
    """A question with its answer.

    Attributes:
        name: of the conversation.
        kind: of what sort the question is.
        pictures: names of the pictures up to it.
        before: what was said before it.
        question: as it is asked, with ``<image>`` where a picture stands.
        truth: the answer.
    """

    name: str
    kind: str
    pictures: tuple[str, ...]
    before: tuple[Message, ...]
    question: str
    truth: str


def items(conversation: Conversation) -> Iterator[Item]:
    """Each question of a conversation, the true answers to those before it given."""
    messages: list[Message] = []
    places = 0
    for turn in conversation.turns:
        if turn.role == "assistant":
            question = messages[-1]["content"]
            yield Item(
                conversation.name,
                conversation.kind,
                conversation.pictures[:places],
                tuple(messages[:-1]),
                question,
                turn.text.strip(),
            )
        places += turn.text.count(IMAGE)
        messages.append({"role": turn.role, "content": turn.text})


def read_items(path: Path) -> list[Item]:
    """The questions of a file in LLaVA's form; what cannot be used is counted and named.

    Raises:
        DataError: no question.
    """
    found: list[Item] = []
    left = Tally(path)
    for number, entry in conversations.entries(path):
        conversation, why = conversations.parse(entry, number)
        if conversation is None:
            left.add(f"conversations {why}", f"number {number}")
        else:
            found += items(conversation)
    if not found:
        raise DataError(f"no question in {path} ({left})")
    left.say(f"{len(found)} questions; left out")
    return found


def _asked(question: str) -> str:
    return question.replace(IMAGE, "").strip()


def floor(train: Sequence[Item], asked: Sequence[Item]) -> list[str]:
    """Answers without looking: to each question its commonest answer in training, to one that is
    not asked there the commonest of all. Of equally common ones the first in the alphabet."""
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for item in train:
        by_question[_asked(item.question)][item.truth] += 1
    total: Counter[str] = sum(by_question.values(), Counter())

    def commonest(counts: Counter[str]) -> str:
        return min(counts, key=lambda answer: (-counts[answer], answer))

    known = {question: commonest(counts) for question, counts in by_question.items()}
    return [known.get(_asked(item.question), commonest(total)) for item in asked]


def shares(asked: Sequence[Item], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Exact matches by kind of question, and of all: {kind: {"questions": n, "right": share}}."""
    counts: dict[str, list[int]] = {_ALL: [0, 0]}
    for item, answer in zip(asked, answers, strict=True):
        for kind in {_ALL, item.kind} - {""}:
            of = counts.setdefault(kind, [0, 0])
            of[0] += 1
            of[1] += answer.strip() == item.truth
    return {
        kind: {"questions": total, "right": right / total}
        for kind, (total, right) in sorted(counts.items())
    }


def confusion(asked: Sequence[Item], answers: Sequence[str]) -> dict[str, dict[str, int]]:
    """How often which answer came in the place of which: {truth: {answer: count}}."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for item, answer in zip(asked, answers, strict=True):
        found[item.truth][answer] += 1
    return {truth: dict(counts.most_common()) for truth, counts in sorted(found.items())}


@dataclass
class Result:
    """What an evaluation found."""

    report: dict[str, Any]
    items: list[Item]
    answers: list[str]


def evaluate(
    place: str,
    data: str,
    group: Processes,
    *,
    images: str | None = None,
    train: str | None = None,
    limit: int | None = None,
    batch: int = 32,
    new: int = 32,
    dtype: str = "float32",
) -> Result:
    """Greedy answers to the questions of a file, held against the true ones.

    Args:
        place: the model.
        data: the file of questions.
        images: the folder of its pictures; None is the file's own.
        train: the file that was trained on, for the floor.
        limit: so many questions, evenly spread.
        batch: questions at once.
        new: ids of an answer at most.
        dtype: of the language model.

    Raises:
        DataError: no question, or a picture that cannot be read.
        CheckpointError: no model.
    """
    path = Path(data)
    every = read_items(path)
    count = min(len(every), limit or len(every))
    asked = [every[i * len(every) // count] for i in range(count)]
    trained = None if train is None else read_items(Path(train))
    folder = path.parent if images is None else Path(images)
    model = Answerer(place, group.device, dtype)
    own = range(group.rank, len(asked), group.world)
    found: dict[int, str] = {}
    for start in range(0, len(own), batch):
        rows = own[start : start + batch]
        chats = [[*asked[i].before, {"role": "user", "content": asked[i].question}] for i in rows]
        pictures = [[open_image(inside(folder, x)) for x in asked[i].pictures] for i in rows]
        found |= dict(zip(rows, model.answer(chats, pictures, new), strict=True))
        if group.first and start % (batch * 20) == 0:
            say(f"{min(start + batch, len(own))} of {len(own)} questions")
    together: dict[int, str] = {}
    for part in group.gather(found):
        together |= part
    answers = [together[i] for i in range(len(asked))]
    guessed = None if trained is None else floor(trained, asked)
    report = {
        "model": str(checkpoint.find(place)),
        "data": {"file": str(path), "questions": len(asked), "of": len(every)},
        "right": shares(asked, answers),
        "floor": None if guessed is None else shares(asked, guessed),
        "floor_of": train,
        "confusion": confusion(asked, answers),
        "dtype": dtype,
        "max_tokens": new,
        "features": model.model.config.vision_config.features,
        "environment": {**environment(group), "transformers": transformers.__version__},
    }
    return Result(report, asked, answers)


def as_table(report: dict[str, Any]) -> str:
    """Right answers by kind, beside the floor."""
    rows = [("exact matches", "answers", "without looking")]
    for kind, found in report["right"].items():
        guessed = "-" if report["floor"] is None else f"{report['floor'][kind]['right']:.1%}"
        rows.append((f"{kind} ({found['questions']})", f"{found['right']:.1%}", guessed))
    lines = [line.rstrip() for line in table(rows).splitlines()]
    if report["floor"] is None:
        lines.append("without looking: unknown, name what was trained on with --train FILE")
    else:
        lines.append(
            f"without looking: to each question its commonest answer in {report['floor_of']}"
        )
    return "\n".join(lines)


def as_page(result: Result, folder: Path, pictures: int) -> str:
    """A page of HTML that needs no other file: figures, confusions, pictures with questions."""
    text = html.escape(as_table(result.report))
    wrong = [
        (count, truth, answer)
        for truth, found in result.report["confusion"].items()
        for answer, count in found.items()
        if answer != truth
    ]
    rows = "".join(
        f"<tr><td>{html.escape(truth)}</td><td>{html.escape(printable(answer)) or '(nothing)'}</td>"
        f"<td>{count}</td></tr>"
        for count, truth, answer in sorted(wrong, reverse=True)[:_CONFUSED]
    )
    shown = []
    count = min(pictures, len(result.items))
    for i in (place * len(result.items) // max(1, count) for place in range(count)):
        item, answer = result.items[i], result.answers[i]
        colour = "#060" if answer == item.truth else "#a00"
        images = "".join(
            f'<img alt="" src="{data_uri(open_image(inside(folder, name)))}">'
            for name in item.pictures
        )
        shown.append(
            f"<figure>{images}<figcaption>{html.escape(printable(_asked(item.question)))}<br>"
            f'<b style="color:{colour}">{html.escape(printable(answer)) or "(nothing)"}</b><br>'
            f"truth: {html.escape(printable(item.truth))}</figcaption></figure>"
        )
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Answers</title>\n<style>'
        "body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 76em; }"
        "td, th { padding: .1em 1em .1em 0; text-align: left; }"
        ".pictures { display: flex; flex-wrap: wrap; gap: 1.5em; } figure { margin: 0; }"
        "img { width: 160px; } figcaption { max-width: 160px; }"
        f"</style>\n<h1>Answers</h1>\n<pre>{text}</pre>\n<h2>Confusions</h2>\n<table><tr><th>truth"
        f"</th><th>answer</th><th>times</th></tr>{rows}</table>\n<h2>Pictures</h2>\n"
        f'<div class="pictures">{"".join(shown)}</div>\n</html>\n'
    )


def run(
    place: str,
    data: str,
    out: str,
    group: Processes,
    *,
    overwrite: bool = False,
    pictures: int = 24,
    images: str | None = None,
    **options: Any,
) -> Path | None:
    """Evaluate, print the table, and write answers.jsonl, answers.html and metrics.json.

    Args:
        options: of :func:`evaluate`.

    Returns:
        The path of metrics.json; None on every process but the first.

    Raises:
        OutputError: one of the files is there, and ``overwrite`` is false.
    """
    target = Outputs(Path(out), overwrite)
    with group.together():
        if group.first:
            target.claim(FILES)
    result = evaluate(place, data, group, images=images, **options)
    if not group.first:
        return None
    print(as_table(result.report), flush=True)
    folder = Path(data).parent if images is None else Path(images)
    lines = [
        {**item._asdict(), "answer": answer, "right": answer == item.truth}
        for item, answer in zip(result.items, result.answers, strict=True)
    ]
    with target.together():
        target.write("answers.jsonl", b"".join(json_text(line) + b"\n" for line in lines))
        target.write("answers.html", as_page(result, folder, pictures).encode())
        written = target.write_json("metrics.json", json.loads(json.dumps(result.report)))
    print(f"written into {out}", flush=True)
    return written
