"""What the tests of training share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tokenflow_ext.models import TokenFlowTokenizer
from tokenflow_ext.train.tasks import language


def _load_micro() -> ModuleType:
    # By its path: a package named after this folder would hide the sources' own "train".
    path = Path(__file__).with_name("micro.py")
    spec = importlib.util.spec_from_file_location("training_micro", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_micro"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def micro() -> ModuleType:
    """The helpers of micro.py."""
    return _load_micro()


@pytest.fixture(scope="session")
def images(micro: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three small pictures."""
    return micro.draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def pairs(micro: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve pictures with captions."""
    return micro.draw_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def classes(micro: ModuleType, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures in two folders of classes."""
    return micro.sort_into_classes(pairs, tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="session")
def questions(micro: ModuleType, pairs: Path, tmp_path_factory) -> Path:
    """A file of thirteen conversations about those pictures, which lie beside it."""
    return micro.ask_about(pairs, tmp_path_factory.mktemp("questions") / "questions.json")


@pytest.fixture(scope="session")
def image_tokenizer(micro: ModuleType, images: Path, tmp_path_factory) -> Path:
    """A saved image tokenizer."""
    return micro.save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "saved", images)


@pytest.fixture
def released(tmp_path, monkeypatch) -> Callable[[Path], tuple[Path, list]]:
    """released(folder): a file that is read as the tokenizer in the folder is, and a list of every
    path and resolution that the reader is asked for."""

    def build(folder: Path) -> tuple[Path, list]:
        file = tmp_path / "released.pt"
        file.write_bytes(b"the reader below does not look at it")
        asked = []
        plain = TokenFlowTokenizer.from_pretrained

        def read(path, resolution=None):
            asked.append((path, resolution))
            return plain(folder)

        monkeypatch.setattr(TokenFlowTokenizer, "from_pretrained", read)
        return file, asked

    return build


@pytest.fixture
def backbone(tmp_path) -> Path:
    """A tiny language model as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = language.make_text_tokenizer(["A red disc."] * 3, 280)
    torch.manual_seed(3)
    shape = LlamaConfig(
        vocab_size=len(text),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    folder = tmp_path / "language"
    LlamaForCausalLM(shape).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tests run beside other work; threads that wait for each other would slow both."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
