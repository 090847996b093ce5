"""Configuration of the student: every size, and one FFN specification per layer.

`layers` says which weights a model *stores*: layer l keeps `stack` FFNs of inner width int(ratio * F) and, where it has
`heads`, only so many of the attention heads, and runs `expression` in its FFNs unless a forward pass names another
architecture. A supernet is a config whose layers are all at the largest stack and ratio; an extracted model is a config
whose layers are the architecture. `config.json` is plain
data (expressions are text in the plain form, ratios are [p, q]).

Rejected: a separate supernet config. The two would share every field, and every tool that takes one would have to
take the other.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from engine.architecture.architecture import Architecture, uniform
from engine.architecture.file import FORMATS, architecture_from_dict, layers_to_list
from engine.architecture.shape import MAX_SIZE, ModelShape, check_block, inner_width, parse_block
from engine.errors import UserError
from kernels.language.expression import GELU_FFN, ExpressionError, kron_weights
from kernels.language.widths import POLICIES, validate

EMBEDDING_TYPES = ("trigram", "factorized", "full")
POOLINGS = ("cls", "mean")
TOKEN_HEADS = ("softmax", "crf")
POOLER_ACTIVATIONS = ("tanh", "relu", "gelu", "gelu_erf")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "embedding_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


class FFNASConfig(PreTrainedConfig):
    """Sizes and layers of an FFNAS student or supernet; EfficientBERT's sizes by default.

    Args:
        vocab_size: V.
        hidden_size: H; a multiple of `num_attention_heads`.
        num_hidden_layers: L.
        num_attention_heads: heads; the head size H / heads may be odd.
        intermediate_size: F; a layer of ratio r has inner width int(r F).
        embedding_type: `"trigram"` (V x E table, three neighbouring tokens mapped to H), `"factorized"` (V x E table,
            each token mapped to H) or `"full"` (V x H table).
        embedding_size: E; not used by `"full"`.
        layers: an `Architecture`, its text, or one {"expression", "stack", "ratio": [p, q]} per layer, with "heads" in
            those that keep some of the heads; None is the plain GELU FFN, stack 1, ratio 1, in every layer.
        source_layers: which layers of the model they were taken from the layers are; None for all, or none known.
        width_policy: `"truncate"` or `"pad"`, for binary operators on unequal widths.
        kron_block: [p, q] of weights that are Kronecker products (`kernels.language.kron_shape`), for layers with a
            `kron`; None takes the rule over F/1 .. F/4.
        teacher_hidden_size: H_t of the distillation projection `fit_dense`; None for a model without one.
        hidden_dropout_prob, attention_probs_dropout_prob: dropout, in [0, 1).
        layer_norm_eps: epsilon of every LayerNorm.
        max_position_embeddings, type_vocab_size: sizes of the position and segment tables.
        initializer_range: standard deviation of the initial weights.
        pad_token_id: its token embedding is not trained; None for none.
        classifier_dropout: dropout before the classifier; None takes `hidden_dropout_prob`.
        tie_word_embeddings: the masked-LM decoder uses the token table.
        pooling: what sequence heads read: `"cls"`, the first token through a dense layer, or `"mean"`, the mean over
            real tokens, without one.
        pooler_activation: behind that dense layer: `"tanh"`, `"relu"`, `"gelu"` (tanh form) or `"gelu_erf"`.
        token_head: of token classification: `"softmax"`, every token alone, or `"crf"`, a linear chain.

    Raises:
        UserError: a value is out of range, or a layer is not valid at these widths.
    """

    model_type = "ffnas"

    vocab_size: int = 30522
    hidden_size: int = 540
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 540
    embedding_type: str = "trigram"
    embedding_size: int = 128
    layers: list[dict[str, Any]] | None = None
    source_layers: list[int] | None = None
    width_policy: str = "truncate"
    kron_block: list[int] | None = None
    teacher_hidden_size: int | None = None
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    classifier_dropout: float | int | None = None
    tie_word_embeddings: bool = True
    pooling: str = "cls"
    pooler_activation: str = "tanh"
    token_head: str = "softmax"

    def __post_init__(self, **kwargs: Any) -> None:
        self.check()
        if any(kron_weights(layer.expression) for layer in self.full_architecture.layers):
            self.kron_block = list(self.shape.block)  # config.json alone tells the stored factors' shapes
        self.layers = layers_to_list(self.full_architecture)
        super().__post_init__(**kwargs)

    @property
    def token_width(self) -> int:
        """Width of a row of the token table: H for full, E for the others."""
        return self.hidden_size if self.embedding_type == "full" else self.embedding_size

    @property
    def full_architecture(self) -> Architecture:
        """What the stored weights are for: `layers` as an `Architecture`."""
        return read_layers(self.layers, self.hidden_size, self.num_hidden_layers)

    @property
    def shape(self) -> ModelShape:
        """The sizes the parameter formula takes."""
        return ModelShape(
            hidden_size=self.hidden_size,
            num_layers=self.num_hidden_layers,
            ffn_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            embedding_size=None if self.embedding_type == "full" else self.embedding_size,
            max_positions=self.max_position_embeddings,
            type_vocab=self.type_vocab_size,
            teacher_hidden_size=self.teacher_hidden_size,
            kron_block=None if self.kron_block is None else parse_block(self.kron_block),
            num_heads=self.num_attention_heads,
            trigram=self.embedding_type != "factorized",
        )

    def check(self) -> None:
        """Raises `UserError` unless the values fit together; models call it, since attributes can be reassigned."""
        self._check_sizes()
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"num_attention_heads: {self.num_attention_heads} does not divide hidden_size {self.hidden_size};"
                f" use {_nearest_divisor(self.hidden_size, self.num_attention_heads)} heads, or another hidden_size"
            )
        for name, allowed in (
            ("embedding_type", EMBEDDING_TYPES),
            ("width_policy", POLICIES),
            ("pooling", POOLINGS),
            ("pooler_activation", POOLER_ACTIVATIONS),
            ("token_head", TOKEN_HEADS),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}: unknown value {getattr(self, name)!r:.60}; use {' or '.join(allowed)}")
        for name in _PROBABILITIES:
            value = getattr(self, name)
            if value is None and name == "classifier_dropout":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise UserError(f"{name}: must be a number in [0, 1), got {value!r:.60}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise UserError(f"pad_token_id: {self.pad_token_id} is not in the vocabulary of {self.vocab_size} tokens")
        check_architecture(self, self.full_architecture)
        self._check_source_layers()

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes config.json, and the modeling files that its `auto_map` names (`engine.handover`).

        Models save their configuration by it, so one that was loaded from an export, trained or merged and saved again
        loads under `trust_remote_code=True` wherever the export does.

        Raises:
            UserError: an operator of the architecture cannot be written as plain PyTorch code.
        """
        from engine.handover import auto_map, custom_pipelines, is_named, write_files

        if is_named(getattr(self, "auto_map", None)) and not os.path.isfile(save_directory):
            (model_class,) = self.architectures or ("FFNASModel",)
            self.auto_map, self.custom_pipelines = auto_map(model_class), custom_pipelines(model_class)
            if not self.custom_pipelines:
                del self.custom_pipelines
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_files(self, model_class, save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _check_source_layers(self) -> None:
        layers = self.source_layers
        if layers is None:
            return
        numbers = isinstance(layers, (list, tuple)) and all(type(v) is int and 0 <= v < MAX_SIZE for v in layers)
        if not numbers or len(layers) != self.num_hidden_layers or sorted(set(layers)) != list(layers):
            raise UserError(
                f"source_layers: must be {self.num_hidden_layers} layer numbers in rising order, got {layers!r:.60}"
            )

    def _check_sizes(self) -> None:
        for name in (*_SIZES, "teacher_hidden_size"):
            value = getattr(self, name)
            if value is None and name == "teacher_hidden_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: must be a positive integer, got {value!r:.60}")


