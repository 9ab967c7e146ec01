"""The training of an understanding model: projector, or projector and language model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from tokenflow_ext.models import CheckpointError
from tokenflow_ext.models.serialization.files import brief
from tokenflow_ext.models.serialization.pretrained import WEIGHTS_FILE
from tokenflow_ext.models.serialization.transformers_folder import FILES_ALONE, HEADER, answers
from tokenflow_ext.models.understanding import chat
from tokenflow_ext.models.understanding.build import (
    assemble,
    build_processor,
    build_understanding,
    with_image_token,
)
from tokenflow_ext.models.understanding.vision import TokenFlowVisionModel
from tokenflow_ext.train import data
from tokenflow_ext.train.config import UnderstandingConfig
from tokenflow_ext.train.data import captions, conversations, tokens
from tokenflow_ext.train.data.conversations import IGNORED, Batch, Conversation, Example
from tokenflow_ext.train.engine import checkpoint, parallel
from tokenflow_ext.train.engine.distributed import Processes
from tokenflow_ext.train.engine.ema import EMA
from tokenflow_ext.train.engine.optimization import PRECISIONS, OptimizedModel, autocast
from tokenflow_ext.train.engine.random_state import seed_generators, undrawn
from tokenflow_ext.train.engine.task import Task

from . import lora
from .answer_cards import answer_cards
from .language import load_language_model, make_text_tokenizer, reading

_TEXTS = 100_000  # conversations of which a text tokenizer is made, at most
_ANSWER = 64  # ids of an answer that is shown, at most
_TOWER = "vision_tower.tokenizer."


class UnderstandingTask(Task):
    """A language model that learns to answer questions about pictures by their tokens."""

    progress = ("loss",)
    evaluation = ("evaluation", "evaluation")
    metrics = {  # noqa: RUF012
        "known_loss": ("cross-entropy, training conversations", "{:.3f}"),
        "known_right": ("wholly right answers, training conversations", "{:.1%}"),
        "held_out_loss": ("cross-entropy, held-out conversations", "{:.3f}"),
        "held_out_right": ("wholly right answers, held-out conversations", "{:.1%}"),
    }

    def __init__(
        self, config: UnderstandingConfig, group: Processes, resuming: bool = False
    ) -> None:
        self.config, self.group = config, group
        optim = config.optim
        self.partition = data.BatchPartition(optim.batch, optim.accumulate, group.rank, group.world)
        self.joint = optim.batch // optim.accumulate
        seed_generators(config.seed, 0)
        model, self.text = self._build(resuming)
        if config.model.lora.rank:
            self.adapters = lora.add(model, config.model.lora)
        if config.model.checkpointing:
            self._compute_again(model)
        nn.Module.to(model, group.device)
        self.model: LlavaForConditionalGeneration = model
        self.tower = _tower(self.model)
        vision = self.tower.config
        quantizer = self.tower.tokenizer.config.quantizer
        self.form = captions.Form(
            vision.image_size,
            [(side, side) for side in quantizer.scales],
            quantizer.codebook_size,
            partial(tokens.fingerprint, self.tower.tokenizer),
        )
        section = config.data
        self.writer = conversations.Writer(
            self.text, section.template, vision.visual_tokens, section.system, section.mask
        )
        self.pad_id = self.text.pad_token_id
        if self.pad_id is None:
            self.pad_id = self.text.eos_token_id or 0
        known = self._source(section.path, section.images, section.tokens, self._choice())
        self.dataset = conversations.Conversations(
            known, section.group_by_length, self.joint, config.seed
        )
        sets = {"known": known}
        if section.held_out is not None:
            held_out = (section.held_out, section.held_out_images, section.held_out_tokens)
            sets["held_out"] = self._source(*held_out)
        self.evaluated = {
            name: conversations.some(source, section.evaluated) for name, source in sets.items()
        }
        trained = self._trained()
        self.sharded = config.parallel == "fsdp" and group.world > 1
        if self.sharded:
            layers = _language(self.model).layers
            kept = self.tower.parameters()
            precision = PRECISIONS[optim.precision]
            parallel.split_weights(self.model, layers, group, precision, kept)
            register_fsdp_forward_method(self.model, "generate")
            trained = self._trained()
        self.optimized_model = OptimizedModel(
            self.model,
            trained,
            optim.lr,
            optim,
            group,
            called=self._called(),
            find_unused=known.some_without_picture,
        )
        self.optimized = {"model": self.optimized_model}
        self.ema = None
        if optim.ema_decay > 0:
            named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            self.ema = EMA(named, optim.ema_decay)

    # -- the model --------------------------------------------------------------------------------

    def _build(self, resuming: bool) -> tuple[LlavaForConditionalGeneration, Any]:
        """The model in float32, and its text tokenizer."""
        config, wanted = self.config, self.config.model
        if config.init is not None:
            model, processor = load_understanding(config.init)
            return model.float().train(), processor.tokenizer
        tokenizer = checkpoint.load_tokenizer(config.tokenizer, config.resolution)[0]
        # Beside adapters the language model is no part of a checkpoint.
        resuming = resuming and not wanted.lora.rank
        if config.language_model is not None:
            language, text = load_language_model(config.language_model)
        else:
            text = self._text_tokenizer()
            shape = wanted.backbone.to_transformers(len(with_image_token(text)))
            shape.bos_token_id, shape.eos_token_id = text.bos_token_id, text.eos_token_id
            shape.pad_token_id = text.pad_token_id
            with undrawn(resuming):
                language = AutoModelForCausalLM.from_config(shape)
        text = with_image_token(text)
        with undrawn(resuming):
            model = build_understanding(
                language.float(),
                tokenizer,
                wanted.features,
                text_tokenizer=text,
                window=wanted.window,
                tokenizer_dtype=wanted.tokenizer_dtype,
            )
        return model.train(), text

    @staticmethod
    def _compute_again(model: LlavaForConditionalGeneration) -> None:
        """Activations are computed again in the backward pass."""
        # By whichever name transformers has for it.
        turn_on: Any = getattr(model, "activation_checkpointing_enable", None)
        if turn_on is None:
            turn_on = model.gradient_checkpointing_enable
        turn_on({"use_reentrant": False})

    def _called(self) -> nn.Module | None:
        """What a training step calls in the place of the model."""
        return None

    def _choice(self) -> conversations.Choice | None:
        """Which conversations are trained with."""
        return None

    def _text_tokenizer(self) -> PreTrainedTokenizerBase:
        """A text tokenizer made of the data. What is made of them must not depend on itself: the
        texts are read before there is a writer."""
        section = self.config.data
        texts = conversations.texts(section.path, _TEXTS, section.template, section.system)
        text = make_text_tokenizer(texts, self.config.model.vocabulary)
        marks = {"eos_token": "</s>", "pad_token": "<pad>"}
        text.add_special_tokens(marks)  # type: ignore[arg-type]
        if section.template == "chatml":
            text.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        return text

    def _source(
        self,
        path: str,
        images: str | None,
        known: str | None,
        choice: conversations.Choice | None = None,
    ) -> conversations.Source:
        section, seed = self.config.data, self.config.seed
        return conversations.open_source(
            path, images, known, self.writer, self.form, section, self.joint, seed, choice
        )

    def _trained(self) -> list[nn.Parameter]:
        """The parameters that are trained; the others need no gradient from here on."""
        parts = {
            "projector": self.model.model.multi_modal_projector,
            "language_model": _language(self.model),
            "head": self.model.lm_head,
        }
        wanted = set(self.config.model.trained)
        if "language_model" in wanted:
            wanted.add("head")
        self.model.requires_grad_(False)
        for name in wanted:
            parts[name].requires_grad_(True)
        if self.config.model.lora.rank:
            for name, parameter in self.model.named_parameters():
                if not name.startswith("model.multi_modal_projector."):
                    parameter.requires_grad_(lora.is_adapter(name))
        return [p for p in self.model.parameters() if p.requires_grad]

    def _autocast(self) -> AbstractContextManager[Any]:
        # Split weights come in half precision already.
        precision = self.config.optim.precision
        return nullcontext() if self.sharded else autocast(precision, self.group.device)

    # -- a step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _on_device(self, batch: Batch) -> Batch:
        """A batch on the device, its pictures as tokens where the features are of tokens."""
        device = self.group.device
        pictures = batch.pictures
        if pictures is not None:
            pictures = pictures.to(device, non_blocking=True)
            if pictures.is_floating_point() and self.tower.config.features != "continuous":
                pictures = self.tower.encode(pictures)
        ids, labels, valid = (part.to(device, non_blocking=True) for part in batch[:3])
        return Batch(ids, labels, valid, pictures)

    def batches(self, position: int) -> Iterator[Any]:
        workers = self.config.data.workers
        collate = conversations.collating(self.pad_id)
        for batch in data.loader(self.dataset, self.partition, position, workers, collate):
            yield self._on_device(batch)

    def _losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of a batch: the sum of the losses of what is learned, which of it is right, and which
        row each is of."""
        columns = learned_columns(batch)
        with self._autocast():
            logits = model(**model_inputs(batch, columns)).logits
        return compared(logits, batch, columns)

    def _mean(self, total: Tensor, batch: Batch) -> Tensor:
        """The sum of a batch's losses over what all processes learn of this micro-batch: theirs
        together are one's."""
        learned = (batch.labels[:, 1:] != IGNORED).sum().float()
        return total / self.group.mean_(learned).clamp(min=1)

    def micro_step(self, batch: Any, step: int) -> dict[str, Tensor]:
        total, _, _ = self._losses(self.optimized_model.parallel, batch)
        loss = self._mean(total, batch)
        self.optimized_model.backward(loss)
        return {"loss": loss}

    # -- what people see --------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Cross-entropy of the answers, and the share of conversations whose answers are wholly
        right, each id predicted from the true ones before (which greedy answers are then, too).

        Of conversations that are trained on, and of held-out ones where there are any.
        """
        values: dict[str, float] = {}
        for name, known in self.evaluated.items():
            loss, right = self._score([example for _, example in known])
            values |= {f"{name}_loss": loss, f"{name}_right": right}
        return values

    def _score(self, examples: list[Example]) -> tuple[float, float]:
        group, local = self.group, self.partition.local
        sums = torch.zeros(4, dtype=torch.float64, device=group.device)
        for start in range(0, len(examples), local * group.world):
            # A process without a share still takes part: its weights may be needed elsewhere.
            own = range(start + group.rank * local, start + (group.rank + 1) * local)
            counted = [i for i in own if i < len(examples)]
            rows = counted or [0]
            batch = conversations.collate(self.pad_id, [examples[i] for i in rows])
            loss, right, of = self._losses(self.model, self._on_device(batch))
            if counted:
                wrong = torch.zeros(len(rows), device=group.device)
                wrong.index_add_(0, of, (~right).float())
                values = (loss.double(), len(right), (wrong == 0).sum(), len(rows))
                sums += torch.tensor([float(value) for value in values]).to(sums)
        group.sum_(sums)
        return (sums[0] / sums[1].clamp(min=1)).item(), (sums[2] / sums[3]).item()

    def pictures(self) -> tuple[Tensor, Tensor] | None:
        """Pictures, and cards with a question, the model's answer and the true one."""
        known = self.evaluated.get("held_out", self.evaluated["known"])
        chosen = [(said, example) for said, example in known if example.pictures]
        count = min(self.config.output.pictures, len(chosen))
        if not count:
            return None
        chosen = [chosen[i * len(chosen) // count] for i in range(count)]
        answers = [self._answer(said, example) for said, example in chosen]
        images = [self._image(example.pictures[0]) for _, example in chosen]
        if any(image is None for image in images):
            return None  # tokens, of a tokenizer that decodes no images
        return answer_cards(
            torch.stack([image for image in images if image is not None]),
            [
                (said.turns[0].text.replace(chat.IMAGE, "").strip(), answer, said.turns[1].text)
                for (said, _), answer in zip(chosen, answers, strict=True)
            ],
        )

    def _image(self, picture: Tensor) -> Tensor | None:
        if picture.is_floating_point():
            return picture
        image = self.tower.tokenizer.decode(picture[None].to(self.group.device))[0]
        return None if image is None else image[0].float().cpu()

    def _answer(self, said: Conversation, example: Example) -> str:
        """The model's greedy answer to the first question."""
        first = next(i for i, label in enumerate(example.labels) if label != IGNORED)
        asked = example._replace(ids=example.ids[:first], labels=example.labels[:first])
        before = sum(turn.text.count(chat.IMAGE) for turn in said.turns[:1])
        asked = asked._replace(pictures=example.pictures[:before])
        batch = self._on_device(conversations.collate(self.pad_id, [asked]))
        generate = cast(Any, self.model).generate
        with self._autocast():
            found = generate(
                input_ids=batch.ids,
                attention_mask=batch.valid,
                pixel_values=batch.pictures,
                max_new_tokens=_ANSWER,
                do_sample=False,
                pad_token_id=self.pad_id,
                eos_token_id=self.text.eos_token_id,
            )
        answer = self.text.decode(found[0, first:], skip_special_tokens=True)
        assert isinstance(answer, str)
        return answer.strip()

    def headline(self) -> str:
        count = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        rows = self.tower.config.visual_tokens
        return (
            f"{count / 1e6:.2f} M parameters trained, {self.dataset.describe()}, {rows} visual "
            "tokens a picture"
        )

    def listing(self) -> Iterator[str]:
        yield from self.dataset.source.listing()
        for known in self.evaluated.values():
            for said, _ in known:
                yield repr(said)

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self, weights: dict[str, Tensor], folder: Path) -> None:
        if self.config.model.lora.rank:
            lora.save(weights, folder, self.adapters)
            weights = lora.merged(weights, self.config.model.lora)
        config: Any = copy.deepcopy(self.model.config)
        model = assemble(config.vision_config, config.text_config, config.image_token_id)
        model.config = config
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        model.generation_config = self.model.generation_config
        model.save_pretrained(folder, max_shard_size="1000GB")  # one file, as checkpoints have
        template = chat.template(self.config.data.template, self.config.data.system)
        build_processor(
            model, self.text, chat_template=template, do_pad=self.config.data.pad
        ).save_pretrained(folder)

    def check(self, path: Path) -> None:
        own = self.tower.tokenizer.state_dict()
        try:
            with safe_open(path / WEIGHTS_FILE, framework="pt") as file:
                found = {
                    key.partition(_TOWER)[2]: file.get_tensor(key)
                    for key in file.keys()  # noqa: SIM118 - no mapping
                    if _TOWER in key
                }
        except Exception as error:  # the reader raises many kinds
            raise CheckpointError(f"{path / WEIGHTS_FILE}: {brief(error)}") from error
        same = own.keys() == found.keys()
        if not (same and all(torch.equal(v.cpu(), found[k]) for k, v in own.items())):
            raise CheckpointError(
                f"{path} was trained on the tokens of another image tokenizer than "
                f"{self.config.init or self.config.tokenizer}"
            )

    def weights(self, path: Path) -> dict[str, Tensor]:
        saved = load_understanding(path)[0].state_dict()
        if not self.config.model.lora.rank:
            return saved
        # The language model itself was not trained, and is there; saved it is merged.
        projector = {k: v for k, v in saved.items() if ".multi_modal_projector." in k}
        return self.model.state_dict() | projector | lora.load(path)

    def restore(self, path: Path) -> None:
        saved = load_understanding_processor(path).tokenizer
        if saved.get_vocab() != self.text.get_vocab():
            raise CheckpointError(
                f"{path} has another text tokenizer than the one made of {self.config.data.path}"
            )


def learned_columns(batch: Batch) -> Tensor:
    """The columns of a batch that predict what is learned: of the others no logits are needed.
    Waits for the device."""
    # Position i predicts i + 1.
    return (batch.labels[:, 1:] != IGNORED).any(0).nonzero().squeeze(1)


def model_inputs(batch: Batch, columns: Tensor) -> dict[str, Any]:
    """What a model is called with, for its logits at these columns."""
    return {
        "input_ids": batch.ids,
        "attention_mask": batch.valid,
        "pixel_values": batch.pictures,
        "use_cache": False,
        "logits_to_keep": columns,
    }


def compared(logits: Tensor, batch: Batch, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a batch's logits at these columns: the sum of the losses of what is learned, which of it
    is right, and which row each is of."""
    wanted = batch.labels[:, 1:][:, columns]
    chosen = wanted != IGNORED
    found, wanted = logits[chosen].float(), wanted[chosen]
    loss = F.cross_entropy(found, wanted, reduction="sum")
    return loss, found.detach().argmax(-1) == wanted, chosen.nonzero()[:, 0]


def _language(model: LlavaForConditionalGeneration) -> Any:
    return model.model.language_model


def _tower(model: LlavaForConditionalGeneration) -> TokenFlowVisionModel:
    tower = model.model.vision_tower
    assert isinstance(tower, TokenFlowVisionModel)
    return tower


def load_understanding(place: str | Path) -> tuple[LlavaForConditionalGeneration, Any]:
    """An understanding model and its processor: of a run, one of its checkpoints, or a folder that
    ``save_pretrained`` wrote.

    Raises:
        CheckpointError: none there, or one that cannot be read.
    """
    folder = checkpoint.find(str(place))
    if not answers(folder):
        # Before a model is made: transformers would make one of its default sizes.
        raise CheckpointError(
            f"{folder} holds no understanding model: {HEADER} is not of a LLaVA over a tokenizer"
        )
    with reading(f"the understanding model in {folder}", CheckpointError):
        model = LlavaForConditionalGeneration.from_pretrained(folder, **FILES_ALONE)
    return model, load_understanding_processor(folder)


def load_understanding_processor(folder: Path) -> Any:
    """The processor beside a model.

    Raises:
        CheckpointError: none there, or one that cannot be read.
    """
    with reading(f"the processor in {folder}", CheckpointError):
        return AutoProcessor.from_pretrained(folder, **FILES_ALONE)
