"""The hub: what is pushed comes back bit for bit, what is not there is said in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import pytest
import tiny_models
import torch
import var_models
from safetensors.torch import load_file, save_file

from tokenflow_ext.models import VAR, CheckpointError, ConfigError, TextToImage, TokenFlowTokenizer
from tokenflow_ext.models.serialization.files import OutputError
from tokenflow_ext.models.serialization.hub import is_hub_id


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_server.serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.image_tokenizer().eval()


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    return tokenizer.save_pretrained(tmp_path_factory.mktemp("saved") / "tokenizer")


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def load(repo, cache, kind=TokenFlowTokenizer, **options):
    return kind.from_pretrained(repo, cache_dir=cache, **options)


def refused(message, repo, cache, kind=TokenFlowTokenizer, error=CheckpointError, **options):
    with pytest.raises(error, match=message) as caught:
        load(repo, cache, kind, **options)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ there and back


def test_a_tokenizer_there_and_back(hub, cache, tokenizer):
    made = tokenizer.push_to_hub(
        "some/tokenizer",
        token="hf_writer",
        license="mit",
        metrics={"rFID | ImageNet": 1.5},
        private=True,
        commit_message="first",
    )
    repository = hub.repositories["some/tokenizer"]
    assert repository.private
    assert repository.messages == ["first"]  # one commit
    assert made.oid == repository.branches["main"]
    assert same(load("some/tokenizer", cache, token="hf_reader"), tokenizer)
    asked = [token for _, path, token in hub.asked if "some/" in path]
    assert set(asked) == {"hf_reader", "hf_writer"}
    card = repository.commits[made.oid]["README.md"].decode()
    head, _, text = card.removeprefix("---\n").partition("---\n")
    assert "license: mit" in head
    assert "library_name: tokenflow_ext" in head
    assert r"| rFID \| ImageNet | 1.5 |" in text
    assert "| quantizer.scales | 1, 2, 3, 4 |" in text
    assert "## Licence\n\n`mit`" in text
    program = text.partition("```py\n")[2].partition("```")[0]
    program = program.replace(
        'tokenizer")', f'tokenizer", cache_dir={str(cache)!r}, token="hf_reader")'
    )
    space = {"images": torch.rand(1, 3, 16, 16) * 2 - 1}
    exec(program, space)
    assert torch.equal(space["indices"], tokenizer.encode(space["images"]))


def test_generators_there_and_back(hub, cache, tokenizer):
    drawing = tiny_models.build(dtype=torch.float32, tokenizer=tokenizer)
    classes = var_models.build(dtype=torch.float16)
    for name, model in (("drawing", drawing), ("classes", classes)):
        model.push_to_hub(f"some/{name}", token="hf_writer")
        again = load(f"some/{name}", cache, type(model))
        assert same(again, model)
        assert same(again.tokenizer, model.tokenizer)
        card = hub.repositories[f"some/{name}"].commits
        card = next(reversed(card.values()))["README.md"].decode()
        assert "None is given" in card
        assert "license" not in card.partition("\n---")[0]
    # Of a model that comes with a tokenizer, the saved one is not fetched.
    hub.asked.clear()
    assert same(load("some/drawing", cache / "two", TextToImage, tokenizer=tokenizer), drawing)
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors"]


def test_a_branch_and_a_pull_request(hub, cache, tokenizer):
    other = tiny_models.image_tokenizer(seed=5)
    tokenizer.push_to_hub("some/tokenizer", token="hf_writer")
    first = hub.repositories["some/tokenizer"].branches["main"]
    other.push_to_hub("some/tokenizer", token="hf_writer", revision="next")
    made = tokenizer.push_to_hub(
        "some/tokenizer", token="hf_writer", create_pr=True, metrics={"a": 1}
    )
    assert made.pr_url == f"{hub.url}/some/tokenizer/discussions/1"
    assert hub.repositories["some/tokenizer"].branches["main"] == first
    other.push_to_hub("some/tokenizer", token="hf_writer")
    assert same(load("some/tokenizer", cache), other)
    assert same(load("some/tokenizer", cache, revision="next"), other)
    assert same(load("some/tokenizer", cache, revision=first), tokenizer)
    refused("no revision gone", "some/tokenizer", cache, revision="gone")


def test_nothing_is_written_over_what_is_not_ours(hub, cache, tokenizer, tmp_path, capsys):
    var_models.build(torch.float32).push_to_hub("some/var", token="hf_writer")
    with pytest.raises(OutputError, match=r"some/var holds another model \(config.json\)"):
        tokenizer.push_to_hub("some/var", token="hf_writer")
    hub.repository("some/weights").commit({"model.safetensors": b"theirs"})
    with pytest.raises(OutputError, match=r"holds another model \(model.safetensors\)"):
        tokenizer.push_to_hub("some/weights", token="hf_writer")
    assert len(hub.repositories["some/var"].commits) == 2
    repository = hub.repository("some/card")
    repository.commit({"README.md": b"mine"})
    tokenizer.push_to_hub("some/card", token="hf_writer")
    assert "left README.md of some/card" in capsys.readouterr().out
    assert repository.commits[repository.branches["main"]]["README.md"] == b"mine"
    tokenizer.push_to_hub("some/card", token="hf_writer", overwrite_card=True)
    tokenizer.push_to_hub("some/card", token="hf_writer", license="mit")  # its own
    assert capsys.readouterr().out == ""
    assert b"license: mit" in repository.commits[repository.branches["main"]]["README.md"]


def test_what_another_person_commits_meanwhile_is_not_written_over(hub, tokenizer):
    repository = hub.repository("some/tokenizer")
    hub.meanwhile = lambda: repository.commit({"README.md": b"mine", "config.json": b"mine"})
    with pytest.raises(OutputError, match=r"cannot write to the repository some/tok.*412"):
        tokenizer.push_to_hub("some/tokenizer", token="hf_writer")
    assert repository.commits[repository.branches["main"]]["config.json"] == b"mine"


def test_who_may_not_write(hub, tokenizer):
    hub.repository("some/tokenizer")
    for token in ("hf_reader", False):
        with pytest.raises(
            OutputError, match=r"cannot write to the repository some/tokenizer: .*40"
        ):
            tokenizer.push_to_hub("some/tokenizer", token=token)
    with pytest.raises(ConfigError, match="repo_id must be ORGANISATION/NAME"):
        tokenizer.push_to_hub("tokenizer", token="hf_writer")


# ------------------------------------------------------------------------------ the cache


def test_the_second_load_downloads_nothing(hub, cache, tokenizer, saved):
    hub.repository("some/tokenizer", saved).commit({"notes.txt": b"no", "other.bin": b"no"})
    load("some/tokenizer", cache)
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors"]
    hub.asked.clear()
    assert same(load("some/tokenizer", cache), tokenizer)
    assert hub.downloads() == []
    hub.asked.clear()
    assert same(load("some/tokenizer", cache, local_files_only=True), tokenizer)
    assert hub.asked == []
    refused(
        "nothing at some/other on the disk, and the cache .* has not all .*local_files_only",
        "some/other",
        cache,
        local_files_only=True,
    )


def test_a_server_that_is_gone(cache, tokenizer, saved, monkeypatch):
    with hub_server.serve() as hub:
        hub.repository("some/tokenizer", saved)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        load("some/tokenizer", cache)
    assert same(load("some/tokenizer", cache), tokenizer)
    refused(f"{hub.url} cannot be reached.*Put the files into a folder", "some/other", cache)
    with pytest.raises(OutputError, match="cannot write to the repository some/tokenizer"):
        tokenizer.push_to_hub("some/tokenizer", token="hf_writer")


def test_a_server_that_says_nothing(hub, cache, tokenizer, saved, monkeypatch):
    """It is not waited for, and what is in the cache does."""
    hub.repository("some/tokenizer", saved)
    load("some/tokenizer", cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.5)
    hub.silent.clear()
    start = time.monotonic()
    assert same(load("some/tokenizer", cache), tokenizer)
    refused("cannot be reached .*timed out.*Put the files into a folder", "some/other", cache)
    with pytest.raises(OutputError, match=r"cannot write to the repository some/t.*timed out"):
        tokenizer.push_to_hub("some/tokenizer", token="hf_writer")
    assert time.monotonic() - start < 20


def test_half_of_a_model_in_the_cache(cache, saved, monkeypatch):
    with hub_server.serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.repository("some/tokenizer", saved)
        refused("is no saved VAR's", "some/tokenizer", cache, VAR)  # of its header alone
        message = "the cache .* has not all that is read of the repository some/tokenizer; "
        refused(message + "local_files_only", "some/tokenizer", cache, local_files_only=True)
    refused(message + f"{hub.url} cannot be reached", "some/tokenizer", cache)


def test_a_server_in_trouble_and_half_a_file(hub, cache, saved):
    hub.repository("some/tokenizer", saved)
    hub.status = 500
    refused(f"{hub.url} cannot be reached.*500", "some/tokenizer", cache)
    hub.status = 0
    hub.broken.add("model.safetensors")
    refused("the repository some/tokenizer cannot be fetched", "some/tokenizer", cache)
    hub.broken.clear()
    load("some/tokenizer", cache)


# ------------------------------------------------------------------------------ which file


def test_files_of_weights(hub, cache, tokenizer):
    state = var_models.var_tokenizer().state_dict()
    repository = hub.repository("some/files")
    refused(
        "has neither config.json nor a file of weights .*; it has .gitattributes",
        "some/files",
        cache,
    )
    repository.commit({"weights/one.pt": torch_bytes({"model": state})})
    repository.commit({"README.md": b"text"})
    refused("some/files/weights|one.pt", "some/files", cache, error=(CheckpointError, ValueError))
    assert hub.downloads().count("weights/one.pt") == 1
    repository.commit({"two[1].pth": torch_bytes({"x": torch.zeros(1)})})
    refused(
        r"has 2 files of weights: say which by filename, one of two\[1\].pth, weights/one.pt",
        "some/files",
        cache,
    )
    refused(r"no original tokenizer.*its names are x", "some/files", cache, filename="two[1].pth")
    refused("has no file three.pt; it has .*README.md", "some/files", cache, filename="three.pt")
    refused("filename must name a file", "some/files", cache, error=ConfigError, filename="../x")
    refused(
        "has not README.md of the repository some/files; local_files_only",
        "some/files",
        cache,
        filename="README.md",
        local_files_only=True,
    )


def torch_bytes(content):
    import io

    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def test_one_form_of_the_weights_is_fetched(hub, cache, tokenizer, saved):
    """The one that is read."""
    repository = hub.repository("some/forms", saved)
    others = ("pytorch_model.bin", "model-00001-of-00002.safetensors", "tf_model.h5", "other.pt")
    repository.commit(dict.fromkeys((*others, "model.safetensors.index.json"), b"no"))
    assert same(load("some/forms", cache), tokenizer)
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors"]
    assert same(load("some/forms", cache, local_files_only=True), tokenizer)


def test_names_that_lead_out_of_the_repository(hub, cache, saved, tmp_path):
    hub.repository("some/file").commit({"../../../out.pt": b"x"})
    refused(r"has a file '../../../out.pt', which is not below it", "some/file", cache)
    index = json.dumps({"weight_map": {"a": "../../../../out.safetensors"}}).encode()
    header = (saved / "config.json").read_bytes()
    hub.repository("some/index").commit(
        {"model.safetensors.index.json": index, "config.json": header}
    )
    refused(r"names '../../../../out.safetensors', which is not below", "some/index", cache)
    hub.repository("some/alone").commit({"w.safetensors.index.json": index})
    options = {"filename": "w.safetensors.index.json"}
    refused(r"names '../../../../out.safetensors', which is not", "some/alone", cache, **options)
    assert not [*tmp_path.rglob("out.*")]
    assert not [name for name in hub.downloads() if "out" in name]


def test_released_var_by_filename(hub, cache, tmp_path):
    model = var_models.build(torch.float16)
    model.save_released(tmp_path / "var_d2.pth")
    model.tokenizer.save_original(tmp_path / "vae.pth")
    hub.repository("some/var", tmp_path)
    beside = var_models.var_tokenizer()
    again = load("some/var", cache, VAR, tokenizer=beside, filename="var_d2.pth")
    assert same(again, model)
    released = VAR.from_released("some/var", beside, filename="var_d2.pth", cache_dir=cache)
    assert same(released, model)
    refused("tokenizer is missing", "some/var", cache, VAR, ConfigError, filename="var_d2.pth")
    config = beside.config
    found = load("some/var", cache, filename="vae.pth", config=config)
    assert same(found, beside)


def test_sharded_and_half(hub, cache, tokenizer, saved, tmp_path):
    """An index brings its files, and those alone."""
    from huggingface_hub import save_torch_state_dict

    state = load_file(saved / "model.safetensors")
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    wrapped = {f"module._orig_mod.{key}": value for key, value in half.items()}
    save_torch_state_dict(wrapped, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    repository = hub.repository("some/sharded", tmp_path)
    repository.commit({"config.json": (saved / "config.json").read_bytes(), "other.bin": b"no"})
    found = load("some/sharded", cache)
    expected = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    own = found.state_dict()
    assert all(
        torch.equal(own[k], v) and own[k].dtype == state[k].dtype for k, v in expected.items()
    )
    assert "other.bin" not in hub.downloads()


def test_original_text_to_image(hub, cache, tmp_path, tokenizer):
    state, config = tiny_models.tiny_original()
    (tmp_path / "sub").mkdir()
    save_file(state, tmp_path / "sub" / "w.safetensors")
    header = config.to_dict() | {"model_type": "llava_llama"}
    (tmp_path / "sub" / "config.json").write_text(json.dumps(header))
    hub.repository("some/original", tmp_path)
    options = {"filename": "sub/w.safetensors", "cache_dir": cache}
    one = TextToImage.from_original("some/original", None, tokenizer, **options)
    two = TextToImage.from_pretrained("some/original", tokenizer, **options)
    assert torch.equal(one.state_dict()["lm_head.weight"], state["lm_head.weight"])
    assert same(one, two)
    # A folder of transformers at the repository's top.
    (tmp_path / "sub" / "w.safetensors").rename(tmp_path / "sub" / "model.safetensors")
    hub.repository("some/folder", tmp_path / "sub")
    assert same(load("some/folder", cache, TextToImage, tokenizer=tokenizer), one)
    refused("is no saved text-to-image", "some/folder", cache, TextToImage)


# ------------------------------------------------------------------------------ refusals


def test_another_kind_of_model_is_refused_before_its_weights_come(hub, cache, saved):
    hub.repository("some/tokenizer", saved)
    refused("config.json is no saved VAR's", "some/tokenizer", cache, VAR)
    refused("is no saved text-to-image model's", "some/tokenizer", cache, TextToImage)
    assert hub.downloads() == ["config.json"]


def test_private_and_gated(hub, cache, tokenizer, saved):
    hub.repository("some/private", saved, private=True)
    hub.repository("some/gated", saved, gated=True)
    refused(
        "no such repository, or a private one .*give the token", "some/private", cache, token=False
    )
    refused("private one .*the token that was given", "some/private", cache, token="hf_other")
    refused("some/gated is gated: ask for access", "some/gated", cache, token=False)
    refused("is gated: .*token that was given does not do", "some/gated", cache, token="hf_other")
    for name in ("some/private", "some/gated"):
        assert same(load(name, cache, token="hf_reader"), tokenizer)
    refused("some/gone on the disk, and http.* has no such repository", "some/gone", cache)


def test_the_disk_comes_first(hub, cache, tokenizer, saved, monkeypatch, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "tokenizer").symlink_to(saved)
    monkeypatch.chdir(tmp_path)
    assert same(TokenFlowTokenizer.from_pretrained("some/tokenizer"), tokenizer)
    for options in ({"revision": "x"}, {"token": "hf_x"}, {"local_files_only": True}):
        with pytest.raises(
            ConfigError, match=f"{next(iter(options))} is for models on the hub, not"
        ):
            TokenFlowTokenizer.from_pretrained("some/tokenizer", **options)
    with pytest.raises(ConfigError, match="which is no hub id"):
        TokenFlowTokenizer.from_pretrained("weights.pt", filename="x")
    with pytest.raises(
        ConfigError, match="revision is for models on the hub, not for a state dict"
    ):
        VAR.from_released({}, tokenizer, revision="x")
    assert hub.asked == []


def test_what_is_a_hub_id():
    for name in ("ByteFlow-AI/TokenFlow", "a/b", "foo.bar/b_c-1.5"):
        assert is_hub_id(name)
    for name in (
        *("a", "/a/b", "a/b/c", "./a", "../a", "a/", "runs/model.pt", "a/b.safetensors", ""),
        *("a/b--c", "a/-b", "a b/c", "a/..", f"a/{'b' * 96}", Path("a/b"), "s3://a/b"),
    ):
        assert not is_hub_id(name), name


# ------------------------------------------------------------------------------ other processes

LARGE = """
import sys, torch, tiny_models
model = tiny_models.image_tokenizer()
model.push_to_hub("some/large", token="hf_writer")
again = type(model).from_pretrained("some/large")
assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
"""
UNDERSTANDING = """
import sys
from pathlib import Path
import pytest, torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from tokenflow_ext.errors import ConfigError, OutputError
from tokenflow_ext.models import TokenFlowTokenizer, push_understanding
from understanding_models import picture, understanding

