"""VAR against its released algorithm: both give the same, and the table says so."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import var, var_released
from tokenflow_ext.sampler import SamplingConfig


@pytest.fixture(scope="module")
def model():
    return var.build(1, "cpu")


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_greedy_tokens_agree(model, guidance):
    labels = torch.tensor([3, 999])
    likeliest = SamplingConfig(top_k=(1,), top_p=(0.0,), guidance=guidance)
    ours = model.eval().generate_tokens(labels, sampling=likeliest, seed=0)
    theirs = var_released.generate_tokens(model, labels, guidance, var_released.greedy)
    assert (ours != theirs).float().mean() < 0.02  # a near tie changes what comes after it


def test_losses_and_gradients_agree(model):
    tokens = torch.randint(4096, (2, 680), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2])
    model.train()
    gradients = []
    for loss in (
        model(labels, tokens).loss,
        var_released.training_loss(model, labels, tokens),
        var_released.training_loss(model, labels, tokens, fused=False),
    ):
        model.zero_grad()
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, value in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_by_scale_agrees(model, fused):
    row = var.attention(model, 1, 1, fused)
    assert float(row["agreement"].split()[-3]) < 1e-4
    assert row["ratio"] > 0


def test_sampling_keeps_what_the_filters_keep():
    logits = torch.log(torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])).repeat(1, 4000, 1)
    generator = torch.Generator().manual_seed(0)
    by_k = var_released.sample(2, 0.0, generator)(logits)
    assert by_k.unique().tolist() == [0, 1]
    assert (by_k == 0).float().mean().item() == pytest.approx(0.5 / 0.8, abs=0.03)
    by_p = var_released.sample(0, 0.85, generator)(logits)
    assert by_p.unique().tolist() == [0, 1, 2]


@pytest.mark.once
def test_the_table(tmp_path, capsys):
    var.main(["--parts", "quantizer", "--depth", "1", "--rounds", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["what"] for row in found["rows"]] == [
        "quantizer, batch 8, forward", "quantizer, batch 8, forward and backward",
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["agreement"].startswith("0 of 5440")
        assert row["ratio"] > 0
        assert row["memory"]["ours"] > 0
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


def test_bad_settings():
    for nothing in (["--rounds", "0"], ["--depth", "0"]):
        with pytest.raises(SystemExit):
            var.main(nothing)
