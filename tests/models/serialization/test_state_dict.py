"""State dicts: every form is read to the same tensors, differences are named, nothing is drawn."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import image_tokenizer
from torch import nn

from tokenflow_ext.models import CheckpointError, TokenFlowTokenizer, WeightsError
from tokenflow_ext.models.serialization.state_dict import (
    CONTAINERS,
    compare,
    listed,
    no_random_init,
    plain_names,
    read_state_dict,
    weights_file,
)


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(i + 1, 3, generator=generator) for i in range(4)}


def folder_of(path: Path, suffix: str, index: bool) -> Path:
    name, save = {
        "safetensors": ("model.safetensors", save_file),
        "bin": ("pytorch_model.bin", torch.save),
    }[suffix]
    path.mkdir()
    if not index:
        save(state(), path / name)
        return path
    files = {key: f"part-{i % 2}.{suffix}" for i, key in enumerate(state())}
    for file in set(files.values()):
        save({k: v for k, v in state().items() if files[k] == file}, path / file)
    (path / f"{name}.index.json").write_text(json.dumps({"weight_map": files}))
    return path


def forms(tmp_path: Path) -> dict[str, Path]:
    made = {}
    for container in (None, *CONTAINERS):
        file = made[f"torch, {container}"] = tmp_path / f"{container}.pt"
        args = argparse.Namespace(lr=1.0)
        torch.save(state() if container is None else {container: state(), "args": args}, file)
    prefixed = made["DistributedDataParallel"] = tmp_path / "ddp.pt"
    torch.save({f"module.{key}": value for key, value in state().items()}, prefixed)
    save_file(state(), made.setdefault("safetensors", tmp_path / "one.safetensors"))
    for suffix in ("safetensors", "bin"):
        for index in (False, True):
            folder = tmp_path / f"{suffix}-{index}"
            made[folder.name] = folder_of(folder, suffix, index)
    return made


def test_every_form_is_the_same_tensors(tmp_path):
    for name, path in forms(tmp_path).items():
        found = read_state_dict(path)
        assert found.keys() == state().keys(), name
        assert all(torch.equal(found[key], value) for key, value in state().items()), name


def test_shapes_are_seen_before_tensors_are_read(tmp_path):
    expected = {key: tuple(value.shape) for key, value in state().items()}
    for name, path in forms(tmp_path).items():

        def check(shapes):
            assert shapes == expected, name  # noqa: B023
            raise CheckpointError("too large")

        with pytest.raises(CheckpointError, match=r"^too large$"):
            read_state_dict(path, check=check)


WRAPPED = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.")


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("suffix", ["pt", "safetensors", "folder"])
def test_what_wrappers_put_into_names_is_taken_out(tmp_path, prefix, suffix):
    wrapped = {prefix + key: value for key, value in state().items()}
    path = tmp_path / f"a.{suffix}"
    if suffix == "pt":
        torch.save({"ema": wrapped}, path)
    elif suffix == "safetensors":
        save_file(wrapped, path)
    else:
        path.mkdir()
        save_torch_state_dict(wrapped, path, max_shard_size=40)
        assert len(list(path.glob("*.safetensors"))) > 1
    found = read_state_dict(path)
    assert found.keys() == state().keys()
    assert all(torch.equal(found[key], value) for key, value in state().items())


def test_names_of_wrapped_parts_and_those_that_become_one():
    names = ["a._orig_mod.b", "module.c", "a._orig_mod._orig_mod.d"]
    assert plain_names(names, "x") == dict(zip(names, ["a.b", "module.c", "a.d"], strict=True))
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    own = list(network.state_dict())
    network[1] = torch.compile(network[1])
    wrapped = torch.compile(nn.DataParallel(network)).state_dict()
    assert list(plain_names(wrapped, "x").values()) == own
    with pytest.raises(CheckpointError, match=r"^x has a\.b and a\._orig_mod\.b, which are both a"):
        plain_names(["a.b", "a._orig_mod.b"], "x")


def test_an_index_is_read_as_a_file_of_its_own(tmp_path):
    folder = folder_of(tmp_path / "one", "bin", True)
    found = read_state_dict(folder / "pytorch_model.bin.index.json")
    assert found.keys() == state().keys()
    save_file(state(), folder / "model.safetensors")  # what save_pretrained writes is read first
    assert weights_file(folder).name == "model.safetensors"


def test_an_index_that_disagrees_with_its_files(tmp_path):
    folder = folder_of(tmp_path / "one", "safetensors", True)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    first = next(iter(good))
    for changed, message in (
        ({k: v for k, v in good.items() if k != first}, f"does not say that .* has {first}"),
        (good | {"more": "part-0.safetensors"}, "has more, which it has not"),
        (good | {first: "../part-0.safetensors"}, "is not below"),
        ({first: "part-7.safetensors"}, "part-7.safetensors is missing"),
        (good | {first: 3}, "must name files"),
        (None, "must have a weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(CheckpointError, match=message):
            read_state_dict(folder)


def test_what_is_no_state_dict_says_so_in_the_error_asked_for(tmp_path):
    (tmp_path / "empty").mkdir()
    torch.save({"step": 1}, tmp_path / "other.pt")
    (tmp_path / "text.safetensors").write_text("no")
    index = folder_of(tmp_path / "gone", "bin", True)
    (index / "part-1.bin").unlink()
    for name, message in (
        ("empty", "holds neither model.safetensors nor pytorch_model.bin"),
        ("other.pt", "no plain state dict of tensors.* at its top it has step"),
        ("text.safetensors", "truncated or no safetensors file"),
        ("gone", "part-1.bin is missing"),
        ("nothing.pt", "nothing.pt is missing"),
    ):
        for error in (CheckpointError, WeightsError):
            with pytest.raises(error, match=message):
                read_state_dict(tmp_path / name, error)


names = st.sampled_from([f"w{i}" for i in range(14)])
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
kinds = st.sampled_from([torch.float32, torch.float16])


@settings(deadline=None)
@given(
    st.dictionaries(names, st.tuples(shapes, kinds)),
    st.dictionaries(names, st.tuples(shapes, kinds)),
    st.dictionaries(names, shapes),
    st.booleans(),
)
def test_differences_are_those_of_the_sets(found, wanted, unused, dtypes):
    make = lambda d: {k: torch.empty(s, dtype=t) for k, (s, t) in d.items()}  # noqa: E731
    difference = compare(make(found), make(wanted), unused, dtypes=dtypes)
    assert set(difference.missing) == wanted.keys() - found.keys()
    assert set(difference.unknown) == found.keys() - wanted.keys() - unused.keys()
    like = {key: (shape, torch.float32) for key, shape in unused.items()} | wanted
    other = {
        key
        for key in found.keys() & like.keys()
        if found[key][0] != like[key][0] or (dtypes and found[key][1] != like[key][1])
    }
    assert {sentence.partition(" ")[0] for sentence in difference.other} == other
    assert bool(difference) == bool(difference.missing or difference.unknown or difference.other)
    for count, what in ((len(difference.missing), "missing"), (len(other), "of another shape")):
        assert (f"{count} {what}" in str(difference)) == bool(count)


def test_shapes_alone_can_be_compared():
    wanted = {"a": torch.empty(2, 3, dtype=torch.float16)}
    assert not compare({"a": (2, 3)}, wanted)
    assert str(compare({"a": (3, 2)}, wanted)) == (
        "1 of another shape or type (a is (3, 2), not (2, 3))"
    )


def test_long_lists_are_cut():
    assert listed(str(i) for i in range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed(str(i) for i in range(10)) == "0, 1, 2, 3, 4, 5, 6, 7, and 2 more"


def test_nothing_is_drawn():
    """Every initialisation of torch leaves the generator as it was, and ends."""
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with no_random_init():
        layers = [nn.Linear(3, 4), nn.Embedding(5, 2), nn.Conv2d(3, 4, 3), nn.LayerNorm(4)]
        weight = torch.randn(6, 6, generator=torch.Generator()) + torch.rand_like(torch.ones(6, 6))
        assert not weight.any()
        for init in (
            nn.init.trunc_normal_,
            nn.init.xavier_uniform_,
            nn.init.xavier_normal_,
            nn.init.kaiming_normal_,
            nn.init.kaiming_uniform_,
            nn.init.normal_,
            nn.init.uniform_,
        ):
            init(weight)
        nn.init.trunc_normal_(weight, 0.0, 1.0, 3.0, 4.0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(layers[3].weight, torch.ones(4))  # constants are set
    assert not torch.equal(nn.Linear(3, 4).weight, torch.zeros(4, 3))  # and outside all is as ever


def test_a_loaded_tokenizer_draws_nothing(tmp_path):
    model = image_tokenizer().eval()
    model.save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    loaded = TokenFlowTokenizer.from_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    images = torch.rand(1, 3, model.config.image_size, model.config.image_size) * 2 - 1
    assert torch.equal(loaded.encode(images), model.encode(images))
