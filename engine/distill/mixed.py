"""The mixed forward: several subnets of one supernet in one pass, with what they share computed once.

Subnets share weights, so two of them that agree on layers 0..l-1 have the same activations there: embeddings and the
first attention block run once for all, every later layer once per distinct prefix. Attention blocks of different
prefixes have the same weights and run as one batch of their inputs; FFNs run grouped (`kernels.fused_ffn_grouped`).
Gradients of the subnets add up in the shared weights.

States equal those of single passes up to the rounding of differently cut batches, without dropout; with dropout,
subnets share the masks of what they share.

Rejected: packing the weights of the CPU kernels once per step for all subnets. Every call packs its own views of them;
as a share of the calls' time, forward and backward, that is at most 2.6 % (n = 4, d = 540) to 4.3 % (n = 2, d = 270) in
float32 and 7.4 to 9.6 % in bfloat16 (2048 tokens, H = 540, one core of a Xeon with AMX; time extrapolated to no tokens,
so calling and writing the weights' gradients are in it). FFNs are 22 % of a student's share of a bfloat16 step with
eight subnets, so packing once for eight would save less than 2 % of it.

Rejected: K separate passes with summed losses. For six layers and two subnets a step it repeats the embeddings and at
least one attention block, and launches everything K times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from engine.architecture.architecture import Architecture
from engine.data import Batch
from engine.states import EncoderStates, Recorder
from engine.student.attention import FFNASAttention, TeacherHeads, extended_mask
from engine.student.encoder import require_whole_layers
from engine.student.ffn import FFNPlan, FFNStack, ffn_weights, may_read
from engine.student.modeling import FFNASPreTrainedModel
from kernels.ffn.grouped import GroupMember, fused_ffn_grouped


def mixed_states(
    model: FFNASPreTrainedModel,
    batch: Batch,
    architectures: Sequence[Architecture],
    *,
    score_targets: Sequence[TeacherHeads] | None = None,
) -> list[EncoderStates]:
    """What distillation compares, for every subnet, in the order given; gradients flow.

    Args:
        model: the supernet, with or without a classification head.
        batch: on the model's device.
        architectures: subnets; the same one may be given twice.
        score_targets: the teacher's queries and keys of every layer, as of `FFNASModel.forward`.

    Raises:
        UserError: an architecture does not fit the model, or has layers with fewer heads or without FFN.
    """
    base = model.base_model
    plans = [base.planner(a) for a in architectures]
    for plan in plans:
        require_whole_layers(plan, "a step with several subnets")
    embedded = base.embeddings(batch.input_ids.flatten(0, -2), batch.token_type_ids.flatten(0, -2))
    mask = extended_mask(base.config, embedded, batch.mask)
    inputs: dict[tuple[FFNPlan, ...], Tensor] = {(): embedded}  # by prefix: a layer's input
    kept = [Recorder(embedded) for _ in plans]
    teachers: Sequence[TeacherHeads | None] = score_targets or [None] * len(base.encoder)
    for index, (layer, teacher) in enumerate(zip(base.encoder, teachers, strict=True)):
        attended = _attend(layer.block, inputs, mask, teacher)
        wanted = list(dict.fromkeys(plan[: index + 1] for plan in plans))
        outputs = _run_stacks(layer.all_ffn, [attended[p[:-1]][0] for p in wanted], [p[-1] for p in wanted])
        inputs = dict(zip(wanted, outputs, strict=True))
        for recorder, plan in zip(kept, plans, strict=True):
            _, query, key, loss = attended[plan[:index]]
            recorder.add(inputs[plan[: index + 1]], query, key, layer.block.scaling, loss)
    states = [recorder.states() for recorder in kept]
    return [replace(s, logits=model.answer(s.hidden[-1], batch.attention_mask)) for s in states]


def _attend(
    attention: FFNASAttention,
    inputs: dict[tuple[FFNPlan, ...], Tensor],
    mask: Tensor | None,
    teacher: TeacherHeads | None,
) -> dict[tuple[FFNPlan, ...], tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Per prefix the attention block's output, queries, keys, score loss; one call for all prefixes."""
    count = len(inputs)
    x = torch.cat(list(inputs.values())) if count > 1 else next(iter(inputs.values()))
    repeated = mask if mask is None or count == 1 else mask.repeat(count, *[1] * (mask.dim() - 1))
    options = {} if teacher is None else {"teacher": teacher, "parts": count}
    *outputs, _, losses = attention(x, repeated, **options)
    parts = zip(*(t.chunk(count) for t in outputs), [None] * count if losses is None else losses, strict=True)
    return dict(zip(inputs, parts, strict=True))


def _run_stacks(ffns: FFNStack, inputs: Sequence[Tensor], plans: Sequence[FFNPlan]) -> list[Tensor]:
    """Each input through its own stack of the layer's FFNs, grouped."""
    shape = inputs[0].shape
    members = [_member(ffns, plan) for plan in plans]
    return [out.view(shape) for out in fused_ffn_grouped([x.reshape(-1, shape[-1]) for x in inputs], members)]


def _member(ffns: FFNStack, plan: FFNPlan) -> GroupMember:
    used = list(islice(ffns, plan.stack))
    may_read(used, plan.inner, "a step with several subnets")
    return GroupMember(
        *ffn_weights(used, plan.inner),
        plan.program,
        [f.layernorm.weight for f in used],
        [f.layernorm.bias for f in used],
        p_drop=ffns.p_drop if ffns.training else 0.0,
        eps=ffns.eps,
    )
