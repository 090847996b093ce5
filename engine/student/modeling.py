"""The student encoder as a transformers model.

One forward pass serves three callers: users (`last_hidden_state`, pooled [CLS]), the search (`architecture=...` runs
a subnet on views of the stored weights) and distillation (`states_layers=...` records embeddings, layer outputs,
queries and keys). Parameter names follow EfficientBERT's published checkpoints.

Rejected: transformers' output-capturing hooks for hidden states. They cannot give queries and keys of chosen layers,
and they differ between the versions of transformers we support.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from engine.architecture.architecture import Architecture
from engine.errors import UserError
from engine.handover.known import ENCODER, HandOver
from engine.states import EncoderStates, Recorder
from engine.student.attention import TeacherHeads, extended_mask
from engine.student.configuration import FFNASConfig
from engine.student.embeddings import FFNASEmbeddings
from engine.student.encoder import FFNASLayer, Planner
from engine.student.fast_pass import FastPass, known
from engine.student.ffn import FFNPlan
from engine.student.first_token import reads_first
from engine.student.outputs import FFNASModelOutput
from engine.student.pooling import build_pooler
from kernels.ffn.modules import KronLinear

if TYPE_CHECKING:
    from collections.abc import Iterator

    class Layers(nn.ModuleList):
        """A module list, for type checkers: of layers."""

        def __iter__(self) -> Iterator[FFNASLayer]: ...
        def __getitem__(self, index: int) -> FFNASLayer: ...  # type: ignore[override]


ALL_LAYERS = "all"
"""Value of `states_layers` that records every layer."""


class FFNASPreTrainedModel(PreTrainedModel):
    """What the encoder and every head share."""

    config: FFNASConfig
    config_class = FFNASConfig
    base_model_prefix = "ffnas"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # `Trainer`: our losses are means over the batch it passed
    _no_split_modules = ["FFNASLayer", "FFNASEmbeddings"]  # noqa: RUF012  transformers reads a list
    _supports_sdpa = True
    _supports_attention_backend = True

    native_head: ClassVar[str | None] = None
    """The head's kind for `engine.student.native`, which does not know every one."""
    native_scores: ClassVar[str] = "classifier"
    """The attribute that holds the head's last layer."""
    native_labels: ClassVar[tuple[str, ...] | None] = None
    """Names of the scores; None for those of the configuration."""
    hand_over: ClassVar[HandOver]
    """How others know it."""

    def __init__(self, config: FFNASConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.fast_pass = FastPass()

    def from_runtime(
        self, wanted: str, given: tuple[Any, Any, Any], not_known: Sequence[Any], others: Mapping[str, Any]
    ) -> Tensor | None:
        """What one call of the runtime gives (`engine.student.fast_pass`), else None.

        Args:
            wanted: `head` or `hidden`.
            given: ids, mask and types [B, S].
            not_known: arguments that the runtime does not take: with any of them the layers run.
            others: likewise, by name; None and False ask for nothing.
        """
        asked = any(v is not None for v in not_known) or any(v is not None and v is not False for v in others.values())
        if asked or self.config.output_hidden_states or self.config.output_attentions:
            return None
        return self.fast_pass(self, *given, wanted)

    @property
    def base_model(self) -> FFNASModel:
        """The encoder: this model itself, or the one inside."""
        found: Any = getattr(self, self.base_model_prefix, self)  # or what a user has put around it
        return found

    def answer(self, hidden: Tensor, attention_mask: Tensor) -> Tensor | None:
        """The head's output, as `forward` gives it, from the last layer's [rows, S, H] and the batch's mask [..., S];
        None without a head."""
        return None

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, KronLinear):
            module.reset_parameters(std=self.config.initializer_range)
        else:
            super()._init_weights(module)

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        architecture: Architecture | None = None,
        layers: Sequence[int] | None = None,
        score_targets: Sequence[TeacherHeads] | None = None,
    ) -> EncoderStates:
        """What distillation compares, with gradients; logits where the model has a classification head.

        Args:
            input_ids, attention_mask, token_type_ids: [B, S]; the mask is true at real tokens.
            architecture: the subnet to run, None for everything stored.
            layers: 0-based layers to record, None for all; no other layer's output is kept.
            score_targets: as of `FFNASModel.forward`.

        Raises:
            UserError: a layer does not exist, or the architecture does not fit (see `Planner`).
        """
        out = self(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            architecture=architecture,
            states_layers=ALL_LAYERS if layers is None else tuple(layers),
            score_targets=score_targets,
            return_dict=True,
        )
        return out.states


