"""Models by name: the published EfficientBERT variants and the encoders they are compared with.

A preset is an architecture with its sizes, and the final distillation its authors used. Nothing here loads torch.

    parameters   embeddings and encoder, without `fit_dense` (H_t (H + 1), gone after distillation), pooler (H^2 + H)
                 and task head; the paper's numbers include `fit_dense` for a teacher of width 768
    FLOPs        2 per multiply-accumulate of the matrix products of embeddings and encoder, one sequence

MobileBERT has bottlenecks around every layer: its preset can be counted and timed, not distilled. Sources:
EfficientBERT (Dong et al., 2021); TinyBERT (Jiao et al., 2020); MobileBERT (Sun et al., ACL 2020), table 1 and section
4.4 for MobileBERT-TINY; BERT (Devlin et al., NAACL 2019).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from engine.architecture.architecture import Architecture, uniform
from engine.architecture.flops import PAPER_LENGTH, count_flops
from engine.architecture.params import count_parameters
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from engine.training.settings import PhaseSettings
from kernels.language.expression import apply, linear, parse_expression

LAYER_NORM_EPS = 1e-5
"""Epsilon of every LayerNorm in the published code, students and teacher alike."""

BERT_EPS = 1e-12
"""Epsilon of the baselines, which are timed as transformers runs them."""

TEACHER_WIDTH = 768
"""Width of the paper's teacher, BERT-base; sizes the `fit_dense` its parameter counts include."""

RELEASED = (
    "tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2)), elu(linear2_1(gelu(linear2_1(x,wb1)),wb2)), "
    "sigmoid(linear1_2(relu(linear1_2(x,wb1)),wb2)), linear2_2(gelu(linear2_2(max(x,tanh(x)),wb1)),wb2), "
    "linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2), leaky_relu(linear2_3(gelu(linear2_3(x,wb1)),wb2))"
)
"""The published architecture, all six layers."""


@dataclass(frozen=True)
class Recipe:
    """The final distillation.

    Attributes:
        text: distillation on text; its learning rate and batch are the warm-up's. `sources` 1: Wikipedia alone.
        task: distillation on a GLUE task.
        cola_epochs: epochs of `task` on CoLA.
        squad_lr: learning rate of `task` on SQuAD.
        start: weights the text phase starts from: "warmup", the text-distilled supernet, "supernet", the one that was
            distilled on several tasks after that, or "fresh", random ones.
    """

    text: PhaseSettings = field(default_factory=lambda: PhaseSettings(epochs=10, batch_size=256, lr=1e-4))
    task: PhaseSettings = field(default_factory=lambda: PhaseSettings(epochs=10, batch_size=32, lr=5e-5))
    cola_epochs: float = 50
    squad_lr: float = 1e-4
    start: str = "warmup"

    def task_phase(self, task: str) -> PhaseSettings:
        """The task phase for the task of this name; any that names neither CoLA nor SQuAD has the common one."""
        name = task.casefold()
        if "cola" in name:
            return replace(self.task, epochs=self.cola_epochs)
        return replace(self.task, lr=self.squad_lr) if "squad" in name else self.task


_TRANSFER = Recipe(text=PhaseSettings(epochs=3, batch_size=256, lr=1e-4, sources=1), start="fresh")
_BASELINE = Recipe(start="fresh")


@dataclass(frozen=True)
class Counts:
    """Parameters by part, and FLOPs of one sequence.

    Attributes:
        encoder: embeddings and encoder.
        fit_dense: the distillation projection to a teacher of width 768; 0 where the model is itself as wide as the
            teacher and none is published.
        pooler, head: the [CLS] pooler, and a classifier of two classes.
        flops: at `length` tokens, without `fit_dense`, pooler and head.
    """

    encoder: int
    fit_dense: int
    pooler: int
    head: int
    flops: int
    length: int

    @property
    def paper(self) -> int:
        """As the paper counts its own models: with `fit_dense`, without pooler and head."""
        return self.encoder + self.fit_dense

    @property
    def deployed(self) -> int:
        """What a classifier of two classes holds: pooler and head, no `fit_dense`."""
        return self.encoder + self.pooler + self.head


@dataclass(frozen=True)
class ModelPreset:
    """A model by name.

    Attributes:
        name: what users write.
        about: one line.
        shape: sizes; `teacher_hidden_size` 768 (None where no projection is published). For MobileBERT those of the
            embedding and its wide stream.
        heads: attention heads.
        architecture: None for a model that is no FFNAS student.
        policy: width policy of its binary operators.
        recipe: final distillation.
        family: "ffnas", "bert" or "mobilebert": whose modeling code has exactly this arithmetic.
        published: parameters in millions, as stated in print (EfficientBERT++'s 16.0 is not what its layers add up to).
    """

    name: str
    about: str
    shape: ModelShape
    heads: int
    architecture: Architecture | None
    policy: str = "truncate"
    recipe: Recipe = field(default_factory=Recipe)
    family: str = "ffnas"
    published: float | None = None

    def counts(self, length: int = PAPER_LENGTH) -> Counts:
        """Parameters and FLOPs by formula. Raises `UserError` for a length below 1."""
        h, teacher = self.shape.hidden_size, self.shape.teacher_hidden_size
        if self.architecture is None:
            if length < 1:
                raise UserError(f"length: must be a positive number of tokens, got {length}")
            encoder, flops = mobilebert_parameters(self.shape), mobilebert_flops(self.shape, length)
        else:
            encoder = count_parameters(self.architecture, self.shape, fit_dense=False)
            flops = count_flops(self.architecture, self.shape, length)
        pooler = 0 if self.family == "mobilebert" else h * h + h  # MobileBERT takes the first token as it is
        return Counts(encoder, teacher * (h + 1) if teacher else 0, pooler, 2 * (h + 1), flops, length)

    def student_config(self, **changes: Any) -> dict[str, Any]:
        """Arguments of `engine.student.FFNASConfig` for this model, without `fit_dense`; `changes` win.

        Raises:
            UserError: the model is no FFNAS student.
        """
        if self.architecture is None:
            raise UserError(f"preset: {self.name} is no FFNAS student, it can only be counted and timed")
        shape = self.shape
        values = {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": self.heads,
            "intermediate_size": shape.ffn_size,
            "embedding_type": "full" if shape.embedding_size is None else "trigram",
            "embedding_size": shape.hidden_size if shape.embedding_size is None else shape.embedding_size,
            "layers": self.architecture,
            "width_policy": self.policy,
            "max_position_embeddings": shape.max_positions,
            "type_vocab_size": shape.type_vocab,
            "layer_norm_eps": LAYER_NORM_EPS if self.family == "ffnas" else BERT_EPS,
        }
        return values | changes


