"""VAR: class-conditional images by next-scale prediction (arXiv 2404.02905).

The keys of :meth:`VAR.state_dict` are those of the released weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from tokenflow_ext.models.metrics import to_uint8
from tokenflow_ext.models.serialization.config import CheckpointError
from tokenflow_ext.models.serialization.hub import Hub, resolve
from tokenflow_ext.models.serialization.pretrained import SavedForm, not_finite, write_torch
from tokenflow_ext.models.serialization.push import Card
from tokenflow_ext.models.serialization.state_dict import read_state_dict
from tokenflow_ext.models.text_to_image.generation import (
    KeyValueCache,
    OnScale,
    ScaleSession,
    generate_tokens,
    image_seeds,
)
from tokenflow_ext.models.text_to_image.over_tokenizer import NextScaleTransformer
from tokenflow_ext.models.text_to_image.sequence import NextScaleSequence
from tokenflow_ext.models.tokenizer.model import TokenFlowTokenizer
from tokenflow_ext.sampler import MultiStepSampler, SamplingConfig

from . import original_checkpoint
from .config import VarConfig
from .transformer import AdaptiveHeadNorm, Block, Visible, modulation

if TYPE_CHECKING:
    pass

Attention = Literal["scales", "flex"]
#: How the released models draw.
SAMPLING = SamplingConfig(top_k=(900,), top_p=(0.96,), guidance=1.5)


_USAGE = """
import torch

from tokenflow_ext.models import VAR

