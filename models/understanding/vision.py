"""A tokenizer as a vision model of transformers: images to what a language model reads.

What the features are is arXiv 2412.03069, section 4.3 and table 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from tokenflow_ext import MultiScaleQuantizer
from tokenflow_ext.models.registration import register
from tokenflow_ext.models.serialization.config import ConfigError, need
from tokenflow_ext.models.serialization.files import shown
from tokenflow_ext.models.tokenizer.config import TokenizerConfig
from tokenflow_ext.models.tokenizer.model import TokenFlowTokenizer
from tokenflow_ext.models.towers.towers import PixelNorm

from .arguments import check_options, without
from .names import DTYPES, FEATURES, WINDOWS

_TYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


class TokenFlowVisionConfig(PreTrainedConfig):
    """Configuration of a :class:`TokenFlowVisionModel`.

    Args:
        tokenizer: a :class:`~tokenflow_ext.models.TokenizerConfig` or its plain form; None is the
            default one.
        features: one of ``FEATURES``.
        window: side of the neighbourhood that a position's row holds: 1 is the paper's. With 3, the
            first layer after it is a 3 x 3 convolution. Only for features on one grid.
        tokenizer_dtype: what encoders and codebook are rounded to: ``float32``, or ``bfloat16`` and
            ``float16``, as the released programs do. Distances are computed as for float32.
        hidden_size: channels of a row; it follows from the others, and must agree with them.
        options: of transformers' configurations.

    Raises:
        ConfigError: values that are unknown or do not go together.
    """

    model_type = "tokenflow_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        tokenizer: TokenizerConfig | dict[str, Any] | None = None,
        features: str = "last",
        window: int = 1,
        tokenizer_dtype: str = "float32",
        hidden_size: int | None = None,
        **options: Any,
    ) -> None:
        if tokenizer is None:
            tokenizer = TokenizerConfig()
        if not isinstance(tokenizer, TokenizerConfig):
            tokenizer = TokenizerConfig.from_dict(tokenizer)
        need(
            features in FEATURES,
            f"features must be one of {', '.join(FEATURES)}, got {shown(features)}",
        )
        need(
            tokenizer_dtype in DTYPES,
            f"tokenizer_dtype must be one of {', '.join(DTYPES)}, got {shown(tokenizer_dtype)}",
        )
        need(window in WINDOWS, f"window must be one of {WINDOWS}, got {shown(window)}")
        need(
            window == 1 or features not in ("full", "residual"),
            f"window must be 1 for features {features!r}, which are on several grids, got {window}",
        )
        need(
            features != "semantic" or tokenizer.semantic.enabled,
            "features 'semantic' need a tokenizer with a semantic branch",
        )
        self.tokenizer = tokenizer.to_dict()
        self.features = features
        self.window = window
        self.tokenizer_dtype = tokenizer_dtype
        channels = tokenizer.dims[0] if features == "semantic" else sum(tokenizer.dims)
        self.hidden_size = channels * window**2
        need(
            hidden_size in (None, self.hidden_size),
            f"hidden_size must be {self.hidden_size} for these features, got {shown(hidden_size)}",
        )
        self.image_size = tokenizer.image_size
        super().__init__(**without(options, "the tokenizer's", image_size=tokenizer.image_size))

    @property
    def tokenizer_config(self) -> TokenizerConfig:
        """The tokenizer's own configuration."""
        return TokenizerConfig.from_dict(self.tokenizer)

    @property
    def visual_tokens(self) -> int:
        """Rows that an image becomes."""
        config = self.tokenizer_config
        if self.features in ("full", "residual"):
            return sum(side * side for side in config.quantizer.scales)
        return config.grid**2