@known
class FFNASModel(FFNASPreTrainedModel):
    """Embeddings and encoder; `fit_dense` (H to H_t, used only by the distillation losses) where the config has one.

    Args:
        config: sizes and layers.
        add_pooling_layer: whether to have the pooler.

    Raises:
        UserError: the config's values do not fit together.
    """

    native_head = "none"
    hand_over = ENCODER

    def __init__(self, config: FFNASConfig, add_pooling_layer: bool = True) -> None:
        config.check()
        super().__init__(config)
        self.gradient_checkpointing = False
        self.planner = Planner(config)
        self.embeddings = FFNASEmbeddings(config)
        stored = zip(self.planner.full, self.planner.heads, strict=True)
        layers = nn.ModuleList(FFNASLayer(config, i, plan, heads) for i, (plan, heads) in enumerate(stored))
        self.encoder = cast("Layers", layers)
        self.cls_pooler = build_pooler(config) if add_pooling_layer else None
        teacher = config.teacher_hidden_size
        self.fit_dense = None if teacher is None else nn.Linear(config.hidden_size, teacher)
        self.post_init()

    def pooled(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, H] what heads read, from the last layer's output [B, S, H]; mean pooling needs the mask [B, S]."""
        assert self.cls_pooler is not None  # models whose head reads it have it
        pooled: Tensor = self.cls_pooler(hidden, attention_mask)
        return pooled

    def get_input_embeddings(self) -> nn.Embedding:
        """The token table."""
        return self.embeddings.token_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token table, by a table."""
        self.embeddings.token_embeddings = cast("nn.Embedding", value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        architecture: Architecture | None = None,
        states_layers: Sequence[int] | str | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        score_targets: Sequence[TeacherHeads] | None = None,
        first_token_only: bool = False,
        **kwargs: Any,
    ) -> FFNASModelOutput:
        """Runs the encoder.

        Args:
            input_ids: [B, S], or `inputs_embeds`: [B, S, width of the token table].
            attention_mask: [B, S], true or 1 at real tokens; None for no padding.
            token_type_ids, position_ids: [B, S], None for all 0 and 0..S-1.
            architecture: the subnet to run on views of the stored weights, None for everything stored.
            states_layers: 0-based layers to record into `states`, `"all"`, or None for no recording.
            output_hidden_states: return embeddings and every layer's output.
            output_attentions: return attention probabilities (attention implementation `eager` only).
            score_targets: the teacher's queries and keys of the recorded layers, for the score loss; where attention
                computes it (`engine.student.attention`), `states` hold it in place of queries and keys.
            first_token_only: the caller reads no other row of the output: `last_hidden_state` is [B, 1, H] where that
                is less work (`engine.student.first_token`).
            **kwargs: passed on to the attention function.

        Raises:
            UserError: bad arguments, see `Planner` and `FFNASEmbeddings`.
        """
        if not first_token_only:
            not_known = (position_ids, inputs_embeds, architecture, states_layers, score_targets)
            others = {"hidden": output_hidden_states, "attentions": output_attentions, **kwargs}
            found = self._rows_from_runtime((input_ids, attention_mask, token_type_ids), not_known, others)
            if found is not None:
                return found
        keep_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_attention = self.config.output_attentions if output_attentions is None else output_attentions
        if keep_attention and self.config._attn_implementation != "eager":
            raise UserError(
                f"output_attentions: attention {self.config._attn_implementation!r} keeps no probabilities;"
                ' load the model with attn_implementation="eager"'
            )
        record = self._recorded_layers(states_layers)
        plans = self.planner(architecture)
        x = embedded = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        mask = extended_mask(self.config, x, attention_mask)
        hidden_states: list[Tensor] = [x]
        attentions: list[Tensor | None] = []
        recorder = Recorder(embedded)
        teachers = self._score_teachers(record, score_targets, plans)
        wants_rows = bool(record) or keep_hidden or keep_attention or bool(kwargs)
        last = max(index for index, plan in enumerate(plans) if not plan.skipped)
        short = first_token_only and self.config.pooling == "cls" and not wants_rows
        short = short and reads_first(self.encoder[last], mask, plans[last])
        for index, (layer, plan) in enumerate(zip(self.encoder, plans, strict=True)):
            if short and index == last:
                x = layer.first(x, mask, plan)[:, None]
                break
            own = kwargs if index not in teachers else {**kwargs, "teacher": teachers[index]}
            x, query, key, probabilities, losses = self._run_layer(layer, x, mask, plan, own)
            if index in record:
                recorder.add(x, query, key, 1.0 if query is None else layer.block.scaling, losses)
            if keep_hidden:
                hidden_states.append(x)
            if keep_attention:
                attentions.append(probabilities)
        states = None if states_layers is None else recorder.states()
        return FFNASModelOutput(
            last_hidden_state=x,
            pooler_output=None if self.cls_pooler is None else self.cls_pooler(x, attention_mask),
            hidden_states=tuple(hidden_states) if keep_hidden else None,
            attentions=cast("tuple[Tensor, ...]", tuple(attentions)) if keep_attention else None,
            states=states,
        )

    def _rows_from_runtime(
        self, given: tuple[Any, Any, Any], not_known: Sequence[Any], others: Mapping[str, Any]
    ) -> FFNASModelOutput | None:
        rows = self.from_runtime("hidden", given, not_known, others)
        if rows is None:
            return None
        pooled = None if self.cls_pooler is None else self.cls_pooler(rows, given[1])
        return FFNASModelOutput(last_hidden_state=rows, pooler_output=pooled)

    def _run_layer(
        self, layer: FFNASLayer, x: Tensor, mask: Any, plan: FFNPlan, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(partial(layer, **kwargs), x, mask, plan)
        return layer(x, mask, plan, **kwargs)

    def _score_teachers(
        self, record: Sequence[int], targets: Sequence[TeacherHeads] | None, plans: Sequence[FFNPlan]
    ) -> dict[int, TeacherHeads]:
        """The teacher's queries and keys by layer."""
        if targets is None:
            return {}
        if len(targets) != len(record):
            raise UserError(
                f"layers: the student records {len(record)} layers, the teacher gave queries and keys of"
                f" {len(targets)}: ask the teacher for layer_map(student layers, teacher layers)"
            )
        for index in record:
            heads = self.encoder[index].heads(plans[index])
            if heads != self.config.num_attention_heads:
                raise UserError(
                    f"attention: layer {index} runs {heads} of {self.config.num_attention_heads} heads, and scores are"
                    " compared head by head: set the attention weight to 0"
                )
        return dict(zip(record, targets, strict=True))

    def _recorded_layers(self, layers: Sequence[int] | str | None) -> Sequence[int]:
        count = len(self.encoder)
        if layers is None:
            return ()
        if isinstance(layers, str):
            if layers != ALL_LAYERS:
                raise UserError(f"layers: must be layer numbers or {ALL_LAYERS!r}, got {layers!r:.60}")
            return range(count)
        for layer in layers:
            if not 0 <= layer < count:
                raise UserError(f"layers: layer {layer} does not exist; the model has layers 0 to {count - 1}")
        return layers
