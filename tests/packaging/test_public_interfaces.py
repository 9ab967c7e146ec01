"""The package calls other libraries by their public interface alone, and swallows no arguments."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for folder in ("tokenflow_ext", "models", "train")
    for path in (ROOT / folder).rglob("*.py")
)
# What is imported of other libraries than torch and Python's own. Deeper modules are their inside,
# which changes between versions.
PUBLIC = {
    "braceexpand",
    "emoji",
    "fsspec",
    "gradio",
    "huggingface_hub",
    "lpips",
    "matplotlib",
    "matplotlib.figure",
    "numpy",
    "peft",
    "ray",
    "PIL",
    "PIL.Image",
    "PIL.PngImagePlugin",
    "safetensors",
    "skimage.color",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "sklearn.pipeline",
    "sklearn.preprocessing",
    "safetensors.torch",
    "timm",
    "tokenizers",
    "torch_fidelity",
    "torchvision",
    "torchvision.ops",
    "tqdm",
    "transformers",
    "transformers.modeling_outputs",
    "transformers.utils",  # its logging, as documented
    "upath",
    "webdataset",
    "webdataset.tariterators",  # of its reference
    "yaml",
}
OWN = ("tokenflow_ext",)


def private(name: str) -> bool:
    """A leading underscore; named tuples' methods have one so as not to be taken for fields."""
    special = name.startswith("__") and name.endswith("__")
    return name.startswith("_") and not special and name not in ("_asdict", "_fields", "_replace")


def chain(node: ast.expr) -> list[str]:
    """["torch", "optim", "Adam"] of torch.optim.Adam; empty where it does not start at a name."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [*names, node.id][::-1] if isinstance(node, ast.Name) else []


def defined(trees: list[ast.Module]) -> set[str]:
    """Every name that the package defines: functions, classes, variables, attributes, fields."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def faults(tree: ast.Module, own: set[str]) -> list[str]:
    """What a module takes of other libraries' insides, and the arguments that it swallows."""
    found = []
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
            if modules[0].partition(".")[0] not in OWN:
                found += [
                    f"{node.lineno}: from {node.module} import {alias.name}"
                    for alias in node.names
                    if private(alias.name)
                ]
        for module in modules:
            root = module.partition(".")[0]
            if root in OWN or root in sys.stdlib_module_names:
                continue
            inner = any(private(part) for part in module.split("."))
            if inner or (root != "torch" and module not in PUBLIC):
                found.append(f"{node.lineno}: import {module}")
        if isinstance(node, ast.Attribute) and private(node.attr):
            # "self.model._inner" reaches inside what is not ours; so does torch._anything.
            names = chain(node)
            if names[:1] == ["torch"] or node.attr not in own:
                found.append(f"{node.lineno}: .{node.attr}")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            swallowed = node.args.kwarg
            body = node.body if isinstance(node.body, list) else [node.body]
            read = {
                inner.id
                for statement in body
                for inner in ast.walk(statement)
                if isinstance(inner, ast.Name)
            }
            if swallowed is not None and swallowed.arg not in read:
                found.append(f"{node.lineno}: **{swallowed.arg} is ignored")
    return found


def test_the_package_takes_public_interfaces_alone() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    assert len(trees) > 30
    own = defined(list(trees.values()))
    found = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path, tree in trees.items()
        for fault in faults(tree, own)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import torch\ntorch._dynamo.reset()", 1),
        ("import torch._inductor.config as c", 1),
        ("from torch.utils._pytree import tree_map", 1),
        ("from torch.optim import _functional", 1),
        ("from transformers.models.llama.modeling_llama import apply_rotary_pos_emb", 1),
        ("from transformers.integrations.sdpa_attention import sdpa_attention_forward", 1),
        ("import timm.layers", 1),
        ("from open_clip import create_model", 1),
        ("def f(model):\n    return model._inner", 1),
        ("class A:\n    def f(self):\n        return self.model._inner", 1),
        ("def f(x, **_):\n    return x", 1),
        ("f = lambda x, **kwargs: x", 1),
        ("def f(x, **kwargs):\n    return x(**kwargs)", 0),
        ("import torch.nn.functional as F\nfrom torch.distributed.fsdp import FSDPModule", 0),
        ("class A:\n    def f(self):\n        self._x = 1\n        return self._x", 0),
        ("from tokenflow_ext._build import _check_torch", 0),
        ("def f(x):\n    return x.__class__", 0),
    ],
)
def test_the_reader_sees_such_faults(source: str, count: int) -> None:
    tree = ast.parse(source)
    assert len(faults(tree, defined([tree]))) == count
