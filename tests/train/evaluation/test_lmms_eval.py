"""lmms-eval's own model class runs a saved folder as it is: the answers are ours."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from tokenflow_ext.models.understanding.lmms_eval import manifests
from tokenflow_ext.train import understanding
from tokenflow_ext.train.engine import checkpoint
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.evaluation import understanding as evaluation

TASK = """\
task: local_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_messages: !function utils.doc_to_messages
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8}}
process_results: !function utils.process
metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 0}}
"""
FUNCTIONS = """\
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def doc_to_text(doc, settings=None):
    return doc["question"]

def doc_to_messages(doc, settings=None):
    picture = {"type": "image", "url": doc_to_visual(doc)[0]}
    return [{"role": "user", "content": [picture, {"type": "text", "text": doc["question"]}]}]

def process(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""


def test_the_entry_point_is_found_and_adds_no_model_of_its_own() -> None:
    found = [x for x in entry_points(group="lmms_eval.models") if x.name == "tokenflow_ext"]
    assert found[0].load() is manifests
    assert manifests() == ()


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="needs lmms-eval")
def test_llava_hf_answers_as_we_do(micro, image_tokenizer, questions, tmp_path) -> None:
    run = tmp_path / "run"
    more = ("optim.steps=60", "optim.lr=3e-3", "optim.batch=13", "output.checkpoint_every=60")
    understanding.main(micro.understanding_overrides(run, image_tokenizer, questions, *more))
    ours = evaluation.evaluate(str(run), str(questions), Processes(0, 1, torch.device("cpu")))
    lines = [
        {
            "image": str(questions.parent / item.pictures[0]),
            "question": item.question.replace("<image>\n", ""),
            "answer": answer,  # what we answer, right or not
        }
        for item, answer in zip(ours.items, ours.answers, strict=True)
        if item.pictures and not item.before and answer
    ]
    task = tmp_path / "task"
    task.mkdir()
    (task / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (task / "local.yaml").write_text(TASK.format(data=task / "data.jsonl"))
    (task / "utils.py").write_text(FUNCTIONS)
    model = f"pretrained={checkpoint.find(str(run))},device_map=cpu"
    command = ["--model", "llava_hf", "--model_args", model, "--tasks", "local_questions"]
    command += ["--include_path", str(task), "--batch_size", "1", "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    # First, for machines where torchvision's own operators do not load.
    start = "import runpy, tokenflow_ext.models; runpy.run_module('lmms_eval', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", start, *command],
        env=environment,
        capture_output=True,
        text=True,
    )
    found = list(Path(tmp_path, "out").rglob("*results.json"))
    assert found, done.stdout + done.stderr
    results = json.loads(found[0].read_text())["results"]["local_questions"]
    assert len(lines) > 5
    assert results["exact,none"] == 1.0
