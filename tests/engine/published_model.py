"""EfficientBERT's published arithmetic, written down once more in plain PyTorch functions over a state dict.

Nothing of `engine` or `kernels` is used: layers are Python functions of (x, first linear, second linear), attention is
the textbook one with -10000 added at padding, and tensors have the published names.
"""

from __future__ import annotations

import math

import torch


def gelu(a):
    return 0.5 * a * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (a + 0.044715 * torch.pow(a, 3.0))))


def first(a, b):
    """Both to the narrower width."""
    n = min(a.shape[-1], b.shape[-1])
    return a[..., :n], b[..., :n]


def widened(a, b, value):
    """Both to the wider width, the narrower filled with `value`."""
    n = max(a.shape[-1], b.shape[-1])
    return tuple(torch.cat([t, t.new_full((*t.shape[:-1], n - t.shape[-1]), value)], -1) for t in (a, b))


def product(policy):
    def multiply(a, b):
        a, b = first(a, b) if policy == "truncate" else widened(a, b, 1.0)
        return a * b

    return multiply


def released(policy):
    """(body, stack, inverse ratio) of the six released layers."""
    multiply = product(policy)
    return [
        (lambda x, f, g: torch.tanh(g(gelu(f(x)))), 4, 2),
        (lambda x, f, g: torch.nn.functional.elu(g(gelu(f(x)))), 2, 1),
        (lambda x, f, g: torch.sigmoid(g(torch.relu(f(x)))), 1, 2),
        (lambda x, f, g: g(gelu(f(torch.maximum(x, torch.tanh(x))))), 2, 2),
        (lambda x, f, g: g(torch.relu(multiply(f(x), x))), 1, 2),
        (lambda x, f, g: torch.nn.functional.leaky_relu(g(gelu(f(x))), 0.01), 2, 3),
    ]


def random_state(hidden, layers, ffn, *, vocab, factor, teacher=None, heads=("classifier",), classes=2, supernet=None,
                 seed=0):  # fmt: skip
    """Published names and random values.

    Args:
        layers: as `released`.
        factor: E of the trigram embedding, None for a full one.
        teacher: width of fit_dense.
        heads: names of heads.
        supernet: store all FFNs at this stack and the full width.
    """
    g = torch.Generator().manual_seed(seed)
    state = {}

    def linear(name, rows, columns):
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=g) / math.sqrt(columns)
        state[f"{name}.bias"] = 0.1 * torch.randn(rows, generator=g)

    def norm(name):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(hidden, generator=g)
        state[f"{name}.bias"] = 0.1 * torch.randn(hidden, generator=g)

    for table, rows, columns in (("token", vocab, factor or hidden), ("segment", 2, hidden), ("position", 512, hidden)):
        state[f"embeddings.{table}_embeddings.weight"] = 0.5 * torch.randn(rows, columns, generator=g)
    if factor:
        linear("embeddings.dense", hidden, 3 * factor)
    norm("embeddings.layernorm")
    for index, (_, stack, inverse) in enumerate(layers):
        for part in ("query", "key", "value", "dense"):
            linear(f"encoder.{index}.attention.{part}", hidden, hidden)
        norm(f"encoder.{index}.attention.layernorm")
        inner = ffn if supernet else ffn // inverse
        for n in range(supernet or stack):
            linear(f"encoder.{index}.all_ffn.{n}.dense1", inner, hidden)
            linear(f"encoder.{index}.all_ffn.{n}.dense2", hidden, inner)
            norm(f"encoder.{index}.all_ffn.{n}.layernorm")
    if teacher:
        linear("fit_dense", teacher, hidden)
    if heads:
        linear("cls_pooler.dense", hidden, hidden)
    for name in heads:
        linear(name, classes, hidden)
    return state


def logits(state, layers, ffn, heads, ids, types, padding, head="classifier"):
    """[B, classes]; `padding` [B, S] is 1 at padding."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    return linear(head, torch.tanh(linear("cls_pooler.dense", hidden_states(state, layers, ffn, heads, ids, types,
                                                                             padding)[:, 0])))  # fmt: skip


def hidden_states(state, layers, ffn, heads, ids, types, padding):
    """[B, S, H] output of the last layer."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = state["embeddings.token_embeddings.weight"][ids]
    if "embeddings.dense.weight" in state:
        zero = torch.zeros_like(x[:, :1])
        x = linear("embeddings.dense", torch.cat([torch.cat([x[:, 1:], zero], 1), x, torch.cat([zero, x[:, :-1]], 1)],
                                                 -1))  # fmt: skip
    x = x + state["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm("embeddings.layernorm", x + state["embeddings.segment_embeddings.weight"][types])
    batch, length, hidden = x.shape
    size = hidden // heads
    for index, (body, stack, inverse) in enumerate(layers):
        name = f"encoder.{index}.attention"
        q, k, v = (linear(f"{name}.{p}", x).view(batch, length, heads, size).permute(0, 2, 1, 3)
                   for p in ("query", "key", "value"))  # fmt: skip
        scores = q @ k.transpose(-1, -2) / math.sqrt(size) - 10000.0 * padding[:, None, None, :]
        context = (torch.softmax(scores, -1) @ v).permute(0, 2, 1, 3).reshape(batch, length, hidden)
        x = norm(f"{name}.layernorm", x + linear(f"{name}.dense", context))
        d = ffn // inverse
        for n in range(stack):
            p = f"encoder.{index}.all_ffn.{n}"

            def up(a, p=p, d=d):
                return a @ state[f"{p}.dense1.weight"][:d].T + state[f"{p}.dense1.bias"][:d]

            def down(a, p=p, d=d):
                return a @ state[f"{p}.dense2.weight"][:, :d].T + state[f"{p}.dense2.bias"]

            x = norm(f"{p}.layernorm", x + body(x, up, down))
    return x
