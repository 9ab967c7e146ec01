"""Text to image by next-scale prediction: a Llama-family transformer over text, then all scales.

Method: arXiv 2412.03069, section 3.3. The keys of :meth:`TextToImage.state_dict` are those of the
original weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from tokenflow_ext._deprecated import RenamedAttribute
from tokenflow_ext.models.metrics import to_uint8
from tokenflow_ext.models.serialization.config import CheckpointError, ConfigError
from tokenflow_ext.models.serialization.hub import Hub, resolve
from tokenflow_ext.models.serialization.pretrained import SavedForm, not_finite
from tokenflow_ext.models.serialization.push import Card
from tokenflow_ext.models.serialization.state_dict import read_state_dict
from tokenflow_ext.models.tokenizer.model import TokenFlowTokenizer
from tokenflow_ext.sampler import SamplingConfig

from . import original_checkpoint
from .backbone import Backbone, Cache, Rotary, rotary
from .over_tokenizer import NextScaleTransformer
from .rope import RopeConfig
from .sequence import (
    BackboneConfig,
    NextScaleSequence,
    TextToImageConfig,
    TextTokenizer,
    encode_prompts,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from .generation import OnScale, Session

NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, "
    "username, blurry."
)


_USAGE = """
from tokenflow_ext.models import TextToImage

model = TextToImage.from_pretrained("REPOSITORY")
# text_tokenizer: one of transformers, that the model was trained with
images = model.generate(["a red circle"], text_tokenizer, seed=0)   # uint8 [1, 3, H, W]
"""


class TextToImageOutput(NamedTuple):
    """What :meth:`TextToImage.forward` gives."""

    loss: Tensor
    """Mean cross-entropy of the image tokens, scalar float32 (float64 in float64)."""
    logits: Tensor
    """[B, L, K] over the image vocabulary alone, in the head's dtype."""


# FlexAttention compiles for CUDA from this width on.
FLEX_HEAD_WIDTH = 16


