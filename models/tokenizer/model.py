"""The TokenFlow tokenizer: two encoders, one pyramid of shared indices, two decoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from tokenflow_ext import MultiScaleQuantizer, QuantizerOutput
from tokenflow_ext._deprecated import RenamedAttribute
from tokenflow_ext.errors import ConfigError
from tokenflow_ext.models.serialization.config import CheckpointError
from tokenflow_ext.models.serialization.hub import Hub, resolve
from tokenflow_ext.models.serialization.pretrained import CONFIG_FILE, WEIGHTS_FILE, SavedForm
from tokenflow_ext.models.serialization.push import Card, PushOptions, push
from tokenflow_ext.models.serialization.state_dict import (
    compare,
    no_random_init,
    read_state_dict,
    read_weights,
    weights_file,
    widened,
)
from tokenflow_ext.models.towers.teachers import load_tower
from tokenflow_ext.models.towers.towers import build_tower
from tokenflow_ext.var import VarQuantizer, resize

from . import original_checkpoint, var_checkpoint
from .config import TokenizerConfig
from .family_quantizer import FamilyQuantizer, arguments_of
from .semantic_decoder import SemanticDecoder, task_layer
from .vqgan import AttnBlock, Decoder, Encoder, ResnetBlock

if TYPE_CHECKING:
    from typing import Unpack

    from huggingface_hub import CommitInfo

_FORM = SavedForm("tokenflow-tokenizer", 1, "not a saved tokenizer's")

#: The parts of a tokenizer, each a unit of training, and the modules that make it up.
PARTS = {
    "semantic_tower": ("semantic_encoder",),
    "semantic_head": ("encode_task_layer",),
    "pixel_encoder": ("encoder", "quant_conv"),
    "codebooks": ("quantizer",),
    "semantic_decoder": ("semantic_decoder", "decode_task_layer"),
    "pixel_decoder": ("decoder", "post_quant_conv"),
}


class TokenizerOutput(NamedTuple):
    """What :meth:`TokenFlowTokenizer.forward` gives.

    Attributes:
        images: decoded images [B, 3, H, W], about [-1, 1] (not clamped); None without a pixel
            branch.
        semantic: decoded semantic tokens [B, N, C_teacher]; None without a semantic branch.
        quantizer: indices, losses and usage.
    """

    images: Tensor | None
    semantic: Tensor | None
    quantizer: QuantizerOutput


class TokenFlowTokenizer(nn.Module):
    """Dual-codebook multi-scale image tokenizer (arXiv 2412.03069, section 3.1).

    Images are [B, 3, H, W] in [-1, 1]. Weights start random; :meth:`load_semantic_tower` gives the
    semantic encoder its pretrained start, :meth:`from_pretrained` loads a trained tokenizer.

    Args:
        config: shape of everything; see :meth:`TokenizerConfig.preset`.

    Attributes:
        unused_tensors: by the original names, what an original checkpoint had that no module here
            has (see :mod:`.original_checkpoint`); empty for any other tokenizer. Not part of the
            state dict: :meth:`save_original` alone writes it.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        if not isinstance(config, TokenizerConfig):
            raise TypeError(f"config must be a TokenizerConfig, got {type(config).__name__}")
        self.config = config
        self.unused_tensors: dict[str, Tensor] = {}
        pixel, semantic = config.pixel, config.semantic
        if pixel.enabled:
            shape: dict[str, Any] = {
                "multipliers": pixel.multipliers,
                "z_channels": pixel.z_channels,
                "groups": pixel.groups,
                "patch": pixel.patch,
            }
            self.encoder = Encoder(channels=pixel.channels, res_blocks=pixel.res_blocks, **shape)
            self.decoder = Decoder(
                channels=pixel.decoder_channels or pixel.channels,
                res_blocks=pixel.decoder_res_blocks or pixel.res_blocks,
                **shape,
            )
            kernel, padding = pixel.quant_kernel, pixel.quant_kernel // 2
            self.quant_conv = nn.Conv2d(pixel.z_channels, pixel.code_dim, kernel, padding=padding)
            self.post_quant_conv = nn.Conv2d(
                pixel.code_dim, pixel.z_channels, kernel, padding=padding
            )
        if semantic.enabled:
            self.semantic_encoder = build_tower(semantic.tower)
            self.encode_task_layer = task_layer(semantic.tower.out_dim, semantic.code_dim)
            self.semantic_decoder = SemanticDecoder(
                semantic.code_dim,
                semantic.decoder_width,
                semantic.decoder_depth,
                semantic.decoder_heads,
                semantic.decoder_grid,
            )
            self.decode_task_layer = task_layer(semantic.decoder_width, config.semantic_dim)
            if semantic.frozen:
                self.semantic_encoder.requires_grad_(False)
                self.semantic_encoder.eval()
        # Of the family it has the same methods, but for those of a next-scale predictor, whose
        # models ask for a tokenizer with one index (`TokenizerConfig.need_one_index`).
        self.quantizer = cast(MultiScaleQuantizer, _build_quantizer(config))

    def train(self, mode: bool = True) -> TokenFlowTokenizer:
        """Sets the mode; a frozen semantic tower stays in evaluation."""
        super().train(mode)
        if self.config.semantic.enabled and self.config.semantic.frozen:
            self.semantic_encoder.eval()
        return self

    @property
    def last_layer(self) -> nn.Parameter | None:
        """Weight of the pixel decoder's last convolution (for the adaptive GAN weight); None
        without a pixel branch."""
        return self.decoder.last_layer if self.config.pixel.enabled else None

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of each part that there is (see ``PARTS``); every parameter is in one."""
        found = {
            part: [p for n in names if hasattr(self, n) for p in getattr(self, n).parameters()]
            for part, names in PARTS.items()
        }
        return {part: parameters for part, parameters in found.items() if parameters}

    def blocks(self) -> list[nn.Module]:
        """Residual and transformer blocks, in no part of each other: they hold most of the weights
        and make most of the activations."""
        found: list[nn.Module] = []
        if self.config.pixel.enabled:
            for network in (self.encoder, self.decoder):
                found += [m for m in network.modules() if isinstance(m, (ResnetBlock, AttnBlock))]
        if self.config.semantic.enabled:
            found += [*self.semantic_encoder.layers(), *self.semantic_decoder.blocks]
        return found

    def checkpoint_activations(self) -> None:
        """From now on a block's activations are computed again in the backward pass rather than
        kept: less memory, for one more forward pass of the blocks. Names of weights stay."""
        for block in self.blocks():
            block.forward = partial(_recomputed, block.forward)

    def compile_networks(self, **options: Any) -> None:
        """Compiles encoders and decoders, in place: names of weights stay. The quantizer is an
        operator of its own and runs between them.

        Args:
            options: of ``torch.compile``.
        """
        networks: list[nn.Module] = []
        if self.config.pixel.enabled:
            networks += [self.encoder, self.decoder]
        if self.config.semantic.enabled:
            networks += [self.semantic_encoder, self.semantic_decoder]
        for network in networks:
            network.compile(**options)

    def load_semantic_tower(self, weights: str | Path | None = None) -> Path | None:
        """Gives the semantic encoder's tower its pretrained weights.

        Args:
            weights: see :func:`~tokenflow_ext.models.towers.teachers.load_tower`.

        Returns:
            The path read; None without a semantic branch.

        Raises:
            WeightsError: see :func:`tokenflow_ext.models.towers.teachers.load_tower`.
        """
        if not self.config.semantic.enabled:
            return None
        return load_tower(self.semantic_encoder, weights)

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor, got {type(images).__name__}")
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [-1, 1], got {images.dtype}")
        if images.shape[0] == 0:
            raise ValueError(f"images must hold one image or more, got {tuple(images.shape)}")
        if not self.config.pixel.enabled:
            return
        factor = self.config.pixel.factor
        for side in self._pixel_size(images):
            if side % factor or side == 0:
                raise ValueError(
                    f"images' sides must give the pixel encoder a multiple of {factor}, got "
                    f"{tuple(images.shape[-2:])}"
                )

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """(rows, columns) of the latent grid."""
        config = self.config
        if config.pixel.enabled:
            height, width = self._pixel_size(images)
            return height // config.pixel.factor, width // config.pixel.factor
        height, width = images.shape[-2:]
        return config.semantic.tower.grid(height), config.semantic.tower.grid(width)

    def _pixel_size(self, images: Tensor) -> tuple[int, int]:
        """(height, width) of the pixel encoder's input."""
        height, width = images.shape[-2:]
        inside = self.config.pixel.input_size
        if not inside:
            return height, width
        return (
            height * inside // self.config.image_size,
            width * inside // self.config.image_size,
        )

    def tower_features(self, images: Tensor) -> Tensor | None:
        """The semantic tower's tokens [B, N, C]; None without a semantic branch."""
        if not self.config.semantic.enabled:
            return None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.semantic.frozen):
            return self.semantic_encoder(images)

    def features(self, images: Tensor, tower_tokens: Tensor | None = None) -> Tensor:
        """Continuous features before quantization.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            tower_tokens: the semantic tower's tokens [B, N, C] where they are known already (a
                frozen tower that is the teacher too need not run twice).

        Returns:
            h [B, sum(dims), h, w]: semantic channels, then pixel channels, of the branches that
            there are.

        Raises:
            ValueError, TypeError: images or tokens of the wrong shape or type.
        """
        return self._features(images, tower_tokens)

    def _features(self, images: Tensor, tower_tokens: Tensor | None) -> Tensor:
        # Under FSDP `forward` and `features` are wrapped, and may not call each other.
        self._check(images)
        parts = []
        if self.config.semantic.enabled:
            parts.append(self._semantic_features(images, tower_tokens))
        if self.config.pixel.enabled:
            pixel = self.quant_conv(self.encoder(resize(images, self._pixel_size(images))))
            parts.append(pixel.to(parts[0].dtype) if parts else pixel)
        return torch.cat(parts, dim=1)

    def _semantic_features(self, images: Tensor, tower_tokens: Tensor | None) -> Tensor:
        """The semantic channels of :meth:`features`."""
        grid = self._grid(images)
        tokens = self.tower_features(images) if tower_tokens is None else tower_tokens
        assert tokens is not None  # a semantic branch has a tower
        expected = (images.shape[0], grid[0] * grid[1], self.config.semantic.tower.out_dim)
        if tuple(tokens.shape) != expected:
            raise ValueError(
                f"the semantic tower's tokens must be {expected} to meet the grid of images "
                f"{tuple(images.shape)}, got {tuple(tokens.shape)}"
            )
        return self.encode_task_layer(tokens).transpose(1, 2).unflatten(2, grid)

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> indices [B, L] int64, scale by scale.

        Of a quantizer of the family [B, L(, G)(, depth)].
        """
        return self.quantizer.encode(self._features(images, None))

    def decode(
        self, indices: Tensor, upto: int | None = None, grid: tuple[int, int] | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """indices [B, L] -> (images [B, 3, H, W], semantic tokens [B, N, C_teacher]).

        Either is None where its branch is not there.

        Args:
            upto: decode the first few scales alone; None is all.
            grid: (rows, columns) of the latent grid, for images that were not of the configured
                size; None is the configured grid.
        """
        size = (self.config.grid, self.config.grid) if grid is None else grid
        return self.decode_features(self.quantizer.decode(indices, upto, size))

    def decode_features(self, f_hat: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Quantized features [B, sum(dims), h, w] -> (images, semantic tokens), as :meth:`decode`.

        Raises:
            ValueError: features of another width.
        """
        dims = self.config.dims
        if f_hat.dim() != 4 or f_hat.shape[1] != sum(dims):
            raise ValueError(f"f_hat must be [B, {sum(dims)}, h, w], got {tuple(f_hat.shape)}")
        tokens = images = None
        if self.config.semantic.enabled:
            tokens = self.decode_task_layer(self.semantic_decoder(f_hat[:, : dims[0]]))
        if self.config.pixel.enabled:
            images = self.decode_pixels(f_hat)
        return images, tokens

    def decode_pixels(self, f_hat: Tensor) -> Tensor:
        """Quantized features [B, sum(dims), h, w] -> images, by the pixel branch alone.

        Raises:
            ConfigError: the tokenizer decodes no images.
        """
        if not self.config.pixel.enabled:
            raise ConfigError("the tokenizer decodes no images: its pixel.enabled is false")
        images = self.decoder(self.post_quant_conv(f_hat[:, -self.config.dims[-1] :]))
        inside = self.config.pixel.input_size
        if inside:
            size = [side * self.config.image_size // inside for side in images.shape[-2:]]
            images = resize(images, (size[0], size[1]))
        return images

    def forward(self, images: Tensor, tower_tokens: Tensor | None = None) -> TokenizerOutput:
        """Encode, quantize and decode; arguments as for :meth:`features`."""
        with record_function("encoders"):
            h = self._features(images, tower_tokens)
        with record_function("quantizer"):
            quantized = self.quantizer(h)
        with record_function("decoders"):
            decoded, semantic = self.decode_features(quantized.quantized)
        return TokenizerOutput(decoded, semantic, quantized)

    def save_pretrained(self, path: str | Path, state: dict[str, Tensor] | None = None) -> Path:
        """Writes ``config.json`` and ``model.safetensors`` into the directory ``path``.

        Each file is complete before it takes its name. An earlier tokenizer there is replaced.

        Args:
            state: a state dict to write in the place of the tokenizer's own (weights that were
                averaged, or gathered from several processes).

        Raises:
            OutputError: another kind of model is there, or the files cannot be written.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state is None else state
        state = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
        _FORM.write(folder, self.config.to_dict(), state)
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        **options: Unpack[PushOptions],
    ) -> CommitInfo:
        """Saves to the hub what :meth:`save_pretrained` writes, with a model card, in one commit.
        The repository is made where there is none.

        Args:
            repo_id: ``ORGANISATION/NAME``.
            options: ``license``, ``metrics``, ``private``, ``token``, ``revision``,
                ``commit_message``, ``create_pr``, ``overwrite_card``: see
                :class:`.serialization.push.PushOptions`.

        Returns:
            huggingface_hub's description of the commit.

        Raises:
            ConfigError: a ``repo_id`` that is none.
            OutputError: another model is in the repository, no permission, or no server.
            MissingPackageError: huggingface_hub is not installed.
        """
        return push(
            self.save_pretrained,
            _FORM.is_in,
            _card(self.config),
            self.config.to_dict(),
            repo_id,
            **options,
        )

    def save_original(
        self,
        path: str | Path,
        unused_from: str | Path | None = None,
        *,
        overwrite: bool = False,
    ) -> Path:
        """Writes one torch file with exactly the original checkpoints' names and shapes.

        Args:
            unused_from: an original checkpoint to take from what no module here holds (SigLIP's
                last layer and head, usage statistics), for a tokenizer that was not read from one;
                None is what :meth:`from_pretrained` kept.
            overwrite: whether to replace a file that is there.

        Raises:
            OutputError: the file is there, or cannot be written.
            ConfigError: a tokenizer that has no original form.
            CheckpointError: weights of the original form that neither source has.
        """
        self.config.need_one_index("an original checkpoint")
        form = _original_form(self.config)
        form.check(self.config)
        unused = self.unused_tensors
        if unused_from is not None:
            unused = original_checkpoint.read_unused(unused_from, form.unused_shapes(self.config))
        state = form.to_original(self.state_dict(), self.config, unused)
        return form.write(path, state, overwrite)

    save_released = RenamedAttribute("save_original", left_aside_from="unused_from")
    left_aside = RenamedAttribute("unused_tensors")

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        resolution: int | None = None,
        config: TokenizerConfig | None = None,
        *,
        filename: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> TokenFlowTokenizer:
        """Loads a trained tokenizer (in evaluation mode, on the CPU).

        Weights in half precision become float32.

        Args:
            path: a directory written by :meth:`save_pretrained`, or a file: one of the original
                checkpoints (see :mod:`.original_checkpoint`), or VAR's (:mod:`.var_checkpoint`); or
                a hub id of a repository with either.
            resolution: side of the images in pixels, None for the tokenizer's own. An original B
                (224) can be read for 256 and VAR's (256) for 512; anywhere else it must be the
                tokenizer's own.
            config: for a file with the original names but other sizes, its configuration; None
                infers those of the original tokenizers.
            filename, revision, cache_dir, token, local_files_only: of a hub id; see
                :class:`~tokenflow_ext.models.serialization.hub.Hub`.

        Raises:
            CheckpointError: a missing, truncated or foreign file, weights that do not fit the
                configuration, or what the hub does not give; the message names file and entry.
            ValueError: a resolution that the tokenizer was not made for, or one beside ``config``;
                a ``config`` for a directory, or an argument of the hub beside a path.
        """
        hub = Hub(filename, revision, cache_dir, token, local_files_only)
        path = resolve(path, hub, check=_read_config)
        if path.is_file():
            if config is not None and resolution is not None:
                raise ValueError("config says the resolution: give one of the two")
            state = read_state_dict(path)
            config = config or _infer_config(state, resolution, path)
            return cls.from_original(state, config, path)
        if config is not None:
            raise ValueError(
                f"config is for original checkpoints: {path} has its own {CONFIG_FILE}"
            )
        config, state = cls._read_folder(path)
        if resolution not in (None, config.image_size):
            raise ValueError(
                f"resolution must be {config.image_size} for {path}, got {resolution!r}"
            )
        model = cls._to_load(config)
        model.load_state_dict(state)
        return model.eval()

    @classmethod
    def from_original(
        cls,
        state: Mapping[str, Tensor],
        config: TokenizerConfig | None = None,
        source: str | Path = "the state dict",
    ) -> TokenFlowTokenizer:
        """The tokenizer of an original state dict (see :mod:`.original_checkpoint`), in evaluation
        mode: a copy on the CPU, or on the meta device where the tensors are there.

        Args:
            config: None infers that of one of the original tokenizers.
            source: what messages call the state dict.

        Raises:
            CheckpointError, ConfigError: see :func:`.original_checkpoint.from_original`.
        """
        config = config or _infer_config(state, None, source)
        shapes_alone = any(value.is_meta for value in state.values())
        with torch.device("meta") if shapes_alone else nullcontext():
            model = cls._to_load(config)
        form = _original_form(config)
        state = widened(state)
        own, unused = form.from_original(state, config, model.state_dict(), source)
        model.load_state_dict(own)
        model.unused_tensors = {key: value.clone() for key, value in unused.items()}
        return model.eval()

    @classmethod
    def read_config(cls, folder: Path) -> TokenizerConfig:
        """The configuration of a directory written by :meth:`save_pretrained`.

        Raises:
            CheckpointError: a missing, foreign or unreadable file.
        """
        return _read_config(folder)

    @classmethod
    def _to_load(cls, config: TokenizerConfig) -> TokenFlowTokenizer:
        with no_random_init():
            return cls(config)

    @classmethod
    def _read_folder(cls, folder: Path) -> tuple[TokenizerConfig, dict[str, Tensor]]:
        config, file = _read_config(folder), weights_file(folder)
        with torch.device("meta"):  # no memory is taken for sizes that the file does not have
            own = cls(config).state_dict()

        def check(found: Mapping[str, Tensor | tuple[int, ...]]) -> None:
            if difference := compare(found, own):
                raise CheckpointError(f"{file} does not fit its {CONFIG_FILE}: {difference}")

        state = widened(read_weights(folder, check))
        check(state)  # the types
        return config, state


def _card(config: TokenizerConfig) -> Card:
    """What a model card says of a tokenizer."""
    side = config.image_size
    usage = f"""
from tokenflow_ext.models import TokenFlowTokenizer

tokenizer = TokenFlowTokenizer.from_pretrained("REPOSITORY")
indices = tokenizer.encode(images)             # images [B, 3, {side}, {side}] in [-1, 1]
decoded, semantic = tokenizer.decode(indices)
"""
    return Card("image tokenizer", ("image-tokenizer",), usage)


def _original_form(config: TokenizerConfig) -> ModuleType:
    """The adapter of the original checkpoints that a configuration has: TokenFlow's, or VAR's."""
    return var_checkpoint if config.quantizer.kind == "var" else original_checkpoint


def _infer_config(
    state: Mapping[str, Tensor], resolution: int | None, source: str | Path
) -> TokenizerConfig:
    """The configuration of an original state dict, of whichever form it is."""
    form = var_checkpoint if var_checkpoint.MARK in state else original_checkpoint
    return form.infer_config(state, resolution, source)


def _build_quantizer(config: TokenizerConfig) -> MultiScaleQuantizer | FamilyQuantizer:
    quantizer = config.quantizer
    if quantizer.kind == "family":
        return FamilyQuantizer(**arguments_of(config))
    shared: dict[str, Any] = {
        "scales": quantizer.scales,
        "beta": quantizer.beta,
        "l2_norm": quantizer.l2_norm,
        "usage_decay": quantizer.usage_decay,
        "scale_drop": quantizer.scale_drop,
    }
    if quantizer.kind == "var":
        return VarQuantizer(
            quantizer.codebook_size,
            config.dims[0],
            phi_ratio=quantizer.phi,
            phi_shared=quantizer.phi_shared,
            **shared,
        )
    return MultiScaleQuantizer(
        quantizer.codebook_size,
        config.dims,
        weights=quantizer.weights,
        codebook_update=cast(Literal["gradient", "ema"], quantizer.codebook_update),
        **shared,
    )


def _recomputed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)


def _read_config(folder: Path) -> TokenizerConfig:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no directory, and no file: a saved tokenizer is a directory with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}, an original one a torch file"
        )
    return _FORM.read_config(folder, TokenizerConfig.from_dict)
