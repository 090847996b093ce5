"""Layers with adapters, parametrizations, pruning, quantization, offloading or hooks: `FusedFFN`, its stack and
`replace_ffn` against plain PyTorch modules with the same attached."""

from __future__ import annotations

import copy
import time
import warnings

import pytest
import torch
from attached import ATTACHMENTS, NO_GRADIENTS, SAME_OUTPUT, LoraLinear, lora, merge, switch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook

from kernels import readable
from kernels.ffn.modules import FusedFFN, FusedFFNStack
from kernels.ffn.replace import replace_ffn

# float32 rounding of two products of width <= 60 and a LayerNorm, in another order of summation
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class PlainFFN(nn.Module):
    """The same as `FusedFFN`, by hand."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.dense1, self.dense2 = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.layernorm = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x):
        return self.layernorm(x + self.dense2(F.gelu(self.dense1(x), approximate="tanh")))


class PlainStack(nn.Module):
    def __init__(self, stack: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainFFN(hidden, inner) for _ in range(stack))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def linears(_, module) -> bool:
    return type(module) is nn.Linear


def second(name, module) -> bool:
    return type(module) is nn.Linear and name.endswith("dense2")


def norms(_, module) -> bool:
    return type(module) is nn.LayerNorm


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pair(kind, **sizes):
    torch.manual_seed(0)
    plain = PlainStack(2, 21, 13) if kind is FusedFFNStack else PlainFFN(21, 13)
    fused = FusedFFNStack(2, 21, 13) if kind is FusedFFNStack else FusedFFN(21, 13)
    fused.load_state_dict(plain.state_dict())
    return fused, plain


def gradients(module, x):
    wanted = [p for p in module.parameters() if p.requires_grad]
    out = module(x)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    return out, torch.autograd.grad(out, [x, *wanted], weight, allow_unused=True)


@pytest.mark.parametrize("select", [linears, second], ids=["all", "dense2"])
@pytest.mark.parametrize("kind", [FusedFFN, FusedFFNStack])
@pytest.mark.parametrize("name", ATTACHMENTS)
def test_what_is_attached_acts(name, kind, select):
    fused, plain = pair(kind)
    x = torch.randn(2, 7, 21, requires_grad=True)
    before = fused(x)
    for module in (fused, plain):
        ATTACHMENTS[name](module, select)
    out, own = gradients(fused, x)
    expected, theirs = gradients(plain, x)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert torch.allclose(out, before, **CLOSE) == (name in SAME_OUTPUT and name != "quantized")
    assert len(own) == len(theirs)
    assert len(own) > 1 or name in NO_GRADIENTS
    assert name in NO_GRADIENTS or all(grad is not None for grad in own)
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected, **CLOSE)


@pytest.mark.parametrize("name", ["forward_hook", "forward_pre_hook", "patched_forward", "backward_hook"])
@pytest.mark.parametrize("kind", [FusedFFN, FusedFFNStack])
def test_on_layer_norm_too(name, kind):
    fused, plain = pair(kind)
    x = torch.randn(5, 21, requires_grad=True)
    for module in (fused, plain):
        ATTACHMENTS[name](module, norms)
    for a, b in zip(gradients(fused, x)[1], gradients(plain, x)[1], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_hooks_on_the_layers_of_a_stack_fire():
    fused, plain = pair(FusedFFNStack)
    for module in (fused, plain):
        module.layers[1].register_forward_hook(lambda _, __, out: out * 2.0)
    x = torch.randn(3, 21)
    torch.testing.assert_close(fused(x), plain(x), **CLOSE)


def test_layers_of_a_stack_may_differ():
    fused, x = FusedFFNStack(2, 20, 20), torch.randn(3, 20)
    fused.layers[1] = FusedFFN(20, 20, "linear(relu(linear(x,wb1)),wb2)")
    torch.testing.assert_close(fused(x), fused.layers[1](fused.layers[0](x)), **CLOSE)
    fused.layers[1] = nn.Identity()
    torch.testing.assert_close(fused(x, seed=3), fused.layers[0](x), **CLOSE)


def test_hooks_of_all_modules_fire():
    fused, plain = pair(FusedFFN)
    x = torch.randn(3, 21)
    handle = register_module_forward_hook(lambda m, _, out: out * 2.0 if isinstance(m, nn.Linear) else None)
    try:
        torch.testing.assert_close(fused(x), plain(x), **CLOSE)
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", [FusedFFN, FusedFFNStack])
def test_adapters_on_off_and_merged(kind):
    fused, _ = pair(kind)
    x = torch.randn(4, 21)
    without = fused(x)
    lora(fused, linears)
    with_adapters = fused(x)
    assert (with_adapters - without).abs().max() > 0.05
    switch(fused, False)
    torch.testing.assert_close(fused(x), without, **CLOSE)
    switch(fused, True)
    merge(fused)
    assert not [m for m in fused.modules() if isinstance(m, LoraLinear)]
    torch.testing.assert_close(fused(x), with_adapters, **CLOSE)


def test_pruning_survives_several_backward_passes_and_removal():
    from torch.nn.utils import prune

    fused, plain = pair(FusedFFN)
    x = torch.randn(4, 21)
    for module in (fused, plain):
        ATTACHMENTS["pruning"](module, linears)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(fused(x), plain(x), **CLOSE)
    kept = fused(x)
    for layer in (fused.dense1, fused.dense2):
        prune.remove(layer, "weight")
    assert fused.read() is not None
    torch.testing.assert_close(fused(x), kept, **CLOSE)
    assert (fused.dense1.weight == 0).float().mean() > 0.3


@pytest.mark.parametrize("stack", [1, 3])
def test_the_mask_of_a_seed_is_the_fused_one(stack):
    fused = FusedFFNStack(stack, 30, 12, p_drop=0.4)
    x = torch.randn(50, 30)
    expected = fused(x, seed=7)
    fused.layers[0].dense1.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(fused(x, seed=7), expected, **CLOSE)
    torch.manual_seed(0)
    first = fused(x)
    torch.manual_seed(0)
    assert torch.equal(first, fused(x))
    assert not torch.equal(first, fused(x))


@pytest.mark.parametrize("change", ["bias", "affine"])
def test_layers_without_parameters_the_op_needs_are_called(change):
    fused, plain = pair(FusedFFN)
    for module in (fused, plain):
        if change == "bias":
            module.dense1.bias = None
        else:
            module.layernorm = nn.LayerNorm(21, elementwise_affine=False)
    x = torch.randn(3, 21)
    torch.testing.assert_close(fused(x), plain(x), **CLOSE)


def test_the_note_is_said_once_and_names_the_layer(monkeypatch):
    monkeypatch.setattr(readable, "_noted", set())
    fused, _ = pair(FusedFFN)
    lora(fused, second)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            fused(torch.randn(2, 21))
    (only,) = [w for w in caught if issubclass(w.category, readable.CalledLayersWarning)]
    assert "FusedFFN" in str(only.message)
    assert "dense2 is a LoraLinear" in str(only.message)


def test_plain_layers_are_read_and_the_check_is_cheap():
    fused, _ = pair(FusedFFN)
    x = torch.randn(4, 21)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert fused.to(dtype).read() is not None
    assert copy.deepcopy(fused).read() is not None
    twin = torch.func.functional_call(fused, {n: p.detach() for n, p in fused.named_parameters()}, (x.double(),))
    torch.testing.assert_close(twin, fused(x.double()))
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(100):
            readable.are_readable(fused.dense1, fused.dense2, fused.layernorm)
        times.append((time.perf_counter() - begin) / 100)
    assert min(times) < 2e-5  # 1.3 us on an EPYC


def test_compiled_and_exported_modules_call_and_read_too():
    fused, plain = pair(FusedFFN)
    x = torch.randn(3, 21)
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), plain(x), **CLOSE)
    (read,) = torch.export.export(fused, (x,)).graph.find_nodes(
        op="call_function", target=torch.ops.ffnas.ffn_fwd.default
    )
    assert read
    for module in (fused, plain):
        lora(module, linears)
    torch.testing.assert_close(compiled(x), plain(x), **CLOSE)
    exported = torch.export.export(fused, (x,))
    torch.testing.assert_close(exported.module()(x), plain(x), **CLOSE)
    ATTACHMENTS["parametrization"](fused.dense1, linears)
    ATTACHMENTS["parametrization"](plain.dense1, linears)
    torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend="eager")(x), plain(x), **CLOSE)


SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 99,
    "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.arange(14).reshape(2, 7) + 5


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False).eval()


def in_ffn(name, module) -> bool:
    return type(module) is nn.Linear and "attention" not in name and name.endswith("dense")


@pytest.mark.parametrize("name", ATTACHMENTS)
def test_replaced_layers_run_what_is_attached(name):
    model = bert()
    plain = copy.deepcopy(model)
    replace_ffn(model)
    for each in (model, plain):
        ATTACHMENTS[name](each, in_ffn)
    outs, grads = [], []
    for each in (model, plain):
        out = each(IDS).last_hidden_state
        wanted = [p for p in each.parameters() if p.requires_grad]
        outs.append(out)
        grads.append(torch.autograd.grad(out.square().sum() + out.sum(), wanted))
    torch.testing.assert_close(*outs, **CLOSE)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # sums of 14 tokens through two layers


@pytest.mark.parametrize("part", ["intermediate", "output", "intermediate.intermediate_act_fn", "output.dropout"])
def test_hooks_around_replaced_layers_fire(part):
    model = bert()
    plain = copy.deepcopy(model)
    replace_ffn(model)
    for each in (model, plain):
        for layer in each.encoder.layer:
            layer.get_submodule(part).register_forward_hook(lambda _, __, out: out * 1.5)
    torch.testing.assert_close(model(IDS).last_hidden_state, plain(IDS).last_hidden_state, **CLOSE)


def test_a_replaced_activation_is_noticed():
    model = bert()
    plain = copy.deepcopy(model)
    replace_ffn(model)
    for each in (model, plain):
        each.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    torch.testing.assert_close(model(IDS).last_hidden_state, plain(IDS).last_hidden_state, **CLOSE)


def test_another_expression_with_adapters_and_dropout():
    model = bert()
    with replace_ffn(model, "tanh(linear(relu(linear(x,wb1)),wb2))"):
        before = model(IDS).last_hidden_state
        lora(model, in_ffn)
        after = model(IDS).last_hidden_state
        assert (after - before).abs().max() > 0.01
        switch(model, False)
        torch.testing.assert_close(model(IDS).last_hidden_state, before, **CLOSE)
        switch(model, True)
        merge(model)
        torch.testing.assert_close(model(IDS).last_hidden_state, after, **CLOSE)
