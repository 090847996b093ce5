"""A teacher: any bidirectional transformers encoder, seen through one forward pass.

`Teacher.states` gives the embedding output, chosen layers' outputs and scaled queries and keys, and the logits. The
model stays an ordinary transformers model: no patched code, and what `save` writes loads anywhere. Hidden states come
from `output_hidden_states`, whose meaning (embedding output, then each layer's output) every family shares; only the
wanted ones are kept.

Rejected: hooks on layer modules. They would free unwanted layers' outputs a little earlier and need to know, for each
family, which module is a layer.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.data.tokenizing import model_positions
from engine.errors import UserError
from engine.model_sources import TeacherSource, load_tokenizer, quiet, require_rows, resolve
from engine.states import EncoderStates, answers
from engine.student.modeling import FFNASPreTrainedModel
from engine.teacher.capture import CAPTURE, recording
from engine.teacher.loading import load_model, names_labels, placed, standardised
from engine.teacher.rounded import rounded_copy

if TYPE_CHECKING:
    from engine.data import Batch, TaskSpec

_PROBE_LENGTH = 3


class Teacher:
    """An encoder that teaches, with or without a task head; in eval mode, never trained here.

    Args:
        model: a transformers encoder, or one with a head for classes, spans or choices.
        tokenizer: its tokenizer.
        name: what the user called it.
        has_head: whether the task head was loaded rather than freshly initialized.
        knows_labels: whether that head's label names are the task's.

    Attributes:
        metrics: of `select`, where it was evaluated.
        folder: cache entry, of fine-tuned ones.
        notes: what its fine-tuning or loading has to say, a line each.

    Raises:
        UserError: the model is no bidirectional encoder whose attention goes through transformers' interface.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, *, name: str, has_head: bool = False, knows_labels: bool = False
    ) -> None:
        self.model = model.eval()
        self._rounded: tuple[object, PreTrainedModel] | None = None
        self.tokenizer = tokenizer
        self.name = name
        self.has_head = has_head
        self.knows_labels = knows_labels
        self.metrics: dict[str, float] = {}
        self.folder: Path | None = None
        self.notes: list[str] = []
        config = model.config
        self.hidden_size = int(config.hidden_size)
        self.num_layers = int(config.num_hidden_layers)
        self.num_heads = int(config.num_attention_heads)
        require_rows(tokenizer, config.vocab_size, name)
        self._takes_types = _takes_token_types(self.encoder)
        self._install_capture()

    @classmethod
    def load(
        cls,
        source: str | Path | TeacherSource,
        task: TaskSpec | None = None,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        standard: bool = False,
        published: bool = False,
    ) -> Teacher:
        """Load a teacher.

        Args:
            source: hub name, folder, `package:NAME`, or the name of an installed package.
            task: load (or, where the source has none that fits, freshly initialize) a head for this task.
            device: where the model goes.
            seed: of a fresh head.
            standard: make the model one of ours (`engine.student.from_encoder`) where its family is known.
            published: run a BERT as EfficientBERT's published code does (`engine.teacher.loading`).

        Raises:
            UserError: not found, not loadable, or no suitable encoder.
        """
        found = source if isinstance(source, TeacherSource) else resolve(str(source))
        model, has_head = load_model(found, task, seed=seed, published=published)
        reason = None
        if standard:
            model, reason = standardised(model, found, has_head=has_head, seed=seed)
        knows = has_head and task is not None and names_labels(found, task)
        tokenizer = load_tokenizer(found, published=published)
        made = cls(placed(model, device), tokenizer, name=found.name, has_head=has_head, knows_labels=knows)
        if reason is not None:
            made.notes.append(f"teacher {found.name!r} stays as it is ({reason}): the student has layers of its own")
        return made

    @property
    def is_standard(self) -> bool:
        """Whether the model is one of ours, so that its layers can be a student's."""
        return isinstance(self.model, FFNASPreTrainedModel)

    @property
    def encoder(self) -> PreTrainedModel:
        """The model without its task head."""
        return self.model.base_model

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the model has positions for; None when its config does not say."""
        return model_positions(self.model.config)

    @torch.no_grad()
    def states(
        self, batch: Batch, layers: Sequence[int], need_logits: bool = True, *, bf16: bool = False
    ) -> EncoderStates:
        """What distillation compares, from one forward pass without gradients.

        Args:
            batch: on the model's device.
            layers: 0-based layers to keep, in the order they are wanted.
            need_logits: also run the task head, if there is one.
            bf16: under bf16 autocast, with weights rounded once (`rounded`) instead of in every pass.

        Returns:
            Embeddings and hidden [B, S, H], queries (scaled) and keys [B, heads, S, d], and the head's outputs
            (`TaskHead.answer_shape`) or None. Of multiple choice states have B * choices rows.

        Raises:
            UserError: a layer does not exist.
        """
        wrong = [layer for layer in layers if not 0 <= layer < self.num_layers]
        if wrong:
            raise UserError(f"layers: the teacher has layers 0..{self.num_layers - 1}, asked for {wrong}")
        with_head = need_logits and self.model is not self.encoder
        model = self.rounded() if bf16 else self.model
        precision = torch.autocast(self.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
        with recording(layers) as recorder, precision:
            encoder: Any = model.base_model
            out = self._forward(model if with_head else encoder, batch, output_hidden_states=True)
        hidden = out.hidden_states
        return EncoderStates(
            embeddings=hidden[0],
            hidden=tuple(hidden[layer + 1] for layer in layers),
            queries=tuple(recorder.queries[layer] for layer in layers),
            keys=tuple(recorder.keys[layer] for layer in layers),
            logits=answers(out) if with_head else None,
        )

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Outputs of the task head (`TaskHead.answer_shape`).

        Raises:
            UserError: loaded without a task.
        """
        if self.model is self.encoder:
            raise UserError(f"teacher {self.name!r} was loaded without a task and gives no logits: load it with one")
        return answers(self._forward(self.model, batch))

    def rounded(self) -> PreTrainedModel:
        """The model with bfloat16 weights in its linear layers, for passes under bf16 autocast; all else is shared.

        Results are those of autocast over the model itself, up to its own rounding (`engine.teacher.rounded`). Made
        anew when the weights have changed.
        """
        versions = tuple(p._version for p in self.model.parameters())
        if self._rounded is None or self._rounded[0] != (self.device, versions):
            self._rounded = ((self.device, versions), rounded_copy(self.model))
        return self._rounded[1]

    def to(self, device: torch.device | str) -> Teacher:
        """Move the model in place."""
        self.model.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write model (safetensors) and tokenizer as transformers does; loadable without ffnas unless it is of ours."""
        with quiet():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward for `batch`."""
        kwargs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self._takes_types:
            kwargs["token_type_ids"] = batch.token_type_ids
        return kwargs

    def _forward(self, model: PreTrainedModel, batch: Batch, **options: Any) -> Any:
        if model.training:
            model.eval()
        inputs = self.inputs(batch)
        if model.base_model is model:  # without a head: all sequences, one after the other
            inputs = {name: value.flatten(0, -2) for name, value in inputs.items()}
        return model(**inputs, return_dict=True, **options)

    def _install_capture(self) -> None:
        """Route attention through the capture function and prove with a tiny pass that it is used everywhere."""
        kind = type(self.model).__name__
        self.model.set_attn_implementation(CAPTURE)
        refused = (
            f"teacher {self.name!r}: the attention of {kind} does not go through transformers' attention interface, "
            "so its queries and keys cannot be seen: choose a BERT, RoBERTa, ELECTRA, MiniLM, DistilBERT or similar"
        )
        if self.encoder.config._attn_implementation != CAPTURE:
            raise UserError(refused)
        ids = torch.ones(1, _PROBE_LENGTH, dtype=torch.long, device=self.device)
        with torch.no_grad(), recording(range(self.num_layers)) as recorder:
            out = self.encoder(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, return_dict=True)
        if recorder.calls != self.num_layers:
            raise UserError(f"{refused} ({recorder.calls} attention calls seen, {self.num_layers} layers)")
        states = out.hidden_states
        if len(states) != self.num_layers + 1 or any(h.shape[-1] != self.hidden_size for h in states):
            raise UserError(
                f"teacher {self.name!r}: {kind} gives {len(states)} hidden states of widths "
                f"{sorted({h.shape[-1] for h in states})}; {self.num_layers + 1} of width {self.hidden_size} are needed"
            )
        heads = {q.shape[1] for q in recorder.queries.values()}
        if heads != {self.num_heads}:
            raise UserError(f"teacher {self.name!r}: attention has {sorted(heads)} heads, its config {self.num_heads}")


def _takes_token_types(encoder: nn.Module) -> bool:
    """Whether segment ids mean anything to the model: DistilBERT takes none, RoBERTa knows one segment only."""
    takes = "token_type_ids" in inspect.signature(encoder.forward).parameters
    return takes and getattr(encoder.config, "type_vocab_size", 0) > 1