class TokenFlowVisionModel(PreTrainedModel):
    """A frozen tokenizer that gives a language model its features.

    Args:
        config: what it gives.
        tokenizer: taken over; None makes one with random weights.

    Raises:
        ConfigError: a tokenizer of another configuration.
    """

    config_class = TokenFlowVisionConfig
    config: TokenFlowVisionConfig
    like: Tensor
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = ["TokenFlowTokenizer"]  # noqa: RUF012
    # Tokens turn on the last bits: transformers loads these in float32 whatever the rest is in.
    _keep_in_fp32_modules_strict = ["tokenizer"]  # noqa: RUF012
    # And these are left whole where the rest is quantized.
    _keep_in_fp32_modules = [r"(.*\.)?tokenizer"]  # noqa: RUF012

    def __init__(
        self, config: TokenFlowVisionConfig, tokenizer: TokenFlowTokenizer | None = None
    ) -> None:
        super().__init__(config)
        if tokenizer is None:
            tokenizer = TokenFlowTokenizer(config.tokenizer_config)
        elif tokenizer.config != config.tokenizer_config:
            raise ConfigError("the tokenizer is not the one that the configuration describes")
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        # Casts of the whole model reach it, and so it says what the features are asked for in.
        self.register_buffer("like", torch.zeros(()), persistent=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # The tokenizer has drawn its weights. After loading, what no file holds is filled in here.
        if module is self:
            self.like.zero_()
        elif isinstance(module, PixelNorm):
            module.to(torch.float32).reset_parameters()
        elif isinstance(module, MultiScaleQuantizer):
            module.window_hits.zero_()
            module.skipped_rows.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenFlowVisionModel:
        """Moves as every module does, but the tokenizer keeps its precision under half()."""
        state = {**dict(self.tokenizer.named_parameters()), **dict(self.tokenizer.named_buffers())}
        before = {name: value.data for name, value in state.items()}
        # Every move of a module, and of one that it is a part of, comes by here; torch has no
        # public place for this.
        super()._apply(fn, recurse)
        for name, value in [*self.tokenizer.named_parameters(), *self.tokenizer.named_buffers()]:
            if value.dtype != before[name].dtype:
                value.data = before[name].to(value.device)
        return self

    def train(self, mode: bool = True) -> TokenFlowVisionModel:
        """The tokenizer stays in evaluation."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: Any = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Features of images, or of their tokens.

        Args:
            pixel_values: images [B, 3, S, S] in [-1, 1], or tokens [B, L] of whole numbers, as
                ``tokenflow tokenize`` writes them.
            output_hidden_states: taken for other vision models' sake: there is one hidden state,
                and it is always given.
            return_dict: False gives a tuple.
            options: what LLaVA hands on to all of its parts (``use_cache`` and others, by the
                version of transformers); they mean nothing here.

        Returns:
            ``last_hidden_state`` and ``hidden_states``, a tuple of the same [B, rows, channels].

        Raises:
            TypeError, ValueError: pixels or tokens of another shape or type, or an option that is
                not one of those.
        """
        check_options(options)
        device = pixel_values.device.type
        with torch.autocast(device, enabled=False):
            if pixel_values.is_floating_point():
                rows = self._of_images(pixel_values.float())
            else:
                rows = self._of_tokens(pixel_values.long())
        if self.config.window > 1:
            rows = _neighbourhoods(rows, self.config.tokenizer_config.grid, self.config.window)
        rows = rows.to(self.like.dtype)
        output = BaseModelOutput(last_hidden_state=rows, hidden_states=(rows,))
        return output.to_tuple() if return_dict is False else output

    def encode(self, images: Tensor) -> Tensor:
        """Tokens [B, L] of images [B, 3, S, S] in [-1, 1], in ``config.tokenizer_dtype``.

        Raises:
            TypeError, ValueError: as the tokenizer's.
        """
        return self.tokenizer.quantizer.encode(self._continuous(images))

    def _continuous(self, images: Tensor) -> Tensor:
        """Features [B, C, h, w] before quantization."""
        side = self.config.image_size
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(
                f"pixel_values must be images [B, 3, {side}, {side}] or tokens [B, L], got "
                f"{tuple(images.shape)}"
            )
        wanted = _TYPES[self.config.tokenizer_dtype]
        if any(weight.dtype != wanted for weight in self.tokenizer.parameters()):
            self.tokenizer.to(wanted)
        return self.tokenizer.features(images.to(wanted))

    def _of_images(self, images: Tensor) -> Tensor:
        features = self._continuous(images)
        if self.config.features == "continuous":
            return _rows(features)
        return self._of_tokens(self.tokenizer.quantizer.encode(features))

    def _of_tokens(self, tokens: Tensor) -> Tensor:
        kind, quantizer = self.config.features, self.tokenizer.quantizer
        if kind == "continuous":
            raise ValueError("features 'continuous' are of images: tokens do not hold them")
        if tokens.dim() != 2 or tokens.shape[1] != quantizer.num_tokens:
            raise ValueError(
                f"tokens must be [B, {quantizer.num_tokens}], got {tuple(tokens.shape)}"
            )
        if kind == "residual":
            return quantizer.codes(tokens)
        if kind == "full":
            sums = [
                quantizer.decode(tokens, count, size)
                for count, size in enumerate(quantizer.scales, start=1)
            ]
            return torch.cat([_rows(f_hat) for f_hat in sums], dim=1)
        rows = _rows(quantizer.decode(tokens))
        return rows[..., : quantizer.dims[0]] if kind == "semantic" else rows


def _rows(maps: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h * w, C], row by row."""
    return maps.flatten(2).mT


def _neighbourhoods(rows: Tensor, grid: int, window: int) -> Tensor:
    """Rows [B, g * g, C] of a grid, each with those around it: [B, g * g, C * window^2], zeros
    outside."""
    maps = rows.mT.unflatten(2, (grid, grid))
    return F.unfold(maps, window, padding=window // 2).mT


register()  # where importing this module is what imports transformers
