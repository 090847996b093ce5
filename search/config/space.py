"""The student's shape and the search space that a configuration asks for.

The space needs two numbers of the teacher, its vocabulary and its width: `build_space` takes them from a loaded
teacher's shape, `student_space` from the teacher's config.json, where nothing else of it is needed.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from engine.architecture.shape import ModelShape
from engine.errors import UserError
from engine.latency.table import LatencyTable
from engine.published.presets import LAYER_NORM_EPS
from kernels.language.operators import KRON
from search.config.checks import parse_ratios
from search.config.schema import SearchConfig
from search.space import SearchSpace
from search.space.costs import Costs
from search.space.limits import Limits
from search.space.options import with_block


def student_shape(config: SearchConfig, vocab_size: int, teacher_hidden_size: int) -> ModelShape:
    """Sizes of the student of a configuration, for a teacher of these sizes; Kronecker weights included."""
    student = config.student
    shape = ModelShape(
        hidden_size=student.hidden_size,
        num_layers=student.num_layers,
        ffn_size=student.ffn_size or student.hidden_size,
        vocab_size=vocab_size,
        embedding_size=student.embedding_size if student.embedding == "trigram" else None,
        teacher_hidden_size=teacher_hidden_size,
    )
    chosen = config.space
    return with_block(shape, parse_ratios(chosen.ratios), chosen.linears, chosen.kron_block)


def student_fields(config: SearchConfig) -> dict[str, float]:
    """Further fields of `engine.student.FFNASConfig` that a configuration decides: dropout and LayerNorm's epsilon."""
    student, eps = config.student, config.student.layer_norm_eps
    if eps is None:
        eps = LAYER_NORM_EPS if config.kd.paper_exact else 1e-12
    dropout = {"hidden_dropout_prob": student.dropout, "attention_probs_dropout_prob": student.dropout}
    return {**dropout, "layer_norm_eps": eps}


def build_space(config: SearchConfig, shape: ModelShape, table: LatencyTable | None = None) -> SearchSpace:
    """The joint search space of a configuration, within its budget; latency is limited where there is a table, by as
    much less than the budget as the table's predictions are known to be off.

    Raises:
        UserError: the space's values do not fit together, or nothing fits the budget.
    """
    budget, chosen = config.budget, config.objectives
    if KRON in config.space.linears and chosen.needs_latency(budget):
        raise UserError(
            "space.linears: latency tables know no Kronecker weights: leave kron out, or latency (budget, objective)"
        )
    costs = Costs(
        shape=shape,
        policy=config.space.policy,
        sequence_length=chosen.sequence_length or config.data.max_length,
        batch_size=chosen.batch_size,
        table=table,
    )
    latency = budget.latency_ms
    latency = table.allowed(latency) if table is not None and latency is not None else None
    limits = Limits(costs, budget.flops, budget.memory_mb, latency)
    return SearchSpace.from_config(
        shape,
        budget=budget.params,
        stacks=tuple(config.space.stacks),
        ratios=parse_ratios(config.space.ratios),
        heights=tuple(config.space.heights),
        policy=config.space.policy,
        activations=config.space.activations,
        binaries=config.space.binaries,
        linears=config.space.linears,
        layer_expressions=config.space.layer_expressions,
        layer_shapes=config.space.layer_shapes,
        kron_block=shape.kron_block,
        limits=limits,
    )


def inherited_space(shape: ModelShape) -> SearchSpace:
    """The space of strategy inherit as ledger and report know it: the teacher itself."""
    return SearchSpace(shape, stacks=(1,), ratios=(Fraction(1),))


def student_space(config: SearchConfig) -> tuple[SearchSpace, int]:
    """The space of a configuration and the student's heads, from the teacher's config.json alone.

    Raises:
        UserError: teacher or space cannot be had.
    """
    from transformers import AutoConfig  # deferred: seconds of import

    from engine.model_sources import resolve

    source = resolve(config.teacher)
    try:
        teacher = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"teacher {source.name!r}: its config.json cannot be used ({error})") from error
    shape = student_shape(config, int(teacher.vocab_size), int(teacher.hidden_size))
    unlimited = replace(config, budget=replace(config.budget, flops=None, memory_mb=None, latency_ms=None))
    return build_space(unlimited, shape), config.student.num_heads or int(teacher.num_attention_heads)
