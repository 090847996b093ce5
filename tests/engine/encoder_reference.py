"""The student encoder written out once more in plain torch operations: what the real modules are checked against.

Only formulas and parameter names are shared with `engine.student`: no module, no expression parser, no attention
function. Expressions are pairs of a text and a Python function of (x, first linear, second linear).
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.shape import ModelShape
from engine.student import FFNASConfig
from kernels.language.expression import parse_expression


def gelu(a):
    return 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


def _narrow(a, b, op):
    width = min(a.shape[-1], b.shape[-1])
    return op(a[..., :width], b[..., :width])


def _wide_max(a, b):
    width = max(a.shape[-1], b.shape[-1])
    fill = [torch.full((*v.shape[:-1], width - v.shape[-1]), -math.inf, dtype=v.dtype) for v in (a, b)]
    return torch.maximum(torch.cat([a, fill[0]], -1), torch.cat([b, fill[1]], -1))


FORMULAS = {
    "linear(gelu(linear(x,wb1)),wb2)": lambda x, f, g: g(gelu(f(x))),
    "tanh(linear(gelu(linear(x,wb1)),wb2))": lambda x, f, g: torch.tanh(g(gelu(f(x)))),
    "sigmoid(linear(relu(linear(x,wb1)),wb2))": lambda x, f, g: torch.sigmoid(g(torch.relu(f(x)))),
    "linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)": lambda x, f, g: g(gelu(f(torch.maximum(x, torch.tanh(x))))),
    "linear(relu(mul(linear(x,wb1),x)),wb2)": lambda x, f, g: g(torch.relu(_narrow(f(x), x, torch.mul))),
    "linear(max(linear(x,wb1),x),wb2)": lambda x, f, g: g(_wide_max(f(x), x)),
}
"""Formulas under the policy `truncate`; the last one is for `pad` with an inner width of at least H."""

TRUNCATE = tuple(FORMULAS)[:5]
PAD = ("linear(max(linear(x,wb1),x),wb2)", *TRUNCATE[:3])

RELEASED = (
    "tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2)), elu(linear2_1(gelu(linear2_1(x,wb1)),wb2)), "
    "sigmoid(linear1_2(relu(linear1_2(x,wb1)),wb2)), linear2_2(gelu(linear2_2(max(x,tanh(x)),wb1)),wb2), "
    "linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2), leaky_relu(linear2_3(gelu(linear2_3(x,wb1)),wb2))"
)


def small_shape(**changes) -> ModelShape:
    """Odd sizes: head size 5 with 3 heads, inner widths 13, 6, 4, 3."""
    sizes = {"hidden_size": 15, "num_layers": 3, "ffn_size": 13, "vocab_size": 53, "embedding_size": 7}
    return ModelShape(**sizes | {"max_positions": 24, "teacher_hidden_size": 11} | changes)


def small_config(**changes) -> FFNASConfig:
    """The config of `small_shape`, without dropout; trigram, stack 2, ratio 1 unless changed."""
    values = {
        "vocab_size": 53,
        "hidden_size": 15,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 13,
        "embedding_size": 7,
        "max_position_embeddings": 24,
        "teacher_hidden_size": 11,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layers": architecture([(TRUNCATE[0], 2, 1)] * 3),
    }
    return FFNASConfig(**values | changes)


def architecture(layers) -> Architecture:
    """From (text, stack, k) per layer, k the inverse ratio."""
    return Architecture(tuple(LayerSpec(parse_expression(text), n, Fraction(1, k)) for text, n, k in layers))


def random_architecture(rng, num_layers=3, max_stack=3, texts=TRUNCATE) -> Architecture:
    """Uniform over texts, stacks up to `max_stack` and ratios 1..1/4."""
    return architecture(
        [(texts[rng.integers(len(texts))], int(rng.integers(1, max_stack + 1)), int(rng.integers(1, 5)))
         for _ in range(num_layers)]
    )  # fmt: skip


def batch(seed=0, rows=3, length=8, vocab=53):
    """Token ids, mask (rows padded to different lengths, one not at all) and segment ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (rows, length), generator=generator)
    lengths = torch.tensor([length, *torch.randint(2, length, (rows - 1,), generator=generator).tolist()])
    mask = torch.arange(length)[None, :] < lengths[:, None]
    types = (torch.arange(length)[None, :] >= lengths[:, None] // 2).long() * mask
    return ids * mask, mask, types


def randomize(model, seed=0):
    """Gives every parameter, biases and LayerNorms too, a generic value, so that no term is multiplied by 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * noise + (1.0 if "layernorm.weight" in name else 0.0))
    return model


def layer_norm(x, p, name, eps):
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def embed(p, config, ids, types):
    tokens = p["embeddings.token_embeddings.weight"][ids]
    if config.embedding_type == "trigram":
        zero = torch.zeros_like(tokens[:, :1])
        following = torch.cat([tokens[:, 1:], zero], 1)
        previous = torch.cat([zero, tokens[:, :-1]], 1)
        tokens = linear(torch.cat([following, tokens, previous], -1), p, "embeddings.dense")
    if config.embedding_type == "factorized":
        tokens = linear(tokens, p, "embeddings.dense")
    x = tokens + p["embeddings.position_embeddings.weight"][torch.arange(ids.shape[1])]
    x = x + p["embeddings.segment_embeddings.weight"][types]
    return layer_norm(x, p, "embeddings.layernorm", config.layer_norm_eps)


def encode(p, config, layers, ids, mask, types):
    """Embeddings, outputs of all layers, and scaled pre-softmax scores of all layers.

    Args:
        p: parameters by name, the encoder prefix left out.
        config: sizes and policy.
        layers: (text, stack, inner width) per layer.
        ids, mask, types: [B, S].
    """
    embedded = x = embed(p, config, ids, types)
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    hidden, scores = [], []
    for index, (text, stack, inner) in enumerate(layers):
        name = f"encoder.{index}.attention"
        q, k, v = (linear(x, p, f"{name}.{part}").split(size, dim=-1) for part in ("query", "key", "value"))
        contexts, layer_scores = [], []
        for head in range(heads):
            score = q[head] @ k[head].transpose(1, 2) / math.sqrt(size)
            weights = torch.softmax(score.masked_fill(~mask[:, None, :], -math.inf), -1)
            contexts.append(weights @ v[head])
            layer_scores.append(score)
        x = layer_norm(x + linear(torch.cat(contexts, -1), p, f"{name}.dense"), p, f"{name}.layernorm",
                       config.layer_norm_eps)  # fmt: skip
        for position in range(stack):
            ffn = f"encoder.{index}.all_ffn.{position}"
            w1, b1 = p[f"{ffn}.dense1.weight"][:inner], p[f"{ffn}.dense1.bias"][:inner]
            w2, b2 = p[f"{ffn}.dense2.weight"][:, :inner], p[f"{ffn}.dense2.bias"]
            body = FORMULAS[text](x, lambda a, w=w1, b=b1: a @ w.T + b, lambda a, w=w2, b=b2: a @ w.T + b)
            x = layer_norm(x + body, p, f"{ffn}.layernorm", config.layer_norm_eps)
        hidden.append(x)
        scores.append(torch.stack(layer_scores, 1))
    return embedded, hidden, scores


def parameters(model) -> dict[str, torch.Tensor]:
    """Parameters by name, without the encoder prefix."""
    return {name.removeprefix("ffnas."): value for name, value in model.named_parameters()}
