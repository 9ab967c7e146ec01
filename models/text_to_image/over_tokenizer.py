"""What transformers over an image tokenizer's scales have in common: the tokenizer beside the
weights, their saved form, and how both are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tokenflow_ext.models.serialization.config import CheckpointError, ConfigError
from tokenflow_ext.models.serialization.files import read_json
from tokenflow_ext.models.serialization.hub import Hub, resolve
from tokenflow_ext.models.serialization.pretrained import CONFIG_FILE, SavedForm
from tokenflow_ext.models.serialization.push import Card, PushOptions, push
from tokenflow_ext.models.serialization.state_dict import compare, read_weights, weights_file
from tokenflow_ext.models.tokenizer.model import TokenFlowTokenizer

if TYPE_CHECKING:
    from typing import Unpack

    from huggingface_hub import CommitInfo
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FOLDER = "tokenizer"
TEXT_FOLDER = "text_tokenizer"
Model = TypeVar("Model", bound="NextScaleTransformer")


class Shape(Protocol):
    """A configuration that follows an image tokenizer's."""

    @property
    def codebook_size(self) -> int: ...
    @property
    def feature_dim(self) -> int: ...
    @property
    def scales(self) -> tuple[int, ...]: ...
    def to_dict(self) -> dict[str, Any]: ...


