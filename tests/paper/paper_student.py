"""EfficientBERT's student as its paper and published checkpoints define it, in plain PyTorch modules.

Parameter names are the checkpoints': every FFN is stored at the full width and four of them in every layer, whatever
an architecture uses of them. Epsilon 1e-5, GELU in the tanh form, next/current/previous token in the embedding, -10000
added to the scores of padded keys. Nothing of `search`, `engine` or `kernels` is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

EPSILON = 1e-5
STORED_FFNS = 4
MASK = -10000.0


def gelu(a):
    """Half of a times one plus tanh of sqrt(2/pi) (a + 0.044715 a cubed)."""
    return a / 2 * (1 + torch.tanh((a + 0.044715 * a**3) * math.sqrt(2 / math.pi)))


def multiply(policy):
    """The product of two values of unequal width, cut to the narrower or filled up with ones."""

    def product(a, b):
        if policy == "truncate":
            width = min(a.shape[-1], b.shape[-1])
            return a[..., :width] * b[..., :width]
        narrow, wide = sorted((a, b), key=lambda t: t.shape[-1])
        missing = wide.shape[-1] - narrow.shape[-1]
        return wide * nn.functional.pad(narrow, (0, missing), value=1.0)

    return product


def released(policy="truncate", times=1):
    """(body(x, first, second), FFNs, k of the ratio 1/k) of the released layers, each `times` in a row."""
    product = multiply(policy)
    layers = [
        (lambda x, first, second: torch.tanh(second(gelu(first(x)))), 4, 2),
        (lambda x, first, second: nn.functional.elu(second(gelu(first(x)))), 2, 1),
        (lambda x, first, second: torch.sigmoid(second(torch.relu(first(x)))), 1, 2),
        (lambda x, first, second: second(gelu(first(torch.maximum(x, torch.tanh(x))))), 2, 2),
        (lambda x, first, second: second(torch.relu(product(first(x), x))), 1, 2),
        (lambda x, first, second: nn.functional.leaky_relu(second(gelu(first(x))), 0.01), 2, 3),
    ]
    return [layer for layer in layers for _ in range(times)]


@dataclass(frozen=True)
class Sizes:
    """Widths of a student; `factor` is the token table's width of a trigram embedding, None for a full one."""

    hidden: int
    ffn: int
    vocab: int = 61
    factor: int | None = 7
    heads: int = 12
    teacher: int | None = 11
    positions: int = 512


class Embeddings(nn.Module):
    """Tokens, positions and segments, summed and normalised."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.token_embeddings = nn.Embedding(sizes.vocab, sizes.factor or sizes.hidden, padding_idx=0)
        self.segment_embeddings = nn.Embedding(2, sizes.hidden)
        self.position_embeddings = nn.Embedding(sizes.positions, sizes.hidden)
        self.dense = nn.Linear(3 * sizes.factor, sizes.hidden) if sizes.factor else None
        self.layernorm = nn.LayerNorm(sizes.hidden, eps=EPSILON)

    def forward(self, ids, segments):
        tokens = self.token_embeddings(ids)
        if self.dense is not None:
            edge = torch.zeros_like(tokens[:, :1])
            following = torch.cat([tokens, edge], 1)[:, 1:]
            previous = torch.cat([edge, tokens], 1)[:, :-1]
            tokens = self.dense(torch.cat([following, tokens, previous], -1))
        places = torch.arange(ids.shape[1])
        return self.layernorm(tokens + self.segment_embeddings(segments) + self.position_embeddings(places))


class Attention(nn.Module):
    """Multi-head attention with its residual and norm; also gives the masked scores."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        for part in ("query", "key", "value", "dense"):
            self.add_module(part, nn.Linear(sizes.hidden, sizes.hidden))
        self.layernorm = nn.LayerNorm(sizes.hidden, eps=EPSILON)

    def forward(self, x, padding):
        def split(t):
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = (split(part(x)) for part in (self.query, self.key, self.value))
        scores = q @ k.mT / math.sqrt(q.shape[-1]) + MASK * padding[:, None, None]
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.layernorm(x + self.dense(mixed)), scores