def same(model):
    again = LlavaForConditionalGeneration.from_pretrained("some/answers").state_dict()
    return all(torch.equal(v, again[k]) for k, v in model.state_dict().items())

def card():
    from huggingface_hub import ModelCard
    return ModelCard.load("some/answers")

model, processor = understanding()
push = {"token": "hf_writer", "license": "apache-2.0"}
push_understanding(model, processor, "some/answers", metrics={"POPE": 84.5}, **push)
assert same(model)
made = card()
assert made.data.license == "apache-2.0" and made.data.pipeline_tag == "image-text-to-text"
assert made.data.tags == ["tokenflow_ext", "image-text-to-text"]
for line in ("POPE | 84.5", "text_config.hidden_size | 32", "vision_config.features | last"):
    assert f"| {line} |" in made.text, made.text
program = made.text.partition("```py\\n")[2].partition("```")[0]
space = {"photo": picture()}
exec(program.replace("print(", "said = str("), space)
assert space["said"] == processor.decode(
    model.generate(**space["inputs"], max_new_tokens=64)[0, space["inputs"]["input_ids"].shape[1]:],
    skip_special_tokens=True,
)
# In several files, and in one again: what is left of those before is not read.
for size in ("40KB", "5GB"):
    model.lm_head.weight.data.add_(1)
    push_understanding(model, processor, "some/answers", max_shard_size=size, **push)
    assert same(model)