class NextScaleTransformer(nn.Module):
    """A transformer over the tokens of an image tokenizer.

    The tokenizer is frozen, used in evaluation mode, and no part of the module's parameters and
    state dict. It follows the model's device, not its dtype (the inputs of a scale are sums over
    all earlier ones).

    Attributes:
        form: how it is saved.
        kind: what messages call it.
        card: what its model card says.
        config_class: of its configuration.
    """

    form: ClassVar[SavedForm]
    kind: ClassVar[str]
    card: ClassVar[Card]
    config_class: ClassVar[Any]
    tokenizer: TokenFlowTokenizer
    config: Any

    def __init__(self, config: Any, tokenizer: TokenFlowTokenizer) -> None:
        super().__init__()
        for name, value, kind in (
            ("config", config, self.config_class),
            ("tokenizer", tokenizer, TokenFlowTokenizer),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
        _check_tokenizer(config, tokenizer, self.kind)
        self.config = config
        # Past Module.__setattr__: not a submodule.
        self.__dict__["tokenizer"] = tokenizer.eval().requires_grad_(False)

    def forget_buffers(self) -> None:
        """Let go of what holds the old weights, or lies where they were."""

    def _apply(self: Model, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        """Moves as every module does; the tokenizer goes along to the device."""
        self.forget_buffers()
        super()._apply(fn, recurse)
        self._move_tokenizer()
        return self

    def _move_tokenizer(self) -> None:
        if not any(weight.is_meta for weight in self.tokenizer.parameters()):
            self.tokenizer.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    # ------------------------------------------------------------------ weights

    @classmethod
    def check_shapes(cls, config: Any, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
        """What is to be said of weights of these shapes before a model is built.

        Raises:
            CheckpointError: they are of another configuration.
        """

    @classmethod
    def of_weights(
        cls: type[Model],
        config: Any,
        tokenizer: TokenFlowTokenizer,
        weights: dict[str, Tensor],
        source: str,
        **options: Any,
    ) -> Model:
        """The model of these weights, which are not copied, for evaluation.

        Args:
            source: what messages call them.
            options: for the constructor.

        Raises:
            CheckpointError: names, shapes or types that do not fit.
        """
        shapes = {key: tuple(value.shape) for key, value in weights.items()}
        return cls._skeleton(config, tokenizer, shapes, source, options)._filled(weights, source)

    @classmethod
    def _skeleton(
        cls: type[Model],
        config: Any,
        tokenizer: TokenFlowTokenizer,
        shapes: Mapping[str, tuple[int, ...]],
        source: str,
        options: dict[str, Any],
    ) -> Model:
        """Without weights (on the meta device), where those of these names and shapes fit."""
        cls.check_shapes(config, shapes, source)
        with torch.device("meta"):
            model = cls(config, tokenizer, **options)
        if difference := compare(shapes, model.state_dict()):
            raise CheckpointError(f"{source} does not fit the configuration: {difference}")
        return model

    def _filled(self: Model, weights: dict[str, Tensor], source: str) -> Model:
        """A skeleton with these weights."""
        own = self.state_dict().items()
        whole = {name for name, value in own if not value.is_floating_point()}
        kinds = {value.dtype: key for key, value in weights.items() if key not in whole}
        if len(kinds) > 1 or not next(iter(kinds)).is_floating_point:
            of = ", ".join(f"{key} is {kind}" for kind, key in kinds.items())
            raise CheckpointError(f"{source}: weights must be of one floating-point type, {of}")
        self.load_state_dict(weights, assign=True)
        self._move_tokenizer()
        return self.eval()

    def save_pretrained(self, path: str | Path) -> Path:
        """Writes ``config.json``, ``model.safetensors`` and the image tokenizer (a directory
        ``tokenizer``) into the directory ``path``. Each file is complete before it takes its name.

        Raises:
            OutputError: another kind of model is there, or the files cannot be written.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        self.form.write(folder, self.config.to_dict(), state)
        return folder

    @classmethod
    def is_saved(cls, path: str | Path) -> bool:
        """Whether a directory says that it was written by :meth:`save_pretrained`.

        Raises:
            CheckpointError: a header that cannot be read.
        """
        return cls.form.is_in(Path(path))

    @classmethod
    def read_config(cls, path: str | Path) -> Any:
        """The configuration in a directory written by :meth:`save_pretrained`.

        Raises:
            CheckpointError: missing, foreign, or of another version.
        """
        return cls.form.read_config(Path(path), cls.config_class.from_dict)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | Path,
        tokenizer: TokenFlowTokenizer | None = None,
        *,
        filename: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> Model:
        """Loads a trained model (in evaluation mode, on the CPU).

        Args:
            path: a directory written by :meth:`save_pretrained`, or original weights, which need
                ``tokenizer``: a file, or a directory of transformers; or a hub id of a repository
                with either.
            tokenizer: the image tokenizer, where it is loaded already; None loads the saved one.
            filename, revision, cache_dir, token, local_files_only: of a hub id; see
                :class:`~tokenflow_ext.models.serialization.hub.Hub`.
            options: for the constructor.

        Raises:
            CheckpointError: a missing, truncated or foreign file, weights that do not fit the
                configuration, or what the hub does not give; the message names file and entry.
            ConfigError: original weights without ``tokenizer``, or an argument of the hub beside a
                path.
        """
        hub = Hub(filename, revision, cache_dir, token, local_files_only)
        original = partial(cls._is_original, alone=tokenizer is None)
        folder = resolve(
            path,
            hub,
            parts=[TOKENIZER_FOLDER] if tokenizer is None else [],
            beside=[CONFIG_FILE],
            check=lambda place: original(place) or cls.read_config(place),
        )
        if original(folder):
            if tokenizer is None:
                raise ConfigError(f"tokenizer is missing: {folder} is a file of weights alone")
            return cls._of_original(folder, tokenizer, options)
        config = cls.read_config(folder)
        beside = tokenizer
        if beside is None:
            beside = TokenFlowTokenizer.from_pretrained(folder / TOKENIZER_FOLDER)
        source = str(weights_file(folder))
        made: list[Model] = []
        weights = read_weights(
            folder,
            lambda shapes: made.append(cls._skeleton(config, beside, shapes, source, options)),
        )
        return made[0]._filled(weights, source)

    @classmethod
    def _is_original(cls, place: Path, alone: bool) -> bool:
        """Whether original weights are at ``place``: a file, or, with a tokenizer given, a folder
        whose header is of transformers."""
        if alone or not (place / CONFIG_FILE).is_file():
            return place.is_file()
        header = read_json(place / CONFIG_FILE, CheckpointError)
        return isinstance(header, dict) and "model_type" in header and not cls.is_saved(place)

    @classmethod
    def _of_original(
        cls: type[Model], place: Path, tokenizer: TokenFlowTokenizer, options: dict[str, Any]
    ) -> Model:
        """The model of original weights at ``place``."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        text_tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Unpack[PushOptions],
    ) -> CommitInfo:
        """Saves to the hub what :meth:`save_pretrained` writes, with a model card, in one commit;
        see :meth:`TokenFlowTokenizer.push_to_hub`.

        Args:
            text_tokenizer: of prompts, saved beside the model, where ``tokenflow generate`` finds
                it.
            repo_id, options: as there.

        Raises:
            ConfigError, OutputError, MissingPackageError: see there.
        """

        def save(folder: Path) -> None:
            self.save_pretrained(folder)
            if text_tokenizer is not None:
                text_tokenizer.save_pretrained(folder / TEXT_FOLDER)

        return push(
            save,
            self.form.is_in,
            self.card,
            self.config.to_dict(),
            repo_id,
            **options,
        )


def _check_tokenizer(config: Shape, tokenizer: TokenFlowTokenizer, kind: str) -> None:
    tokenizer.config.need_one_index(kind)
    quantizer = tokenizer.config.quantizer
    if not tokenizer.config.pixel.enabled:
        raise ConfigError(
            f"the image tokenizer decodes no images (pixel.enabled is false): {kind} needs one "
            "with a pixel branch"
        )
    for name, asked, got in (
        ("codebook_size", config.codebook_size, quantizer.codebook_size),
        ("feature_dim", config.feature_dim, sum(tokenizer.config.dims)),
        ("scales", config.scales, quantizer.scales),
    ):
        if asked != got:
            raise ConfigError(f"{name} is {asked} in the configuration, the tokenizer has {got}")
