"""The knowledge-distillation objective: which layers are compared, and the three terms of the loss.

    total = w_hidden · hidden + w_attention · attention + w_prediction · prediction

- hidden: MSE of the embedding output and of every layer output through one shared projection `fit_dense`, summed over
  the L + 1 of them;
- attention: MSE of the pre-softmax scores, summed over the L layers (taken as it is from a student that computed it
  inside its attention, `EncoderStates.score_loss`);
- prediction: what the kind of task compares answers by (`TaskHead.prediction_loss`), mostly the soft cross-entropy with
  temperature.

Each of them is a mean over real tokens (pairs of tokens, sequences). Layers are summed, as in EfficientBERT and its
published code, so that the paper's weights 1:1:1 and learning rates mean here what they mean there. Rejected: the mean
over layers, which would weigh the prediction term L times more at the same settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.data.task import TaskHead, head_of
from engine.errors import UserError
from engine.loss_terms import TASK_TERMS
from engine.states import EncoderStates
from kernels import readable
from kernels.losses.ops import attention_score_mse_layers, hidden_mse_layers
from kernels.losses.paper import attention_score_mse_paper, hidden_mse_paper


def layer_map(num_student: int, num_teacher: int) -> list[int]:
    """Teacher layer (0-based) that each student layer matches: the first at least as deep, relative to all layers.

    Student layer l matches ceil((l + 1) · L_t / L_s) - 1, which is the paper's (l + 1)·(L_t / L_s) - 1 whenever L_s
    divides L_t. The last layer matches the last, and no teacher layer is matched twice.

    Raises:
        UserError: the teacher has fewer layers than the student.
    """
    if num_student < 1:
        raise UserError(f"num_layers: a student needs at least one layer, got {num_student}")
    if num_teacher < num_student:
        raise UserError(
            f"num_layers: the student has {num_student} layers, the teacher only {num_teacher}: "
            "choose a shallower student or a deeper teacher"
        )
    return [-((layer + 1) * num_teacher // -num_student) - 1 for layer in range(num_student)]


def published_stage_map(num_student: int, num_teacher: int) -> list[int]:
    """The map of EfficientBERT's published search (its stages, not its other phases): every (L_t // L_s)-th teacher
    layer from the second on. 12 to 6 layers as `layer_map`, 12 to 4 layers 1, 4, 7, 10.

    Where it asks for layers that the teacher does not have (as many as the student's), `layer_map`.

    Raises:
        UserError: the teacher has fewer layers than the student.
    """
    right = layer_map(num_student, num_teacher)
    layers = [layer * (num_teacher // num_student) + 1 for layer in range(num_student)]
    return layers if layers[-1] < num_teacher else right


@dataclass(frozen=True)
class KDWeights:
    """Weights of the objective; the paper's are 1:1:1.

    A term of weight 0 is not computed and reported as 0.

    Args:
        hidden: weight of the hidden-state term.
        attention: weight of the attention-score term.
        prediction: weight of the prediction term.
        temperature: of the soft cross-entropy, > 0.
        paper_exact: the published code's arithmetic (padding counted, scores <= -100 zeroed, soft cross-entropy
            averaged over classes, spans without the first position), and its learning rates, for comparison.
    """

    hidden: float = 1.0
    attention: float = 1.0
    prediction: float = 1.0
    temperature: float = 1.0
    paper_exact: bool = False

    def __post_init__(self) -> None:
        for name in TASK_TERMS:
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} weight must be >= 0 and finite, got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature must be > 0 and finite, got {self.temperature}")


@dataclass(frozen=True, slots=True)
class KDLoss:
    """The loss and its parts, scalar tensors; parts are unweighted sums over layers, 0 where not asked for."""

    total: Tensor
    hidden: Tensor
    attention: Tensor
    prediction: Tensor

    @classmethod
    def of(cls, total: Tensor, **parts: Tensor) -> KDLoss:
        """A loss of these parts; the others are 0."""
        nothing = total.detach().new_zeros(())
        return cls(total, **{**dict.fromkeys(TASK_TERMS, nothing), **parts})


def kd_loss(
    student: EncoderStates,
    teacher: EncoderStates,
    mask: Tensor,
    *,
    fit_dense: nn.Linear | None,
    weights: KDWeights,
    labels: Tensor | None = None,
    head: TaskHead | None = None,
    terms: Sequence[str] = TASK_TERMS,
) -> KDLoss:
    """Distillation loss of one batch; nothing here waits for the device.

    Args:
        student: states with gradients, L layers.
        teacher: states of the L mapped layers (`teacher.states(batch, layer_map(...))`), in the student's order.
        mask: [B, S] bool, True at real tokens.
        fit_dense: projection H_student -> H_teacher, None when the widths are equal and none is wanted.
        weights: see `KDWeights`.
        labels: of the batch, which the prediction term of some kinds of tasks needs.
        head: of the task; None: classification.
        terms: which of `TASK_TERMS` to compute.

    Raises:
        UserError: student and teacher cannot be compared (layers, heads, widths, logits).
        ValueError: an unknown term.
    """
    unknown = set(terms) - set(TASK_TERMS)
    if unknown:
        raise ValueError(f"kd_loss: unknown terms {sorted(unknown)}; there are {', '.join(TASK_TERMS)}")
    compared = _Compared(student, teacher, mask, fit_dense, labels, head or head_of("classification"), weights)
    total = torch.zeros((), device=student.embeddings.device)
    parts = dict.fromkeys(TASK_TERMS, total)
    wanted = [name for name in TASK_TERMS if name in terms and getattr(weights, name) > 0]
    for name in wanted:
        parts[name] = _FUNCTIONS[name](compared)
    for name in wanted:
        total = total + getattr(weights, name) * parts[name]
    return KDLoss(total, **parts)


@dataclass(frozen=True, slots=True)
class _Compared:
    """What a term may look at; see `kd_loss`."""

    student: EncoderStates
    teacher: EncoderStates
    mask: Tensor
    fit_dense: nn.Linear | None
    labels: Tensor | None
    head: TaskHead
    weights: KDWeights


def _hidden(given: _Compared) -> Tensor:
    student, teacher, fit_dense = given.student, given.teacher, given.fit_dense
    _same_count("hidden states", student.hidden, teacher.hidden)
    own = (student.embeddings, *student.hidden)
    weight = bias = None
    if fit_dense is not None and readable.are_readable(fit_dense):
        weight, bias = fit_dense.weight, fit_dense.bias
    elif fit_dense is not None:
        own = tuple(fit_dense(h) for h in own)
    width = own[0].shape[-1] if weight is None else weight.shape[0]
    if width != teacher.embeddings.shape[-1]:
        raise UserError(
            f"teacher_hidden_size: the student's states are {width} wide after projection, the teacher's "
            f"{teacher.embeddings.shape[-1]}: build the student with fit_dense for this teacher"
        )
    wanted = (teacher.embeddings, *teacher.hidden)
    if given.weights.paper_exact:
        layers = [hidden_mse_paper(h_s, weight, bias, h_t) for h_s, h_t in zip(own, wanted, strict=True)]
        return sum(layers[1:], start=layers[0])
    return hidden_mse_layers(own, weight, bias, wanted, given.mask)


def _attention(given: _Compared) -> Tensor:
    student, teacher, mask, paper_exact = given.student, given.teacher, given.mask, given.weights.paper_exact
    if student.score_loss is not None:
        if paper_exact:
            raise ValueError("kd_loss: paper_exact needs the student's queries and keys, not its score loss")
        return student.score_loss
    without = len(student.hidden) - len(student.queries)
    if without:
        raise UserError(
            f"attention: {without} of the student's {len(student.hidden)} layers have no attention block to compare: "
            "set the attention weight to 0"
        )
    _same_count("queries", student.queries, teacher.queries)
    if not student.queries:
        raise UserError("attention: the states hold no queries and keys: record at least one layer")
    for own, wanted in zip(student.queries, teacher.queries, strict=True):
        heads_s, heads_t = own.shape[1], wanted.shape[1]
        if heads_s != heads_t:
            raise UserError(
                f"num_attention_heads: the student has {heads_s}, the teacher {heads_t}: attention scores are compared "
                f"head by head, so give the student {heads_t} heads or set the attention weight to 0"
            )
    layers = (student.queries, student.keys, teacher.queries, teacher.keys)
    if paper_exact:
        found = [attention_score_mse_paper(*q_k, mask, scale_s=1.0, scale_t=1.0) for q_k in zip(*layers, strict=True)]
        return sum(found[1:], start=found[0])
    return attention_score_mse_layers(*layers, mask, scale_s=1.0, scale_t=1.0)


def _prediction(given: _Compared) -> Tensor:
    own = given.student.logits
    if own is None:
        raise UserError("prediction: the student has no task head: use a model with one or leave the term out")
    return given.head.prediction_loss(
        own,
        given.teacher.logits,
        given.mask,
        given.labels,
        temperature=given.weights.temperature,
        paper_exact=given.weights.paper_exact,
    )


_FUNCTIONS: dict[str, Callable[[_Compared], Tensor]] = {
    "hidden": _hidden,
    "attention": _attention,
    "prediction": _prediction,
}
"""The arithmetic of each term of `engine.loss_terms.TERMS`."""


def _same_count(what: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if len(student) != len(teacher):
        raise UserError(
            f"layers: the student gave {what} of {len(student)} layers, the teacher of {len(teacher)}: "
            "ask the teacher for layer_map(student layers, teacher layers)"
        )