class TextToImage(NextScaleTransformer):
    """Next-scale text-to-image transformer (arXiv 2412.03069, section 3.3).

    Weights start random; :meth:`from_language_model` starts from a pretrained transformer,
    :meth:`from_original` takes the original weights.

    Args:
        config: shape of everything.
        tokenizer: the image tokenizer, frozen, beside the module: see the base class.
        attention: ``sdpa``, or ``flex`` for FlexAttention in the training forward (compiled on
            CUDA, where it skips the blocks that the mask empties).

    Attributes:
        unused_tensors, original_header: of an original model, the buffers that are no weights here
            and the ``config.json`` it was read with; :meth:`save_original` alone writes them.

    Raises:
        ConfigError: a tokenizer that does not fit the configuration.
    """

    form = SavedForm(
        "tokenflow-text-to-image",
        2,
        "no saved text-to-image model's",
        "since 2 a layer's norms act on what attention and MLP give, as in the paper, before on "
        "what they take: a model of version 1 has to be trained anew",
    )
    kind = "text to image"
    card = Card("text-to-image model", ("image-generation",), _USAGE, "text-to-image")
    config_class = TextToImageConfig
    config: TextToImageConfig

    def __init__(
        self,
        config: TextToImageConfig,
        tokenizer: TokenFlowTokenizer,
        *,
        attention: Literal["sdpa", "flex"] = "sdpa",
    ) -> None:
        super().__init__(config, tokenizer)
        if attention not in ("sdpa", "flex"):
            raise ValueError(f"attention must be 'sdpa' or 'flex', got {attention!r}")
        width = config.backbone.width_of_head
        if attention == "flex" and width < FLEX_HEAD_WIDTH:
            raise ConfigError(
                f"attention='flex' needs heads of {FLEX_HEAD_WIDTH} channels or more, as "
                f"FlexAttention's CUDA kernels do, got {width}: use attention='sdpa'"
            )
        self.attention = attention
        self.unused_tensors: dict[str, Tensor] = {}
        self.original_header: dict[str, Any] | None = None
        self._session: Session | None = None

        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.backbone.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head, scale and position embeddings as the original's started; the rest resets itself."""
        backbone = self.config.backbone
        nn.init.normal_(self.lm_head.weight, std=backbone.initializer_range)
        for weight in (self.model.lvl_embed.weight, self.model.pos_1LC):
            nn.init.trunc_normal_(weight, std=math.sqrt(1 / (3 * backbone.hidden_size)))

    def forget_buffers(self) -> None:
        """See the base class."""
        self._session = None

    # ------------------------------------------------------------------ parts of the sequence

    def sequence(self, text: int) -> NextScaleSequence:
        """The sequence's definition for prompts of ``text`` positions.

        Raises:
            ValueError: no position, or more than the backbone's positions hold with the image's.
        """
        sequence = NextScaleSequence(self.config.scales, text)
        limit = self.config.backbone.longest
        if text < 1 or sequence.length > limit:
            raise ValueError(
                f"input_ids must have 1 to {limit - self.config.image_tokens + 1} positions, what "
                f"the backbone has beside the image's {self.config.image_tokens}, got {text}"
            )
        return sequence

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """ids [B, T] -> inputs [B, T, hidden]."""
        inputs = self.model.embed_tokens(input_ids) + self.model.lvl_embed.weight[0]
        last = F.pad(self.model.pos_1LC[:1], (0, 0, input_ids.shape[1] - 1, 0))
        return inputs + last.to(inputs.dtype)

    def embed_image(self, features: Tensor, first: int, scale_ids: Tensor) -> Tensor:
        """Inputs of image positions from f-hat at their scales' sizes.

        Args:
            features: [B, n, C].
            first: row of the position embeddings of the first of these positions; 0 is the last
                text position.
            scale_ids: rows of the scale embeddings, [n].
        """
        dtype = next(self.model.mm_projector.parameters()).dtype
        projected = self.model.mm_projector(features.to(dtype))
        positions = self.model.pos_1LC[first : first + features.shape[1]]
        return projected + positions + self.model.lvl_embed(scale_ids)

    def rotary(self, like: Tensor, length: int) -> Rotary:
        """RoPE for a sequence of ``length`` positions, counted from 0 with the padding."""
        return rotary(self.config.backbone, length, like)

    def run_layers(
        self,
        inputs: Tensor,
        rotary: Rotary,
        mask: Tensor | BlockMask | None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The transformer without its last norm, [B, n, hidden] -> [B, n, hidden]."""
        hidden = inputs
        for layer in self.model.layers:
            hidden = layer(hidden, rotary, mask, cache)
        return hidden

    def image_logits(self, hidden: Tensor) -> Tensor:
        """[B, n, hidden] -> [B, n, K]: the image vocabulary's rows of the head alone."""
        first = self.config.text_vocab_size
        weight = self.lm_head.weight[first : first + self.config.codebook_size]
        return F.linear(self.model.norm(hidden), weight)

    # ------------------------------------------------------------------ training

    def forward(
        self, input_ids: Tensor, indices: Tensor, attention_mask: Tensor | None = None
    ) -> TextToImageOutput:
        """Teacher forcing: every scale's tokens from the text and the tokens of earlier scales.

        Args:
            input_ids: prompts [B, T] as :func:`encode_prompts` makes them, left-padded.
            indices: the images' tokens [B, L], scale by scale.
            attention_mask: [B, T], false or 0 where padded; None finds the padding id.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, prompts that are too long; on
                the CPU also ids out of range and a padded last position (elsewhere that would wait
                for the device).
        """
        sequence = self.sequence(self._check_ids("input_ids", input_ids, not input_ids.is_cuda))
        valid = self._valid("attention_mask", input_ids, attention_mask, not input_ids.is_cuda)
        expected = (input_ids.shape[0], self.config.image_tokens)
        if tuple(indices.shape) != expected or indices.dtype != torch.int64:
            raise ValueError(
                f"indices must be {expected} int64, got {tuple(indices.shape)} {indices.dtype}"
            )
        if not indices.is_cuda:
            _check_range("indices", indices, self.config.codebook_size)
        features = self.tokenizer.quantizer.next_scale_inputs(indices)
        scale_ids = sequence.scale_ids().to(input_ids.device)[sequence.text :]
        image = self.embed_image(features, 1, scale_ids)
        inputs = torch.cat([self.embed_text(input_ids), image], dim=1)
        mask = sequence.block_mask if self.attention == "flex" else sequence.mask
        hidden = self.run_layers(inputs, self.rotary(inputs, sequence.length), mask(valid))
        logits = self.image_logits(hidden[:, sequence.text - 1 :])
        scores = logits if logits.dtype == torch.float64 else logits.float()
        return TextToImageOutput(F.cross_entropy(scores.flatten(0, 1), indices.flatten()), logits)

    def _check_ids(self, name: str, ids: Tensor, check: bool) -> int:
        """Refuses prompts that are no ids; returns their length."""
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"{name} must be an int64 tensor, got {got}")
        if ids.dim() != 2 or ids.shape[0] == 0:
            raise ValueError(f"{name} must be [B, T] with B > 0, got {tuple(ids.shape)}")
        if check:
            _check_range(name, ids, self.config.vocab_size)
            image = (ids >= self.config.text_vocab_size) & (ids != self.config.pad_id)
            if bool(image.any()):
                raise ValueError(
                    f"{name} must hold text and padding, got the image token {int(ids[image][0])}"
                )
        return ids.shape[1]

    def _valid(self, name: str, ids: Tensor, mask: Tensor | None, check: bool) -> Tensor:
        """Which prompt positions are no padding, [B, T] bool."""
        if mask is None:
            mask = ids != self.config.pad_id
        if mask.shape != ids.shape:
            raise ValueError(
                f"{name} must be {tuple(ids.shape)} as the ids, got {tuple(mask.shape)}"
            )
        mask = mask.to(ids.device, torch.bool)
        if check and not bool(mask[:, -1].all()):
            raise ValueError(f"{name}: the last position predicts the image and cannot be padding")
        return mask

    # ------------------------------------------------------------------ generation

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        text_tokenizer: TextTokenizer,
        *,
        negative_prompt: str | Sequence[str] = NEGATIVE_PROMPT,
        sampling: SamplingConfig | None = None,
        seed: int | Sequence[int] | None = None,
        cuda_graphs: bool = False,
        on_scale: OnScale | None = None,
        **settings: Any,
    ) -> Tensor:
        """Images [B, 3, H, W] uint8 of prompts.

        Args:
            prompts: one string for each image.
            text_tokenizer: the backbone's text tokenizer.
            negative_prompt: what guidance leads away from, for all images or one for each; the
                empty string is the unconditional model of training.
            sampling, seed, cuda_graphs, on_scale, settings: as :meth:`generate_tokens`.
        """
        negative = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        ids, mask = encode_prompts(prompts, text_tokenizer, self.config)
        negative_ids, negative_mask = encode_prompts(negative, text_tokenizer, self.config)
        indices = self.generate_tokens(
            ids.to(self.device),
            negative_ids.to(self.device),
            attention_mask=mask,
            negative_attention_mask=negative_mask,
            sampling=sampling,
            seed=seed,
            cuda_graphs=cuda_graphs,
            on_scale=on_scale,
            **settings,
        )
        images, _ = self.tokenizer.decode(indices)
        assert images is not None  # the constructor takes no tokenizer without a pixel branch
        return to_uint8(images)

    @torch.no_grad()
    def generate_tokens(
        self,
        input_ids: Tensor,
        negative_ids: Tensor | None,
        *,
        attention_mask: Tensor | None = None,
        negative_attention_mask: Tensor | None = None,
        sampling: SamplingConfig | None = None,
        seed: int | Sequence[int] | None = None,
        cuda_graphs: bool = False,
        on_scale: OnScale | None = None,
        **settings: Any,
    ) -> Tensor:
        """Image tokens [B, L] of prompts, by multi-step sampling with guidance.

        Args:
            input_ids: prompts [B, T], left-padded.
            negative_ids: [B or 1, T]; may be None where guidance is 0.
            attention_mask, negative_attention_mask: shaped as their ids, false or 0 where padded;
                None finds the padding id.
            sampling: how tokens are drawn, by default :class:`tokenflow_ext.SamplingConfig`'s
                three steps. Every step after the first feeds the drawn tokens back and draws anew.
                The first scale is drawn once. At scale k, t = guidance * k / (S - 1), and logits
                are (1 + t) * conditional - t * negative. A guidance of 0 leaves the negative half
                out.
            seed: one for each image, or one number: image b then has seed + b. An image depends on
                its seed and prompts, not on the batch it is in (but for the rounding of logits,
                where a matrix product of another shape sums in another order). None takes torch's
                generator.
            cuda_graphs: on CUDA, replay a graph for each scale. The first call of a shape captures
                them; they are kept until another shape or a move of the model.
            on_scale: is told the tokens so far [B, l] after each scale, coarse to fine. The
                tokenizer decodes them: ``tokenizer.decode(tokens)``.
            settings: fields of `sampling` to change, such as ``guidance=3.0``.

        Raises:
            ValueError, TypeError: an argument that does not fit, named in the message.
        """
        from .generation import generate_tokens, image_seeds, session_for

        sampling = (sampling or SamplingConfig()).replace(**settings)
        text = self._check_ids("input_ids", input_ids, True)
        sequence = self.sequence(text)
        ids, valid = input_ids, self._valid("attention_mask", input_ids, attention_mask, True)
        if sampling.guidance < 0:
            raise ValueError(f"guidance must be 0 or more, got {sampling.guidance}")
        if sampling.guidance > 0:
            if negative_ids is None:
                raise ValueError("negative_ids must be given where guidance is not 0")
            self._check_ids("negative_ids", negative_ids, True)
            count = input_ids.shape[0]
            if negative_ids.shape[1] != text or negative_ids.shape[0] not in (1, count):
                raise ValueError(
                    f"negative_ids must be [{count} or 1, {text}], got {tuple(negative_ids.shape)}"
                )
            negative_valid = self._valid(
                "negative_attention_mask", negative_ids, negative_attention_mask, True
            )
            ids = torch.cat([ids, negative_ids.expand(count, -1)])
            valid = torch.cat([valid, negative_valid.expand(count, -1)])
        return generate_tokens(
            session_for(self, sequence, ids, valid, cuda_graphs),
            self.tokenizer.quantizer,
            input_ids.shape[0],
            sampling=sampling,
            seeds=image_seeds(seed, len(input_ids)),
            cuda_graphs=cuda_graphs,
            on_scale=on_scale,
        )

    # ------------------------------------------------------------------ weights

    @classmethod
    def from_original(
        cls,
        source: Mapping[str, Tensor] | str | Path,
        llama_config: PretrainedConfig | None,
        tokenizer: TokenFlowTokenizer,
        *,
        filename: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> TextToImage:
        """The model of original weights; it takes the tensors over without a copy.

        Args:
            source: a state dict, or where the weights are: a folder of transformers or one file
                (:mod:`.original_checkpoint`), or a hub id. Every key is used: the
                module's own, and ``image_token_start`` and ``image_token_end`` (with any prefix),
                which are held against the vocabulary.
            llama_config: transformers configuration of the backbone; its vocabulary includes the
                image tokens and the padding id. None takes the ``config.json`` in the folder, or
                beside the file.
            tokenizer: the image tokenizer.
            filename, revision, cache_dir, token, local_files_only: of a hub id; see
                :class:`~tokenflow_ext.models.serialization.hub.Hub`.
            options: for the constructor.

        Raises:
            CheckpointError: a key that is missing, unknown or of another shape; a file that is
                missing or cannot be read.
            ConfigError: a configuration that is not supported or does not fit the tokenizer.
        """
        name, header = "the state dict", None
        hub = Hub(filename, revision, cache_dir, token, local_files_only)
        if isinstance(source, Mapping):
            hub.refuse("a state dict")
            state = source
        else:
            source = resolve(source, hub, beside=[original_checkpoint.HEADER])
            state, name = read_state_dict(source), str(source)
            if bad := not_finite(state):
                raise CheckpointError(f"{source} holds numbers that are not finite, as in {bad[0]}")
            if llama_config is None:
                header = original_checkpoint.read_header(source)
                llama_config = original_checkpoint.parse_header(header)
        if llama_config is None:
            raise ConfigError("llama_config must be given for a state dict, got None")
        backbone = BackboneConfig.from_transformers(llama_config)
        codes = tokenizer.config.quantizer.codebook_size
        if type(llama_config.vocab_size) is not int:
            raise ConfigError(f"vocab_size must be int, got {llama_config.vocab_size!r}")
        text_vocab_size = llama_config.vocab_size - codes - 1
        if text_vocab_size < 1:
            raise ConfigError(
                f"vocab_size must hold text, the tokenizer's {codes} image tokens and a padding "
                f"id, got {llama_config.vocab_size}"
            )
        config = TextToImageConfig.for_tokenizer(backbone, tokenizer, text_vocab_size)
        weights, unused = original_checkpoint.split_unused(state, config)
        embeddings = weights.get("model.embed_tokens.weight")
        if llama_config.tie_word_embeddings and embeddings is not None:
            # Two weights from now on: training reaches rows of one that it does not reach of the
            # other.
            weights.setdefault("lm_head.weight", embeddings.clone())
            header = None if header is None else header | {"tie_word_embeddings": False}
        model = cls.of_weights(config, tokenizer, weights, name, **options)
        model.unused_tensors, model.original_header = unused, header
        return model

    @classmethod
    def _of_original(
        cls, place: Path, tokenizer: TokenFlowTokenizer, options: dict[str, Any]
    ) -> TextToImage:
        return cls.from_original(place, None, tokenizer, **options)

    def to_original(self) -> dict[str, Tensor]:
        """The original form of the weights: the inverse of :meth:`from_original`.

        Raises:
            ConfigError: another backbone than a Llama, whose names the original has not.
        """
        family = self.config.backbone.family
        if family != "llama":
            raise ConfigError(
                f"original text-to-image models are of family 'llama', this one is {family!r}: "
                "save_pretrained saves it"
            )
        return self.state_dict() | self.unused_tensors

    def save_original(
        self, path: str | Path, max_shard_size: str = "5GB", *, overwrite: bool = False
    ) -> Path:
        """Writes the weights with exactly the original names into the directory ``path``, as
        transformers and :meth:`from_original` read them; the image tokenizer has a file of its own
        (:meth:`TokenFlowTokenizer.save_original`).

        ``config.json`` is the one that the model was read with, or else a plain Llama's: what the
        original programs look up in theirs besides has to be added by hand.

        Args:
            max_shard_size: the largest file; what does not fit into one goes into several.
            overwrite: whether to replace a model that is there.

        Raises:
            OutputError: a model is there, or the files cannot be written.
            ConfigError: see :meth:`to_original`.
        """
        state = self.to_original()
        header = self.original_header
        if header is None:
            backbone = self.config.backbone
            header = backbone.to_transformers(self.config.vocab_size).to_diff_dict()
            header["rope_theta"] = backbone.rope_theta  # where transformers 4 looks for both
            if backbone.rope != RopeConfig():
                scaling = backbone.rope.to_transformers()
                header["rope_scaling"] = {**scaling, "type": backbone.rope.rope_type}
        return original_checkpoint.write(path, state, header, max_shard_size, overwrite)

    from_released = RenamedAttribute("from_original")
    to_released = RenamedAttribute("to_original")
    save_released = RenamedAttribute("save_original")
    left_aside = RenamedAttribute("unused_tensors")
    released_header = RenamedAttribute("original_header")

    @classmethod
    def from_language_model(
        cls,
        model: PreTrainedModel,
        tokenizer: TokenFlowTokenizer,
        prompt_length: int = 128,
        **options: Any,
    ) -> TextToImage:
        """A model that starts from a pretrained causal language model of transformers.

        Its embeddings and head keep their rows and get random ones for the image tokens and the
        padding; a head tied to the embeddings becomes one of its own. The norms of queries and
        keys, the projector and the other embeddings start as in the constructor. A layer's norms
        keep their weights, though they act on other values from now on (the paper starts from
        Llama-2-7B in the same way): the first steps of training have to mend that.
        """
        backbone = BackboneConfig.from_transformers(model.config)
        rows = model.config.vocab_size
        config = TextToImageConfig.for_tokenizer(backbone, tokenizer, rows, prompt_length)
        made = cls(config, tokenizer, **options).to(next(model.parameters()).dtype)
        start = model.state_dict()
        start.setdefault("lm_head.weight", start["model.embed_tokens.weight"])
        own = made.state_dict()
        with torch.no_grad():
            for key, value in start.items():
                if key not in own:
                    raise CheckpointError(f"the language model has a weight {key} of no use here")
                target = own[key]
                if key in ("model.embed_tokens.weight", "lm_head.weight"):
                    target = target[:rows]
                target.copy_(value)
        return made

    @classmethod
    def check_shapes(
        cls, config: TextToImageConfig, shapes: Mapping[str, tuple[int, ...]], source: str
    ) -> None:
        """See the base class."""
        layers = {key.split(".")[2] for key in shapes if key.startswith("model.layers.")}
        if len(layers) != config.backbone.num_hidden_layers:  # before a million are built
            raise CheckpointError(
                f"{source} has {len(layers)} layers, the configuration asks for "
                f"{config.backbone.num_hidden_layers}"
            )


def _check_range(name: str, ids: Tensor, size: int) -> None:
    if bool(((ids < 0) | (ids >= size)).any()):
        raise ValueError(f"{name} must be in [0, {size}), got {int(ids.min())} to {int(ids.max())}")
