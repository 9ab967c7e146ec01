"""VAR's released algorithm, re-derived from its description (arXiv 2404.02905) with plain torch
operators over our models' weights: what ours is compared with.

It doubles the batch for guidance at every scale, grows its cache by concatenation, computes every
adaptive norm's rows anew at each scale, trains with a mask of L x L, and samples by sorting.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenflow_ext.models import VAR
from tokenflow_ext.var import VarQuantizer

Draw = Callable[[Tensor], Tensor]
"""Logits [B, n, K] -> tokens [B, n]."""


def sample(top_k: int, top_p: float, generator: torch.Generator) -> Draw:
    """Top-k, then top-p by sorting, then a draw from the softmax."""

    def draw(logits: Tensor) -> Tensor:
        if top_k > 0:
            least = logits.topk(top_k, dim=-1)[0].amin(dim=-1, keepdim=True)
            logits = logits.masked_fill(logits < least, -math.inf)
        if top_p > 0:
            ascending, order = logits.sort(dim=-1)
            gone = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
            gone[..., -1:] = False
            logits = logits.masked_fill(gone.scatter(-1, order, gone), -math.inf)
        shape = logits.shape[:-1]
        chances = logits.softmax(dim=-1).flatten(0, -2)
        return torch.multinomial(chances, 1, generator=generator).view(shape)

    return draw


def greedy(logits: Tensor) -> Tensor:
    """The likeliest."""
    return logits.argmax(dim=-1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, fused: bool = True
) -> Tensor:
    """Attention [B, heads, L, channels of a head], with a mask that is added to the scores.

    Args:
        fused: by torch's fused operator; otherwise the matrix of scores is written out.
    """
    if fused:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1)
    scores = query @ key.transpose(-2, -1)
    return (scores if mask is None else scores.add(mask)).softmax(dim=-1) @ value


def causal_mask(model: VAR) -> Tensor:
    """[1, 1, L, L]: a place sees its own scale and the ones before."""
    level = model.lvl_1L[0]
    return torch.where(level[:, None] >= level[None, :], 0.0, -math.inf)[None, None]


class _Attention:
    """An attention of the model, with a cache that grows by concatenation or a mask.

    Args:
        fused: see `attend`.
    """

    def __init__(self, module: torch.nn.Module, fused: bool = True) -> None:
        self.module, self.fused = module, fused
        self.cached: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, mask: Tensor | None = None, caching: bool = False) -> Tensor:
        own = self.module
        bias = torch.cat((own.q_bias, own.zero_k_bias, own.v_bias))
        qkv = F.linear(x, own.mat_qkv.weight, bias).view(*x.shape[:2], 3, own.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = own.scale_mul_1H11.clamp_max(math.log(100)).exp()
        query = F.normalize(query, dim=-1).mul(scale)
        key = F.normalize(key, dim=-1)
        if caching:
            if self.cached is not None:
                key = torch.cat((self.cached[0], key), dim=2)
                value = torch.cat((self.cached[1], value), dim=2)
            self.cached = key, value
        out = attend(query, key, value, mask, self.fused)
        return own.proj(out.transpose(1, 2).reshape(x.shape))


def _block(
    block: torch.nn.Module, attend: _Attention, x: Tensor, condition: Tensor, **options: object
) -> Tensor:
    gamma1, gamma2, scale1, scale2, shift1, shift2 = (
        block.ada_lin(condition).view(-1, 1, 6, block.width).unbind(2)
    )
    normed = F.layer_norm(x, (block.width,), eps=block.eps)
    x = x + attend(normed.mul(scale1.add(1)).add(shift1), **options).mul(gamma1)
    normed = F.layer_norm(x, (block.width,), eps=block.eps)
    inner = F.gelu(block.ffn.fc1(normed.mul(scale2.add(1)).add(shift2)), approximate="tanh")
    return x + block.ffn.fc2(inner).mul(gamma2)


def _logits(model: VAR, hidden: Tensor, condition: Tensor) -> Tensor:
    scale, shift = model.head_nm.ada_lin(condition).view(-1, 1, 2, hidden.shape[2]).unbind(2)
    normed = F.layer_norm(hidden, hidden.shape[2:], eps=model.config.norm_eps)
    return model.head(normed.mul(scale.add(1)).add(shift))


def _phi(quantizer: VarQuantizer, scale: int, maps: Tensor) -> Tensor:
    """0.5 h + 0.5 conv(h), of the shared convolution whose tick is the nearest."""
    convolutions = quantizer.phis.qresi_ls
    share = scale / (len(quantizer.scales) - 1)
    count = len(convolutions)
    # In double precision: at ten scales the third lies between two ticks.
    ticks = np.linspace(1 / 3 / count, 1 - 1 / 3 / count, count)
    chosen = convolutions[int(np.abs(ticks - share).argmin())]
    convolved = F.conv2d(maps, chosen.weight, chosen.bias, padding=1)
    return maps.mul(0.5) + convolved.mul(0.5)


@torch.no_grad()
def generate_tokens(model: VAR, labels: Tensor, guidance: float, draw: Draw) -> Tensor:
    """Tokens [B, L] of classes [B]."""
    config, quantizer, count = model.config, model.tokenizer.quantizer, len(labels)
    table, side = quantizer.codebooks[0], config.scales[-1]
    condition = model.class_emb(torch.cat((labels, torch.full_like(labels, config.classes))))
    places = model.lvl_embed(model.lvl_1L) + model.pos_1LC
    x = condition.unsqueeze(1) + model.pos_start + places[:, :1]
    f_hat = x.new_zeros(count, config.feature_dim, side, side)
    attention = [_Attention(block.attn) for block in model.blocks]
    start, drawn = 0, []
    for scale, own in enumerate(config.scales):
        start += own * own
        for block, attend in zip(model.blocks, attention, strict=True):
            x = _block(block, attend, x, condition, caching=True)
        logits = _logits(model, x, condition)
        t = guidance * scale / (len(config.scales) - 1)
        tokens = draw((1 + t) * logits[:count] - t * logits[count:])
        drawn.append(tokens)
        codes = F.embedding(tokens, table).transpose(1, 2).reshape(count, -1, own, own)
        if scale == len(config.scales) - 1:
            break
        up = F.interpolate(codes, size=(side, side), mode="bicubic")
        f_hat = f_hat + _phi(quantizer, scale, up)
        after = config.scales[scale + 1]
        coarse = F.interpolate(f_hat, size=(after, after), mode="area")
        coarse = coarse.view(count, config.feature_dim, -1).transpose(1, 2)
        x = model.word_embed(coarse) + places[:, start : start + after * after]
        x = x.repeat(2, 1, 1)
    return torch.cat(drawn, dim=1)


def training_loss(model: VAR, labels: Tensor, tokens: Tensor, fused: bool = True) -> Tensor:
    """The loss of :meth:`VAR.forward` (without dropping) with a mask of L x L."""
    config = model.config
    mask = causal_mask(model)
    condition = model.class_emb(labels)
    features = model.tokenizer.quantizer.next_scale_inputs(tokens)
    x = torch.cat((condition[:, None] + model.pos_start, model.word_embed(features)), dim=1)
    x = x + model.lvl_embed(model.lvl_1L) + model.pos_1LC
    for block in model.blocks:
        x = _block(block, _Attention(block.attn, fused), x, condition, mask=mask)
    logits = _logits(model, x, condition)
    return F.cross_entropy(logits.view(-1, config.codebook_size), tokens.flatten())


def quantize(quantizer: VarQuantizer, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f^ with the straight-through gradient, tokens [B, L], and the loss, scale after scale."""
    table, size = quantizer.codebooks[0], features.shape[2:]
    target = features.detach()
    rest, f_hat = target.clone(), torch.zeros_like(target)
    loss, tokens = features.new_zeros(()), []
    for scale, (rows, columns) in enumerate(quantizer.scales):
        last = scale == len(quantizer.scales) - 1
        pooled = rest if last else F.interpolate(rest, size=(rows, columns), mode="area")
        flat = pooled.permute(0, 2, 3, 1).reshape(-1, quantizer.dim)
        codes = table.detach()
        distance = flat.square().sum(1, keepdim=True) + codes.square().sum(1)
        index = distance.addmm(flat, codes.T, alpha=-2).argmin(dim=1)
        index = index.view(len(features), rows, columns)
        maps = F.embedding(index, table).permute(0, 3, 1, 2)
        up = maps if last else F.interpolate(maps, size=size, mode="bicubic")
        h = _phi(quantizer, scale, up.contiguous())
        f_hat = f_hat + h
        rest = rest - h.detach()
        loss = loss + F.mse_loss(f_hat.detach(), features) * quantizer.beta
        loss = loss + F.mse_loss(f_hat, target)
        tokens.append(index.flatten(1))
    return f_hat.detach() - target + features, torch.cat(tokens, 1), loss / len(quantizer.scales)