with pytest.raises(OutputError, match="some/answers holds another model"):
    model.model.vision_tower.tokenizer.push_to_hub("some/answers", token="hf_writer")
model.model.vision_tower.tokenizer.push_to_hub("some/tokenizer", token="hf_writer")
with pytest.raises(OutputError, match="some/tokenizer holds another model"):
    push_understanding(model, processor, "some/tokenizer", **push)
# transformers' own way.
model.push_to_hub("some/own", token="hf_writer")
processor.push_to_hub("some/own", token="hf_writer")
assert type(AutoProcessor.from_pretrained("some/own")) is type(processor)
model.model.vision_tower = torch.nn.Identity()
with pytest.raises(ConfigError, match="must be a TokenFlowVisionModel, got Identity"):
    push_understanding(model, processor, "some/answers")
"""


@pytest.mark.parametrize("program", [LARGE, UNDERSTANDING], ids=["large files", "understanding"])
def test_uploads_of_large_files(hub, tmp_path, program):
    """Over LFS, which huggingface_hub takes where xet is off: it looks when it is imported."""
    hub.lfs = True
    changes = {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    places = [str(Path(__file__).parents[2]), *sys.path]
    environment = {**os.environ, **changes, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert hub.objects
    if program is UNDERSTANDING:
        assert "removed model.safetensors of an earlier model from some/answers" in done.stdout
        assert "removed model-00001-of-000" in done.stdout
