"""Spaces as data: files, their errors, Kronecker weights and shared layers in a space, samplers on it, a whole run."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.file import load_architecture
from engine.architecture.params import count_parameters, ffn_parameters
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from engine.handover.directory import load_plain
from kernels.language.expression import GELU_FFN, kron_weights, parse_expression, with_kron
from kernels.language.operators import PAPER_BINARY, PAPER_UNARY
from search import cli
from search.config.options import parse
from search.ledger.ledger import Trial
from search.samplers import SAMPLERS, make_sampler
from search.samplers.neighbours import neighbours
from search.space import SearchSpace
from search.space.choices import Group, draw
from search.space.costs import Costs
from search.space.encode import ALWAYS_COUNTED
from search.space.file import read_space, space_names
from search.space.limits import Limits

SHAPE = ModelShape(24, 3, 24, 100, 8)
KRON = {"linears": ["linear", "kron"], "stacks": [1, 2], "ratios": ["1", "1/2"], "activations": ["gelu", "relu2"]}
MASKS = [frozenset(), frozenset({"wb1"}), frozenset({"wb2"}), frozenset({"wb1", "wb2"})]


def write(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return str(path)


def test_the_packages_spaces_are_read():
    assert space_names() == ["kron", "modern"]
    for name in space_names():
        fields = read_space(name)
        SearchSpace(ModelShape(96, 2, 96, 1000, 16), **fields)
    assert read_space("kron")["ratios"] == ["1", "1/2"]


def test_a_file_stands_for_its_fields_where_it_is_given(tmp_path):
    file = write(tmp_path, {"stacks": [1, 3], "activations": ["relu2", "identity"], "ratios": [1, 0.25]})
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"space": {"file": file, "stacks": [2]}}))
    assert parse(["--space.file", file])[0].space.stacks == [1, 3]
    assert parse([f"--space.file={file}", "--space.stacks", "[4]"])[0].space.stacks == [4]
    assert parse(["--space.stacks", "[4]", "--space.file", file])[0].space.stacks == [1, 3]
    space = parse(["--config", str(config)])[0].space
    assert space.stacks == [2]
    assert space.activations == ["relu2", "identity"]
    assert space.ratios == ["1", "1/4"]
    assert space.binaries == list(PAPER_BINARY)
    assert space.file is None
    default = parse([])[0].space
    assert (default.activations, default.linears) == (list(PAPER_UNARY), ["linear"])


BOMB = "a: &a [x, x]\nstacks: [*a, *a]\n"
WRONG = {
    "unknown operator": ("activations: [gelu, mish]", "'mish' is not one; known are gelu, sigmoid"),
    "binary as unary": ("activations: [add]", "'add' is not one"),
    "unknown linear": ("linears: [lora]", "'lora' is not one; known are linear, kron"),
    "no linears": ("linears: []", "space.linears: the list is empty"),
    "no stacks": ("stacks: []", "space.stacks: the list is empty"),
    "no ratios": ("ratios: []", "space.ratios: the list is empty"),
    "text for a list": ("stacks: many", "space.stacks: must be a list"),
    "number for a list": ("activations: 3", "space.activations: must be a list"),
    "list for a text": ("policy: [pad]", "space.policy"),
    "object in a list": ("activations: [{gelu: 1}]", "is not one"),
    "stack zero": ("stacks: [0]", "stack: must be an integer from 1 to 64"),
    "stack as text": ("stacks: ['1']", "stack: must be an integer"),
    "ratio above one": ("ratios: [2]", "ratio: must be 1/k"),
    "ratio nan": ("ratios: [.nan]", "ratio: must be 1/k"),
    "heights": ("heights: [7, 3]", "space.heights"),
    "heights as text": ("heights: ['3', '7']", "space.heights"),
    "policy": ("policy: crop", "'crop' is not known; use truncate or pad"),
    "sharing": ("layer_shapes: all", "'all' is not known; use per-layer or shared"),
    "block": ("kron_block: [2, x]", "kron_block: must be two positive integers"),
    "unknown field": ("operators: [gelu]", "unknown field 'operators'; known are activations"),
    "field that is no text": ("3: [gelu]", "unknown field 3"),
    "twice": ("stacks: [1]\nstacks: [2]", "'stacks' is given twice"),
    "empty": ("", "must give one or more of the fields"),
    "a list": ("[1, 2]", "must give one or more of the fields"),
    "no yaml": ("stacks: [1", "is not YAML"),
    "two documents": ("stacks: [1]\n---\nstacks: [2]", "is not YAML"),
    "python object": ("stacks: !!python/object/apply:os.system ['true']", "is not YAML"),
    "unhashable key": ("? [1]\n: 2", "is not YAML"),
    "alias": (BOMB, "anchors and aliases are not read"),
    "deep": ("stacks: " + "[" * 50 + "]" * 50, "nested more than 4 deep"),
    "long": ("stacks: [" + "1," * 70_000 + "1]", "larger than 65536 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_end_in_one_line(case, tmp_path, capsys):
    text, words = WRONG[case]
    assert cli.main(["search", "--preset", "smoke", "--space.file", write(tmp_path, text)]) == 2
    captured = capsys.readouterr().err
    assert words in captured
    assert captured.count("\n") == 1
    assert len(captured) < 600


@pytest.mark.parametrize("arguments", [
    ["--space.file", "no-such-space"], ["--space.file"], ["--space.activations", "[mish]"], ["--space.linears", "[]"],
    ["--space.kron_block", "[1,2,3]"], ["--space.layer_shapes", "some"], ["--space.activations", "gelu"],
])  # fmt: skip
def test_wrong_options_end_in_one_line(arguments, capsys):
    assert cli.main(["search", "--preset", "smoke", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_block_that_fits_no_ratio_is_named():
    with pytest.raises(UserError, match="5 does not divide the inner width 24"):
        SearchSpace(SHAPE, **KRON, kron_block=[5, 4])
    assert SearchSpace(SHAPE, **KRON).kron_block == (4, 4)
    assert SearchSpace(SHAPE, **KRON, kron_block=[12, 3]).shape.block == (12, 3)


@pytest.mark.parametrize("shared_expressions", [False, True])
@pytest.mark.parametrize("shared_shapes", [False, True])
def test_counts_with_kronecker_weights_are_exact(shared_expressions, shared_shapes):
    """Against all 16^3 assignments of Kronecker weights, stack and ratio; draws hit all of them."""
    options = {"layer_expressions": "shared"} if shared_expressions else {}
    options |= {"layer_shapes": "shared"} if shared_shapes else {}
    wide = SearchSpace(SHAPE, **KRON, **options)
    low, high = wide.reachable()
    space = SearchSpace(SHAPE, [low + (high - low) * 0.4, low + (high - low) * 0.6], **KRON, **options)
    choices = list(product(MASKS, [1, 2], [Fraction(1), Fraction(1, 2)]))
    inside = set()
    for assignment in product(choices, repeat=3):
        if shared_expressions and len({c[0] for c in assignment}) > 1:
            continue
        if shared_shapes and len({c[1:] for c in assignment}) > 1:
            continue
        arch = Architecture(tuple(LayerSpec(with_kron(GELU_FFN, m), n, r) for m, n, r in assignment))
        if space.budget[0] <= count_parameters(arch, space.shape) <= space.budget[1]:
            assert space.contains(arch)
            inside.add(assignment)
    assert space.count_shapes() == len(inside) > 0
    rng, drawn = np.random.default_rng(0), set()
    for _ in range(400):
        arch = space.sample(rng)
        assert space.violation(arch) is None
        drawn.add(tuple((kron_weights(s.expression), s.stack, s.ratio) for s in arch.layers))
        assert drawn <= inside
        child = space.mutate(arch, rng)
        assert space.violation(child) is None
        assert space.key(child) != space.key(arch)
    assert len(drawn) == len(inside) if len(inside) < 20 else len(drawn) > 0.3 * min(len(inside), 400)
    assert all(space.contains(seed) for seed in space.gelu_seeds())


def test_draws_of_groups_are_uniform():
    costs, rng = ((1, 2, 3),) * 2, np.random.default_rng(0)
    groups = [Group((((i, 0), (i, 1), (i, 2)),) * 2, costs, low, 6) for i, low in enumerate((5, 2))]
    counts = [group.table.count() for group in groups]
    assert counts == [3, 9]
    drawn = [tuple(draw(groups, rng)) for _ in range(6000)]
    frequencies = [drawn.count(value) / 6000 for value in set(drawn)]
    assert len(frequencies) == 12
    assert max(abs(f - 1 / 12) for f in frequencies) < 5 * (1 / 12 / 6000) ** 0.5


def test_the_default_space_draws_what_it_always_drew():
    """Kronecker weights and extra operators change nothing where a space does not have them; digest of the texts as
    they were before there were any."""
    space = SearchSpace(ModelShape(540, 6, 540, teacher_hidden_size=768), [15e6, 16e6])
    assert space.count_shapes() == 4_480_424
    rng, digest = np.random.default_rng(7), hashlib.sha256()
    arch = space.sample(rng)
    for _ in range(40):
        arch = space.sample(rng)
        digest.update(f"{arch}; {space.mutate(arch, rng)}".encode())
    shapes = space.with_shapes([(s.stack, s.ratio) for s in arch.layers])
    expressions = space.with_expressions([s.expression for s in arch.layers])
    for part in (shapes, expressions):
        for _ in range(20):
            digest.update(str(part.mutate(part.sample(rng), rng)).encode())
    digest.update(str([str(seed) for seed in space.gelu_seeds()]).encode())
    assert digest.hexdigest() == "ef856bd72940421ea344af04ac18a400fd2e40bedab661b715831bf7769d5be1"
    assert len(space.feature_names()) == 6 * 50 + 3
    assert space.counted == ALWAYS_COUNTED
    assert space.features(arch).shape[1] == 4 * 13 + 7 + 8


def test_stages_keep_kronecker_weights():
    space = SearchSpace(SHAPE, **KRON)
    rng = np.random.default_rng(3)
    winner = space.sample(rng)
    stage2 = space.with_shapes([(s.stack, s.ratio) for s in winner.layers])
    for _ in range(20):
        arch = stage2.sample(rng)
        assert [(s.stack, s.ratio) for s in arch.layers] == [(s.stack, s.ratio) for s in winner.layers]
        assert stage2.contains(stage2.mutate(arch, rng))
    stage3 = space.with_expressions([s.expression for s in winner.layers])
    for _ in range(20):
        arch = stage3.sample(rng)
        assert [s.expression for s in arch.layers] == [s.expression for s in winner.layers]
        assert stage3.contains(stage3.mutate(arch, rng))


def test_only_kronecker_weights():
    space = SearchSpace(SHAPE, linears=["kron"], ratios=["1", "1/2"])
    arch = space.sample(np.random.default_rng(0))
    assert all(kron_weights(s.expression) == {"wb1", "wb2"} for s in arch.layers)
    assert "linear is not in the space" in str(space.violation(Architecture(tuple(
        LayerSpec(GELU_FFN, s.stack, s.ratio) for s in arch.layers))))  # fmt: skip
    assert space.gelu_seeds()
    assert ffn_parameters(24, 12, 1, {"wb1", "wb2"}, space.kron_block) == 2 * (3 * 6 + 16) + 12 + 72


def test_features_and_tokens_of_extra_operators():
    space = SearchSpace(SHAPE, **(KRON | {"activations": ["gelu", "relu2", "softplus", "identity"]}))
    arch = Architecture.parse("kron1_1(identity(linear1_1(x,wb1)),wb2), " * 2 + "linear2_2(relu2(kron2_2(x,wb1)),wb2)")
    row = dict(zip(space.feature_names(), space.encode(arch), strict=True))
    assert row["layer0.count_identity"] == 1
    assert row["layer2.count_relu2"] == row["layer2.count_kron"] == 1
    assert row["layer0.count_softplus"] == 0
    assert [row[f"layer2.token_{i}"] for i in range(4)] == [3, 15, -2, 1]
    assert row["layer2.activation_mid"] == 1
    matrix = space.features(arch)
    assert np.isfinite(matrix).all()
    assert len({tuple(r) for r in matrix}) == 2
    assert sum(row[f"layer{i}.params_share"] for i in range(3)) < 1


def test_identity_is_no_function_of_its_own():
    space = SearchSpace(SHAPE, activations=["identity", "relu2"])
    arch = space.sample(np.random.default_rng(0))
    bare = Architecture(
        tuple(LayerSpec(parse_expression("linear(linear(x,wb1),wb2)"), 1, Fraction(1)) for _ in arch.layers)
    )
    with_identity = Architecture(tuple(
        LayerSpec(parse_expression("linear(identity(linear(x,wb1)),wb2)"), 1, Fraction(1)) for _ in arch.layers
    ))  # fmt: skip
    assert space.key(bare) == space.key(with_identity)
    assert space.function_key(bare) == space.function_key(with_identity)
    assert space.function_key(bare) != space.function_key(
        Architecture(tuple(LayerSpec(with_kron(s.expression, ("wb1",)), s.stack, s.ratio) for s in bare.layers))
    )


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("shared", [False, True], ids=["per layer", "shared"])
def test_every_sampler_searches_such_a_space(name, shared):
    options = {"layer_expressions": "shared", "layer_shapes": "shared"} if shared else {}
    space = SearchSpace(SHAPE, **(KRON | {"heights": [3, 4]}), **options)
    sampler = make_sampler(name, space, 0)
    kinds = set()
    for number in range(14):
        (arch,) = sampler.propose()
        assert space.violation(arch) is None
        kinds |= {node.op for s in arch.layers for node in s.expression.walk()}
        score = -space.parameters(arch) / 1e4
        sampler.observe([Trial("t", number, arch, space.key(arch), score, space.parameters(arch), 0.0, "complete")])
    assert {"kron", "relu2"} <= kinds


def test_neighbours_reach_other_kinds_of_linear():
    space = SearchSpace(SHAPE, **KRON, layer_expressions="shared")
    arch = next(seed for seed in space.gelu_seeds() if not kron_weights(seed.layers[0].expression))
    found = [kron_weights(n.layers[0].expression) for n in neighbours(space, arch) if n.layers[0] != arch.layers[0]]
    low, high = space.budget
    assert all(low <= space.parameters(n) <= high for n in neighbours(space, arch))
    wide = SearchSpace(SHAPE, space.reachable(), **KRON, layer_expressions="shared")
    found = {kron_weights(n.layers[0].expression) for n in neighbours(wide, arch)}
    assert {frozenset({"wb1"}), frozenset({"wb2"})} <= found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kron", "modern"])
def test_a_search_in_a_shipped_space(name, tmp_path):
    """The smoke preset end to end: supernet, stages, export; the found model has what the space allows."""
    arguments = ["search", "--preset", "smoke", "--space.file", name, "--runs", str(tmp_path), "--name", "r"]
    extra = ["--space.linears", "[kron]"] if name == "kron" else []
    assert cli.main([*arguments, *extra, "--baselines.random", "false"]) == 0
    found = load_architecture(tmp_path / "r" / "best" / "architecture.json")
    fields = read_space(name) | ({"linears": ["kron"]} if extra else {})
    saved = yaml.safe_load((tmp_path / "r" / "config.yaml").read_text())["space"]
    assert {field: saved[field] for field in fields} == fields
    allowed = {"x", *fields["activations"], *fields["binaries"], *fields.get("linears", ["linear"])}
    assert {node.op for s in found.layers for node in s.expression.walk()} <= allowed
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "r" / "best" / "model").eval()
    names = {key.rsplit(".", 1)[1] for key in model.state_dict() if ".dense1." in key}
    assert names == ({"a", "b", "bias"} if extra else {"weight", "bias"})
    ids = torch.randint(1, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        load_plain(tmp_path / "r" / "best" / "model")(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5
    )


def test_limits_count_kronecker_weights():
    """A FLOP limit that only Kronecker weights keep: all draws keep it, whatever is shared."""
    for options in ({}, {"layer_expressions": "shared"}, {"layer_expressions": "shared", "layer_shapes": "shared"}):
        free = SearchSpace(SHAPE, **KRON, **options)
        costs = Costs(free.shape, sequence_length=16)
        full = min(costs.cost("flops", a) for a in free.gelu_seeds() if "kron" not in str(a))
        space = SearchSpace(SHAPE, **KRON, **options, limits=Limits(costs, flops=full * 0.99))
        rng = np.random.default_rng(0)
        for _ in range(30):
            arch = space.sample(rng)
            assert costs.cost("flops", arch) <= full * 0.99
            assert space.contains(space.mutate(arch, rng))