def read_layers(layers: Any, hidden_size: int, num_layers: int) -> Architecture:
    """`layers` in any form `FFNASConfig` takes.

    Raises:
        UserError: it is none of them; the message names the layer and field.
    """
    if layers is None:
        return uniform(GELU_FFN, 1, Fraction(1), num_layers)
    if isinstance(layers, Architecture):
        return layers
    if isinstance(layers, str):
        return Architecture.parse(layers)
    count = len(layers) if isinstance(layers, (list, tuple)) else num_layers
    entries = list(layers) if isinstance(layers, tuple) else layers
    return architecture_from_dict(
        {"format": FORMATS[-1], "hidden_size": hidden_size, "num_layers": count, "layers": entries, "params": 0}
    )


def check_architecture(config: FFNASConfig, architecture: Architecture) -> None:
    """Raises `UserError` unless `architecture` has a layer per layer of `config`, each valid at its widths, with heads
    that there are, and not all of them left out."""
    if len(architecture.layers) != config.num_hidden_layers:
        raise UserError(
            f"layers: the architecture has {len(architecture.layers)} layers, the model {config.num_hidden_layers};"
            " give one per layer"
        )
    if all(layer.skipped for layer in architecture.layers):
        raise UserError("layers: every layer is left out; keep the heads or an FFN of at least one")
    for index, layer in enumerate(architecture.layers):
        if layer.heads is not None and layer.heads > config.num_attention_heads:
            raise UserError(
                f"layers[{index}].heads: {layer.heads} are more than the model's {config.num_attention_heads}"
                " num_attention_heads; use at most those"
            )
        if layer.stack == 0:
            continue
        inner = inner_width(layer.ratio, config.intermediate_size)
        try:
            validate(layer.expression, config.hidden_size, inner, config.width_policy)
        except ExpressionError as error:
            raise UserError(f"layers[{index}].expression: {error}; use an expression valid at these widths") from error
        if kron_weights(layer.expression):
            check_block(config.shape.block, config.hidden_size, inner)


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))