class Ffn(nn.Module):
    """A searched FFN, of whose stored width a leading part is used."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.dense1 = nn.Linear(hidden, width)
        self.dense2 = nn.Linear(width, hidden)
        self.layernorm = nn.LayerNorm(hidden, eps=EPSILON)

    def forward(self, x, body, width):
        def first(a):
            return a @ self.dense1.weight[:width].T + self.dense1.bias[:width]

        def second(a):
            return a @ self.dense2.weight[:, :width].T + self.dense2.bias

        return self.layernorm(x + body(x, first, second))


class Layer(nn.Module):
    """Attention and the stored FFNs, of which the first few run."""

    def __init__(self, sizes: Sizes, body, used: int, inverse: int) -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.all_ffn = nn.ModuleList(Ffn(sizes.hidden, sizes.ffn) for _ in range(STORED_FFNS))
        self.body, self.used, self.width = body, used, sizes.ffn // inverse

    def forward(self, x, padding):
        x, scores = self.attention(x, padding)
        for ffn in self.all_ffn[: self.used]:
            x = ffn(x, self.body, self.width)
        return x, scores


@dataclass
class Outputs:
    """What a forward pass gives; `hidden` are embeddings and layer outputs, through `fit_dense` where there is one."""

    last: torch.Tensor
    hidden: list
    scores: list
    logits: torch.Tensor | None


class PaperStudent(nn.Module):
    """Embeddings, layers and a head.

    Args:
        sizes: widths.
        layers: as `released` gives them.
        kind: encoder, classification (pairs too), regression, spans, choices or several (of tasks).
        classes: outputs of a classification; of `several` the outputs of each task.
    """

    def __init__(self, sizes: Sizes, layers, kind="classification", classes=3) -> None:
        super().__init__()
        self.kind = kind
        self.embeddings = Embeddings(sizes)
        self.encoder = nn.ModuleList(Layer(sizes, *layer) for layer in layers)
        self.fit_dense = nn.Linear(sizes.hidden, sizes.teacher) if sizes.teacher else None
        if kind not in ("encoder", "spans"):
            self.cls_pooler = nn.ModuleDict({"dense": nn.Linear(sizes.hidden, sizes.hidden)})
        if kind == "several":
            self.classifiers = nn.ModuleList(nn.Linear(sizes.hidden, count) for count in classes)
        elif kind != "encoder":
            outputs = {"spans": 2, "regression": 1, "choices": 1}.get(kind, classes)
            self.classifier = nn.Linear(sizes.hidden, outputs)

    def forward(self, ids, segments, padding, task=0):
        """`ids`, `segments`, `padding` (1 at padding): [B, S], of choices [B, choices, S]."""
        shape = ids.shape
        ids, segments, padding = (t.flatten(0, -2) for t in (ids, segments, padding))
        x = self.embeddings(ids, segments)
        hidden, scores = [x], []
        for layer in self.encoder:
            x, score = layer(x, padding)
            hidden.append(x)
            scores.append(score)
        logits = None
        if self.kind == "spans":
            logits = self.classifier(x)
        elif self.kind != "encoder":
            head = self.classifiers[task] if self.kind == "several" else self.classifier
            logits = head(torch.tanh(self.cls_pooler["dense"](x[:, 0])))
            if self.kind == "choices":
                logits = logits.view(shape[:2])
        fitted = hidden if self.fit_dense is None else [self.fit_dense(h) for h in hidden]
        return Outputs(x, fitted, scores, logits)


@torch.no_grad()
def initialise(model: nn.Module, seed=0, wide=False):
    """The published initialisation: N(0, 0.02), padding's row included, norms 1 and 0, biases 0.

    Wide: three times that, with norms and biases that are no neutral elements, so that a wrong order of anything shows.
    (At five times, layers amplify float32's rounding until this module itself is off by 8e-5 from float64.)
    """
    g = torch.Generator().manual_seed(seed)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=g)
        if parameter.dim() > 1:
            parameter.copy_((0.06 if wide else 0.02) * noise)
        else:
            neutral = 1.0 if id(parameter) in norms and name.endswith("weight") else 0.0
            parameter.copy_(neutral + (0.1 if wide else 0.0) * noise)
    return model.eval()


def texts(vocab, length, rows=3, seed=5, choices=None):
    """ids, segments and padding of rows of different lengths, the first one whole; the second text is segment 1."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length, max(1, length // 2), max(1, length - 1)] * (choices or 1))[: rows * (choices or 1)]
    padding = (torch.arange(length) >= lengths[:, None]).long()
    ids = torch.randint(1, vocab, padding.shape, generator=g) * (1 - padding)
    segments = (torch.arange(length) >= lengths[:, None] // 2).long() * (1 - padding)
    batch = (ids, segments, padding)
    return batch if choices is None else tuple(t.view(rows, choices, length) for t in batch)
