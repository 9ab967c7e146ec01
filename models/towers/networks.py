"""Networks of the vision towers in plain PyTorch, under the names of their published weights.

CLIP's ViT is named as OpenAI and open_clip name it, SigLIP's as transformers does and
EfficientNet-Lite0 as timm does, so that a state dict of theirs loads as it is.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), with which OpenAI's CLIP was trained."""

    def forward(self, x: Tensor) -> Tensor:
        """x [...] -> [...]."""
        return x * torch.sigmoid(1.702 * x)


class ClipBlock(nn.Module):
    """CLIP's transformer block: pre-norm, every projection with a bias."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, mlp_width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(mlp_width, width),
            )
        )

    def reset_parameters(self) -> None:
        """The attention's projections as torch starts them, which it has no public call for."""
        nn.init.xavier_uniform_(self.attn.in_proj_weight)
        nn.init.zeros_(self.attn.in_proj_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, width] -> [B, N, width]."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ClipTransformer(nn.Module):
    """CLIP's blocks, one after the other."""

    def __init__(self, width: int, depth: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ClipBlock(width, heads, mlp_width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, width] -> [B, N, width]."""
        for block in self.resblocks:
            x = block(x)
        return x


class SiglipEmbeddings(nn.Module):
    """Patches and learned positions; bicubic positions for another size than ``image_size``."""

    def __init__(self, image_size: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.image_size, self.side = image_size, image_size // patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.position_embedding = nn.Embedding(self.side**2, width)
        nn.init.normal_(self.position_embedding.weight, std=width**-0.5)
        # LeCun's normal, truncated at two deviations (whose deviation is 0.8796).
        std = (3 * patch_size**2) ** -0.5 / 0.87962566
        nn.init.trunc_normal_(self.patch_embedding.weight, std=std, a=-2 * std, b=2 * std)
        assert self.patch_embedding.bias is not None
        nn.init.zeros_(self.patch_embedding.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> tokens [B, N, width]."""
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        positions = self.position_embedding.weight
        if tuple(pixels.shape[-2:]) != (self.image_size, self.image_size):
            square = positions.T.reshape(1, -1, self.side, self.side)
            square = F.interpolate(square, size=x.shape[-2:], mode="bicubic", align_corners=False)
            positions = square[0].flatten(1).T
        return x.flatten(2).transpose(1, 2) + positions


class SiglipAttention(nn.Module):
    """Multi-head self-attention, a projection each for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, width] -> [B, N, width]."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class SiglipMlp(nn.Module):
    """Linear, GELU in its tanh form, Linear."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, width] -> [B, N, width]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipBlock(nn.Module):
    """SigLIP's transformer block: pre-norm."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attn = SiglipAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = SiglipMlp(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, width] -> [B, N, width]."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipEncoder(nn.Module):
    """SigLIP's blocks, one after the other; no norm follows the last."""

    def __init__(self, width: int, depth: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipBlock(width, heads, mlp_width) for _ in range(depth))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, width] -> [B, N, width]."""
        for layer in self.layers:
            x = layer(x)
        return x


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "SAME": ceil(size / stride) outputs, the
    odd column or row of zeros at the right or below."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)
        fan_out = kernel**2 * outputs // groups
        nn.init.normal_(self.weight, std=math.sqrt(2.0 / fan_out))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (
            max(kernel - stride if size % stride == 0 else kernel - size % stride, 0)
            for size in x.shape[-2:]
        )
        if height == width and height % 2 == 0:  # the convolution's own padding copies nothing
            return F.conv2d(x, self.weight, None, stride, height // 2, groups=self.groups)
        pad = (width // 2, width - width // 2, height // 2, height - height // 2)
        return F.conv2d(F.pad(x, pad), self.weight, None, stride, groups=self.groups)


class NormRelu6(nn.BatchNorm2d):
    """BatchNorm with EfficientNet's epsilon, then ReLU6."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, channels, H, W] -> [B, channels, H, W]."""
        return F.relu6(super().forward(x), inplace=True)


class SeparableBlock(nn.Module):
    """EfficientNet's block without expansion: depthwise, then pointwise convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv_dw = SameConv2d(inputs, inputs, kernel, groups=inputs)
        self.bn1 = NormRelu6(inputs)
        self.conv_pw = SameConv2d(inputs, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, H, W] -> [B, outputs, H, W]."""
        return self.bn2(self.conv_pw(self.bn1(self.conv_dw(x))))


class InvertedResidual(nn.Module):
    """EfficientNet's block: six times as wide inside, a residual where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = 6 * inputs
        self.residual = stride == 1 and inputs == outputs
        self.conv_pw = SameConv2d(inputs, inner, 1)
        self.bn1 = NormRelu6(inner)
        self.conv_dw = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self.bn2 = NormRelu6(inner)
        self.conv_pwl = SameConv2d(inner, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)]."""
        y = self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.residual else y


def efficientnet_lite0_blocks() -> nn.Sequential:
    """EfficientNet-Lite0's first five stages: [B, 32, H, W] -> [B, 112, H / 8, W / 8]."""
    stages = [nn.Sequential(SeparableBlock(32, 16, 3))]
    inputs = 16
    # outputs, kernel, stride of the first block, blocks
    for outputs, kernel, stride, count in (
        (24, 3, 2, 2),
        (40, 5, 2, 2),
        (80, 3, 2, 3),
        (112, 5, 1, 3),
    ):
        blocks = [InvertedResidual(inputs, outputs, kernel, stride)]
        blocks += [InvertedResidual(outputs, outputs, kernel, 1) for _ in range(count - 1)]
        stages.append(nn.Sequential(*blocks))
        inputs = outputs
    return nn.Sequential(*stages)