_MOBILEBERT_INTRA, _MOBILEBERT_FFNS = 128, 2


def mobilebert_parameters(shape: ModelShape) -> int:
    """MobileBERT-TINY's embeddings and encoder: wide stream H, layers of width 128 behind bottlenecks, two FFNs each.

    Its `NoNorm` is a scale and a shift per channel; attention reads the bottleneck's output.
    """
    h, n, e = shape.hidden_size, _MOBILEBERT_INTRA, shape.embedding_size or 0
    embedding = shape.vocab_size * e + 3 * e * h + h + (shape.max_positions + shape.type_vocab) * h + 2 * h
    bottlenecks = (h * n + n + 2 * n) + (n * h + h + 2 * h)
    attention = 4 * (n * n + n) + 2 * n
    ffns = _MOBILEBERT_FFNS * (2 * n * shape.ffn_size + shape.ffn_size + n + 2 * n)
    return embedding + shape.num_layers * (bottlenecks + attention + ffns)


def mobilebert_flops(shape: ModelShape, length: int) -> int:
    """MobileBERT-TINY's matrix products on one sequence, 2 per multiply-accumulate."""
    h, n = shape.hidden_size, _MOBILEBERT_INTRA
    per_token = 2 * h * n + 4 * n * n + _MOBILEBERT_FFNS * 2 * n * shape.ffn_size
    per_layer = 2 * length * per_token + 4 * length * length * n
    return shape.num_layers * per_layer + 6 * length * (shape.embedding_size or 0) * h


def _efficientbert(hidden: int, *, twice: bool = False) -> tuple[ModelShape, int, Architecture]:
    layers = Architecture.parse(RELEASED).layers
    if twice:
        layers = tuple(layer for layer in layers for _ in range(2))
    shape = ModelShape(hidden, len(layers), hidden, teacher_hidden_size=TEACHER_WIDTH)
    return shape, 12, Architecture(layers)


def _bert(hidden: int, layers: int, ffn: int, *, fit_dense: bool) -> tuple[ModelShape, int, Architecture]:
    body = linear(apply("gelu_erf", linear(parse_expression("x"), "wb1")), "wb2")
    shape = ModelShape(
        hidden, layers, ffn, embedding_size=None, teacher_hidden_size=TEACHER_WIDTH if fit_dense else None
    )
    return shape, 12, uniform(body, 1, Fraction(1), layers)


def _transfer() -> tuple[ModelShape, int, Architecture]:
    shape = ModelShape(768, 6, 3072, embedding_size=None, teacher_hidden_size=TEACHER_WIDTH)
    return shape, 12, Architecture.parse(RELEASED)


_MOBILEBERT_TINY = (ModelShape(512, 24, 512, embedding_size=128), 4, None)

_MADE: tuple[ModelPreset, ...] = (
    ModelPreset("efficientbert", "the released architecture", *_efficientbert(540), published=15.7),
    ModelPreset(
        "efficientbert-tiny", "EfficientBERT-TINY: the same layers at H = 360", *_efficientbert(360), published=9.4
    ),
    ModelPreset(
        "efficientbert-plus",
        "efficientbert from the multi-task supernet's weights",
        *_efficientbert(540),
        recipe=Recipe(start="supernet"),
        published=15.7,
    ),
    ModelPreset(
        "efficientbert-plusplus",
        "EfficientBERT++: H = 360, each layer twice",
        *_efficientbert(360, twice=True),
        published=16.0,
    ),
    ModelPreset(
        "tinybert6-transfer",
        "EfficientBERT's FFNs in TinyBERT-6's sizes",
        *_transfer(),
        policy="pad",
        recipe=_TRANSFER,
        published=70.1,
    ),
    ModelPreset(
        "tinybert4", "TinyBERT-4", *_bert(312, 4, 1200, fit_dense=True), recipe=_BASELINE, family="bert", published=14.5
    ),
    ModelPreset(
        "tinybert6", "TinyBERT-6", *_bert(768, 6, 3072, fit_dense=True), recipe=_BASELINE, family="bert", published=67.0
    ),
    ModelPreset("mobilebert-tiny", "MobileBERT-TINY", *_MOBILEBERT_TINY, family="mobilebert", published=15.1),
    ModelPreset(
        "bert-base",
        "the teacher",
        *_bert(768, 12, 3072, fit_dense=False),
        recipe=_BASELINE,
        family="bert",
        published=109,
    ),
)

PRESETS: dict[str, ModelPreset] = {preset.name: preset for preset in _MADE}


def get_preset(name: str) -> ModelPreset:
    """The preset of this name; raises `UserError` naming the known ones."""
    if name not in PRESETS:
        raise UserError(f"preset: {name!r} is not known: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