model = VAR.from_pretrained("REPOSITORY")
images = model.generate(torch.tensor([0, 1]), seed=0)   # uint8 [2, 3, H, W]
"""


class VarOutput(NamedTuple):
    """What :meth:`VAR.forward` gives."""

    loss: Tensor
    """Mean cross-entropy of the image tokens, scalar float32 (float64 in float64)."""
    logits: Tensor
    """[B, L, K], float32 (float64 in float64)."""


class VAR(NextScaleTransformer):
    """Class-conditional next-scale transformer (arXiv 2404.02905, section 3.2 and 4.1).

    Weights start random, as the released ones did; :meth:`from_released` takes released weights.

    Args:
        config: shape of everything.
        tokenizer: the image tokenizer, VAR's own or any other with a pixel branch. It is frozen and
            no part of the module's parameters and state dict; it follows the model's device, not
            its dtype.
        attention: how :meth:`forward` attends: ``scales``, one call of plain attention for each
            scale, or ``flex`` for FlexAttention (compiled on CUDA; heads of 16 channels or more),
            but for what a CPU trains: it has no backward pass there. Neither has a mask of L x L,
            and the results agree to rounding.

    Raises:
        ConfigError: a tokenizer that does not fit the configuration.
    """

    form = SavedForm("tokenflow-var", 1, "no saved VAR's")
    kind = "VAR"
    card = Card("class-conditional image generator", ("image-generation", "var"), _USAGE)
    config_class = VarConfig
    config: VarConfig
    lvl_1L: Tensor

    def __init__(
        self,
        config: VarConfig,
        tokenizer: TokenFlowTokenizer,
        *,
        attention: Attention = "scales",
    ) -> None:
        super().__init__(config, tokenizer)
        if attention not in ("scales", "flex"):
            raise ValueError(f"attention must be 'scales' or 'flex', got {attention!r}")
        self.attention = attention
        self._mask: BlockMask | None = None  # for FlexAttention, made when it is needed
        self._session: _Session | None = None
        #: Positions and scales, the class in the place of a prompt of one position.
        self.sequence = NextScaleSequence(config.scales, 1)
        self._ends = [self.sequence.positions(i)[1] for i in range(len(config.scales))]

        width, length = config.channels, config.image_tokens
        self.word_embed = nn.Linear(config.feature_dim, width)
        self.class_emb = nn.Embedding(config.classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.pos_1LC = nn.Parameter(torch.empty(1, length, width))
        self.lvl_embed = nn.Embedding(len(config.scales), width)
        self.shared_ada_lin = modulation(width, 6) if config.shared_adaln else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.head_nm = AdaptiveHeadNorm(config)
        self.head = nn.Linear(width, config.codebook_size)
        numbers = [i for i, side in enumerate(config.scales) for _ in range(side * side)]
        self.register_buffer("lvl_1L", torch.tensor([numbers]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values as the released weights had them."""
        width, depth = self.config.channels, self.config.depth
        deviation = math.sqrt(1 / width / 3)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=deviation)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for parameter in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(parameter, std=deviation)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            linear = self.head_nm.ada_lin[1]
            assert isinstance(linear, nn.Linear)
            linear.weight.mul_(0.5)
            for block in self.blocks:
                assert isinstance(block, Block)
                block.attn.proj.weight.div_(math.sqrt(2 * depth))
                block.ffn.fc2.weight.div_(math.sqrt(2 * depth))
                if block.shared:
                    nn.init.trunc_normal_(block.ada_gss, std=deviation)
                    block.ada_gss[:, :, 2:].mul_(0.5)
                    block.ada_gss[:, :, :2].mul_(1e-5)
                else:
                    linear = block.ada_lin[1]
                    assert isinstance(linear, nn.Linear)
                    linear.weight[2 * width :].mul_(0.5)
                    linear.weight[: 2 * width].mul_(1e-5)

    def forget_buffers(self) -> None:
        """See the base class."""
        self._session = self._mask = None

    # ------------------------------------------------------------------ classes

    @torch.no_grad()
    def replace_classes(self, classes: int | Sequence[str]) -> None:
        """Take other classes, to fine-tune with: the class table is made anew, but for its row of
        no class, and all else stays.

        Args:
            classes: how many, or their names.

        Raises:
            ConfigError: none, or two of one name.
        """
        names = () if isinstance(classes, int) else tuple(classes)
        count = classes if isinstance(classes, int) else len(names)
        self.config = replace(self.config, classes=count, class_names=names)
        old = self.class_emb.weight
        new = torch.empty(count + 1, old.shape[1], dtype=old.dtype, device=old.device)
        nn.init.trunc_normal_(new, std=math.sqrt(1 / old.shape[1] / 3))
        new[-1] = old[-1]
        self.class_emb = nn.Embedding(count + 1, old.shape[1], _weight=new)
        self._session = None

    def name_classes(self, names: Sequence[str]) -> None:
        """Give the classes their names, or take them (an empty sequence).

        Raises:
            ConfigError: another number of names, or two alike.
        """
        self.config = replace(self.config, class_names=tuple(names))

    def change_drops(self, *, class_drop: float, drop_path: float) -> None:
        """Train with other shares of dropped classes and branches; see :class:`VarConfig`."""
        self.config = replace(self.config, class_drop=class_drop, drop_path=drop_path)
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            block.drop_path = self.config.drop_path_of(number)

    # ------------------------------------------------------------------ parts

    def _labels(self, labels: Tensor | None, count: int) -> Tensor:
        """Checked labels [count]; None is no class."""
        none = self.config.classes
        if labels is None:
            return torch.full((count,), none, device=self.device)
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.dim() != 1:
            got = (
                f"{tuple(labels.shape)} {labels.dtype}"
                if isinstance(labels, Tensor)
                else type(labels).__name__
            )
            raise TypeError(f"labels must be [B] int64, got {got}")
        if not labels.is_cuda and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high > none:
                raise ValueError(
                    f"labels must be in [0, {none}] ({none} is no class), got {low} to {high}"
                )
        return labels.to(self.device)

    def condition(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of labels [B]: the class embedding [B, width], and the blocks' condition made of it."""
        embedded = self.class_emb(labels)
        shared = self.shared_ada_lin(embedded)
        if self.config.shared_adaln:
            shared = shared.view(-1, 1, 6, self.config.channels)
        return embedded, shared

    def positions(self, first: int, end: int) -> Tensor:
        """Embeddings of scale and place, [1, end - first, width]."""
        return self.lvl_embed(self.lvl_1L[:, first:end]) + self.pos_1LC[:, first:end]

    def first_input(self, embedded: Tensor) -> Tensor:
        """The class [B, width] as input of the first scale, [B, 1, width]."""
        return embedded[:, None] + self.pos_start + self.positions(0, 1)

    def image_inputs(self, features: Tensor, first: int) -> Tensor:
        """Inputs of later scales from f^ at their sizes.

        Args:
            features: [B, n, C].
            first: the first of these places.
        """
        embedded = self.word_embed(features.to(self.word_embed.weight.dtype))
        return embedded + self.positions(first, first + features.shape[1])

    def scores(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """[B, n, width] and the class [B, width] -> logits [B, n, K]. Norm and head are computed in
        float32, or in float64."""
        if hidden.dtype != torch.float64:
            hidden = hidden.float()
        with torch.autocast(hidden.device.type, enabled=False):
            normed = self.head_nm(hidden, embedded)
            weight, bias = self.head.weight.to(hidden.dtype), self.head.bias.to(hidden.dtype)
            return F.linear(normed, weight, bias)

    # ------------------------------------------------------------------ training and scoring

    def forward(self, labels: Tensor | None, indices: Tensor) -> VarOutput:
        """Teacher forcing: every scale's tokens from the class and the tokens of earlier scales.

        In training some classes are replaced by no class (``config.class_drop``).

        Args:
            labels: classes [B] int64; ``config.classes`` is no class, and None is that for all.
            indices: the images' tokens [B, L], scale by scale.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit; on the CPU also numbers out of
                range (elsewhere that would wait for the device).
        """
        config = self.config
        if indices.dim() != 2 or indices.shape[1] != config.image_tokens:
            raise ValueError(
                f"indices must be [B, {config.image_tokens}], got {tuple(indices.shape)}"
            )
        if indices.dtype != torch.int64:
            raise TypeError(f"indices must be int64, got {indices.dtype}")
        if not indices.is_cuda and bool(((indices < 0) | (indices >= config.codebook_size)).any()):
            raise ValueError(
                f"indices must be in [0, {config.codebook_size}), got {int(indices.min())} to "
                f"{int(indices.max())}"
            )
        classes = self._labels(labels, len(indices))
        if len(classes) != len(indices):
            raise ValueError(f"labels are {len(classes)}, and there are {len(indices)} images")
        if self.training and config.class_drop > 0:
            dropped = torch.rand(len(classes), device=classes.device) < config.class_drop
            classes = torch.where(dropped, config.classes, classes)
        embedded, condition = self.condition(classes)
        inputs = self.first_input(embedded)
        if len(config.scales) > 1:
            features = self.tokenizer.quantizer.next_scale_inputs(indices)
            inputs = torch.cat([inputs, self.image_inputs(features, 1)], dim=1)
        visible = self._visible()
        for block in self.blocks:
            inputs = block(inputs, condition, visible)
        logits = self.scores(inputs, embedded)
        return VarOutput(F.cross_entropy(logits.flatten(0, 1), indices.flatten()), logits)

    def _visible(self) -> Visible:
        """What a place sees, as the attention takes it."""
        backward = torch.is_grad_enabled() and self.device.type == "cpu"
        if self.attention == "scales" or backward:
            return self._ends
        if self._mask is None:
            self._mask = self.sequence.block_mask_without_padding(self.device)
        return self._mask

    def logits(self, labels: Tensor | None, indices: Tensor) -> Tensor:
        """Logits [B, L, K] of every token, the true ones before it given; as :meth:`forward`."""
        return self(labels, indices).logits

    # ------------------------------------------------------------------ generation

    @torch.no_grad()
    def generate(
        self, labels: Tensor | None, *, more_smooth: bool = False, **options: Any
    ) -> Tensor:
        """Images [B, 3, H, W] uint8 of classes.

        Args:
            labels, options: as of :meth:`generate_tokens`.
            more_smooth: f^ grows by means over all codes in the place of the drawn ones, with the
                weights of a Gumbel-softmax of (1 + r) * logits at the temperature max(0.27 * (1 -
                0.95 * r), 0.005), r = k / (S - 1). For pictures; the published FIDs are without it.
        """
        tokenizer, grid = self.tokenizer, self.tokenizer.config.grid
        tokens, rows = self._draw(labels, more_smooth, **options)
        if rows is None:
            images, _ = tokenizer.decode(tokens)
        else:
            f_hat = tokenizer.quantizer.decode_rows(rows, (grid, grid))
            images, _ = tokenizer.decode_features(f_hat)
        assert images is not None  # the constructor takes no tokenizer without a pixel branch
        return to_uint8(images)

    @torch.no_grad()
    def generate_tokens(
        self,
        labels: Tensor | None,
        *,
        count: int | None = None,
        sampling: SamplingConfig | None = None,
        seed: int | Sequence[int] | None = None,
        cuda_graphs: bool = False,
        on_scale: OnScale | None = None,
        **settings: Any,
    ) -> Tensor:
        """Image tokens [B, L] of classes, scale after scale.

        At scale k, t = guidance * k / (S - 1), and logits are (1 + t) * those of the class - t *
        those of no class. A guidance of 0 leaves the second half out.

        Args:
            labels: classes [B] int64; ``config.classes`` is no class, and None is that for all.
            count: images, where there are no labels [1].
            sampling: how tokens are drawn, by default :data:`SAMPLING`.
            seed: one for each image, or one number: image b then has seed + b. An image depends on
                its seed and class, not on the batch it is in (but for the rounding of logits). None
                takes torch's generator.
            cuda_graphs: on CUDA, replay a graph for each scale. The first call of a shape captures
                them; they are kept until another shape or a move of the model.
            on_scale: is told the tokens so far [B, l] after each scale, coarse to fine. The
                tokenizer decodes them: ``tokenizer.decode(tokens)``.
            settings: fields of ``sampling`` to change, such as ``guidance=3.0``, ``top_k=900``.

        Raises:
            ValueError, TypeError: an argument that does not fit, named in the message.
        """
        return self._draw(
            labels,
            False,
            count=count,
            sampling=sampling,
            seed=seed,
            cuda_graphs=cuda_graphs,
            on_scale=on_scale,
            **settings,
        )[0]

    def _draw(
        self,
        labels: Tensor | None,
        smooth: bool,
        *,
        count: int | None = None,
        sampling: SamplingConfig | None = None,
        seed: int | Sequence[int] | None = None,
        cuda_graphs: bool = False,
        on_scale: OnScale | None = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, L] and, where ``smooth``, the mixed codes [B, L, C]; see :meth:`generate`."""
        for name in ("top_k", "top_p"):  # one step: a single number is meant
            if name in settings and not isinstance(settings[name], tuple):
                settings[name] = (settings[name],)
        sampling = (sampling or SAMPLING).replace(**settings)
        if sampling.guidance < 0:
            raise ValueError(f"guidance must be 0 or more, got {sampling.guidance}")
        if len(sampling.top_k) != 1:
            raise ValueError(f"top_k must be one number, got {sampling.top_k}")
        if labels is not None and count is not None:
            raise ValueError("count is for images without labels")
        classes = self._labels(labels, 1 if count is None else count)
        number = len(classes)
        if number == 0:
            raise ValueError("labels must be [B] with B > 0, got none")
        if sampling.guidance > 0:
            classes = torch.cat([classes, classes.new_full((number,), self.config.classes)])
        seeds = image_seeds(seed, number)
        mix = _Smooth(self, sampling, seeds) if smooth else None
        session = self._session_for(len(classes), cuda_graphs)
        session.set_classes(classes)
        tokens = generate_tokens(
            session,
            self.tokenizer.quantizer,
            number,
            sampling=sampling,
            seeds=seeds,
            cuda_graphs=cuda_graphs,
            mix=mix,
            on_scale=on_scale,
        )
        return tokens, None if mix is None else torch.cat(mix.rows, dim=1)

    def _session_for(self, rows: int, cuda_graphs: bool) -> _Session:
        """New buffers, or with graphs those of the last generation of the same shape."""
        if not cuda_graphs:
            return _Session(self, rows)
        if self.device.type != "cuda":
            raise ValueError(f"cuda_graphs needs the model on CUDA, it is on {self.device}")
        if self._session is None or self._session.rows != rows:
            self._session = _Session(self, rows)
        return self._session

    # ------------------------------------------------------------------ weights

    @classmethod
    def from_released(
        cls,
        source: Mapping[str, Tensor] | str | Path,
        tokenizer: TokenFlowTokenizer,
        *,
        attention: Attention = "scales",
        filename: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> VAR:
        """The model of released weights; its shape is read off them.

        Args:
            source: a state dict, or a torch or safetensors file with one, or a hub id.
            tokenizer: the image tokenizer.
            attention: see the class.
            filename, revision, cache_dir, token, local_files_only: of a hub id; see
                :class:`~tokenflow_ext.models.serialization.hub.Hub`.

        Raises:
            CheckpointError: a key that is missing, unknown or of another shape, a mask that is not
                that of the scales, or a file that cannot be read.
            ConfigError: a tokenizer that does not fit.
        """
        name = "the state dict"
        state: Mapping[str, Tensor]
        hub = Hub(filename, revision, cache_dir, token, local_files_only)
        if isinstance(source, Mapping):
            hub.refuse("a state dict")
            state = source
        else:
            source = resolve(source, hub)
            state, name = read_state_dict(source), str(source)
            if bad := not_finite(original_checkpoint.without_mask(state)):
                raise CheckpointError(f"{source} holds numbers that are not finite, as in {bad[0]}")
        config = original_checkpoint.infer_config(state, tokenizer.config.quantizer.scales, name)
        weights = original_checkpoint.read(state, config, name)
        return cls.of_weights(config, tokenizer, weights, name, attention=attention)

    @classmethod
    def _of_original(
        cls, place: Path, tokenizer: TokenFlowTokenizer, options: dict[str, Any]
    ) -> VAR:
        return cls.from_released(place, tokenizer, **options)

    def to_released(self) -> dict[str, Tensor]:
        """The released form of the weights: the inverse of :meth:`from_released`."""
        return original_checkpoint.write(self.state_dict(), self.config)

    def save_released(self, file: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the weights with exactly the released names, as a torch file.

        Raises:
            OutputError: the file is there, or cannot be written.
        """
        path = Path(file)
        write_torch(path, {k: v.detach().cpu() for k, v in self.to_released().items()}, overwrite)
        return path


class _Smooth:
    """Mixes of codes in the place of drawn ones: see :meth:`VAR.generate`. The noise of an image is
    drawn from its own seed."""

    def __init__(self, model: VAR, sampling: SamplingConfig, seeds: Tensor) -> None:
        quantizer = model.tokenizer.quantizer
        self.codes = quantizer.codes(torch.arange(quantizer.codebook_size, device=model.device))
        self.sampler = MultiStepSampler.of(sampling, model.config.scales)
        self.generators = [
            torch.Generator(model.device).manual_seed(seed) for seed in seeds.tolist()
        ]
        self.rows: list[Tensor] = []

    def __call__(self, logits: tuple[Tensor, Tensor] | Tensor, scale: int) -> Tensor:
        if isinstance(logits, tuple):
            t = self.sampler.guidance_at(scale)
            logits = (1 + t) * logits[0] - t * logits[1]
        ratio = scale / max(1, self.sampler.num_scales - 1)
        noise = torch.stack(
            [
                torch.empty_like(image).exponential_(generator=generator).log_().neg_()
                for image, generator in zip(logits, self.generators, strict=True)
            ]
        )
        temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
        weights = (((1 + ratio) * logits + noise) / temperature).softmax(-1)
        self.rows.append(weights.to(self.codes.dtype) @ self.codes)
        return self.rows[-1]


class _Session(ScaleSession):
    """The buffers of a generation: the keys and values, and what depends on the classes alone."""

    def __init__(self, model: VAR, rows: int) -> None:
        like, config = model.head.weight, model.config
        heads = config.attention_heads
        cache = KeyValueCache(
            like, config.depth, rows, heads, config.channels // heads, model.sequence
        )
        super().__init__(model.sequence, cache, model.device)
        self.model, self.rows = model, rows
        width = config.channels
        self.embedded = like.new_empty(rows, width)
        self.norms = like.new_empty(config.depth, rows, 1, 6, width)

    def set_classes(self, classes: Tensor) -> None:
        """The classes [rows] of the coming generation. The norms' rows are made once for all
        scales."""
        embedded, condition = self.model.condition(classes)
        self.embedded.copy_(embedded)
        for rows, block in zip(self.norms, self.model.blocks, strict=True):
            assert isinstance(block, Block)
            rows.copy_(block.rows(condition))

    def _run(self, inputs: Tensor, scale: int) -> Tensor:
        self.cache.positions = self.sequence.positions(scale)
        for rows, block in zip(self.norms, self.model.blocks, strict=True):
            assert isinstance(block, Block)
            inputs = block.step(inputs, rows, self.cache)
        return self.model.scores(inputs, self.embedded)

    def run_first(self) -> Tensor:
        """From the classes."""
        return self._run(self.model.first_input(self.embedded), 0)

    def run_scale(self, scale: int, f_hat: Tensor) -> Tensor:
        """See the base class."""
        inputs = self.model.image_inputs(f_hat.flatten(2).mT, self.sequence.positions(scale)[0])
        return self._run(inputs.repeat(self.rows // len(inputs), 1, 1), scale)
