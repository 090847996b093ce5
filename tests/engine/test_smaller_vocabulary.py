"""Smaller tokenizers: texts of the data keep their pieces, others get smaller ones and never [UNK]; also from files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_toys import bert_tokenizer, roberta_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from engine.data.smaller_vocabulary import kept_tokens, refusal, smaller_tokenizer
from engine.errors import UserError

LETTERS = "abcdefghij"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def pieces(seed=0, count=300):
    """Random pieces of 2 to 5 letters, half of them for the inside of words."""
    rng = np.random.default_rng(seed)
    made = ["".join(rng.choice(list(LETTERS), rng.integers(2, 6))) for _ in range(count)]
    return [("##" if rng.integers(2) else "") + piece for piece in made]


def vocabulary():
    single = [*LETTERS, *("##" + c for c in LETTERS), "!", "##!", ","]
    names = ["[PAD]", *(f"[unused{k}]" for k in range(5)), *SPECIAL[1:], *single, *pieces(), "ab9", "##9c"]
    return {piece: n for n, piece in enumerate(dict.fromkeys(names))}


def bert(**changes):
    """A BertTokenizer as transformers makes it, special tokens scattered as in the published ones."""
    return BertTokenizer(vocab=vocabulary(), model_max_length=64, **changes)


def fast(processor="template"):
    """A tokenizer of no particular model, with added tokens outside the model's vocabulary."""
    names = vocabulary()
    core = Tokenizer(models.WordPiece(names, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    ends = [("[SEP]", names["[SEP]"]), ("[CLS]", names["[CLS]"])]
    if processor == "template":
        core.post_processor = processors.Sequence(
            [
                processors.TemplateProcessing(
                    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
                )
            ]
        )
    elif processor == "bert":
        core.post_processor = processors.BertProcessing(*ends)
    core.enable_padding(pad_id=names["[PAD]"], pad_token="[PAD]")
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    made.add_tokens(["<url>"])
    made.add_special_tokens({"additional_special_tokens": ["<user>"]})
    return made


def unigram():
    single = [("<unk>", 0.0), ("▁", -3.0), *((c, -6.0 - 0.1 * n) for n, c in enumerate(LETTERS))]
    rng = np.random.default_rng(5)
    longer = [(p.replace("##", "") if p[0] == "#" else "▁" + p, -7.0 - rng.random()) for p in pieces(9)]
    known = {}
    for piece, score in (*single, *longer):
        known.setdefault(piece, score)
    core = Tokenizer(models.Unigram(list(known.items()), unk_id=0, byte_fallback=False))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.add_special_tokens(["<s>", "<pad>", "</s>"])
    ids = core.get_vocab()
    core.post_processor = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", cls_token="<s>", sep_token="</s>"
    )


MAKERS = {"bert": bert, "template": fast, "processing": lambda: fast("bert"), "unigram": unigram}


def texts(count, seed, alphabet=LETTERS + "ABC!,"):
    rng = np.random.default_rng(seed)
    return [
        " ".join("".join(rng.choice(list(alphabet), rng.integers(1, 9))) for _ in range(rng.integers(1, 8)))
        for _ in range(count)
    ]


def ids_of(tokenizer, given):
    return [np.array(row) for row in tokenizer(given, padding=False)["input_ids"]]


@pytest.mark.parametrize("name", MAKERS)
def test_texts_of_the_data_have_the_same_pieces_renumbered(name, tmp_path):
    whole = MAKERS[name]()
    data = [*texts(40, 0), "", "é in data"]
    rows = ids_of(whole, data)
    kept = kept_tokens(whole, rows)
    assert (np.diff(kept) > 0).all()
    assert len(kept) < 0.9 * len(whole)
    small = smaller_tokenizer(whole, kept)
    small.save_pretrained(tmp_path / "small")
    assert type(small) is type(whole)
    for made in (small, AutoTokenizer.from_pretrained(tmp_path / "small")):
        assert type(made) is type(whole)
        assert len(made) == len(kept)
        assert made.model_max_length == whole.model_max_length
        for text, row in zip(data, rows, strict=True):
            found = made(text, padding=False)
            assert kept[found["input_ids"]].tolist() == row.tolist()
            assert made.convert_ids_to_tokens(found["input_ids"]) == whole.convert_ids_to_tokens(row.tolist())
        one, other = whole(data[0], data[1], padding=False), made(data[0], data[1], padding=False)
        assert kept[other["input_ids"]].tolist() == one["input_ids"]
        assert other.get("token_type_ids") == one.get("token_type_ids")
        for token in ("pad", "unk", "cls", "sep"):
            assert kept[getattr(made, f"{token}_token_id")] == getattr(whole, f"{token}_token_id")
        padded = made(data[:5], padding=True)["input_ids"]
        assert {row[-1] for row in padded} <= {made.pad_token_id, made.sep_token_id}
        assert made.decode(other["input_ids"]) == whole.decode(one["input_ids"])


@pytest.mark.parametrize("name", MAKERS)
def test_other_texts_are_cut_into_smaller_pieces(name):
    whole = MAKERS[name]()
    small = smaller_tokenizer(whole, kept_tokens(whole, ids_of(whole, texts(5, 0))))
    changed = 0
    for text in texts(200, 7):
        before, after = ids_of(whole, [text])[0], ids_of(small, [text])[0]
        unknown = (before == whole.unk_token_id).sum()
        assert (after == small.unk_token_id).sum() == unknown
        if not unknown:
            assert small.decode(after) == whole.decode(before)
        changed += len(after) > len(before)
    assert changed > 20


def test_added_tokens_outside_the_vocabulary_stay():
    whole = fast()
    small = smaller_tokenizer(whole, kept_tokens(whole, []))
    text = "ab <url>!ab <user>ab"
    assert small.tokenize(text) == ["a", "##b", "<url>", "!", "a", "##b", "<user>", "a", "##b"]
    assert [t for t in whole.tokenize(text) if "<" in t] == ["<url>", "<user>"]
    assert small.convert_tokens_to_ids("<user>") == len(small) - 1
    assert "<user>" in small.all_special_tokens


def test_what_is_kept():
    whole = bert()
    names = vocabulary()
    seen = np.array([[names[pieces()[3]], names["[SEP]"]]], dtype=np.int32)
    kept = kept_tokens(whole, seen)
    expected = {*SPECIAL, *LETTERS, *("##" + c for c in LETTERS), "!", "##!", ",", pieces()[3], "ab9", "##9c"}
    assert {whole.convert_ids_to_tokens(int(n)) for n in kept} == expected
    more = kept_tokens(whole, seen, frequent=7)
    added = [n for n in more if n not in kept]
    rest = [n for piece, n in names.items() if n not in kept and not piece.startswith("[unused")]
    assert added == sorted(rest)[:7]
    everything = kept_tokens(whole, seen, frequent=10_000)
    assert len(everything) == len(names) - 5  # [unused0] to [unused4] are no text


def test_a_tokenizer_can_be_cut_twice():
    whole = bert()
    first = smaller_tokenizer(whole, kept_tokens(whole, ids_of(whole, texts(40, 0))))
    second = smaller_tokenizer(first, kept_tokens(first, ids_of(first, texts(10, 0))))
    assert len(second) < len(first) < len(whole)
    assert second.tokenize(texts(10, 0)[3]) == whole.tokenize(texts(10, 0)[3])


def test_cased_and_uncased_stay_so(tmp_path):
    whole = bert(do_lower_case=False)
    small = smaller_tokenizer(whole, kept_tokens(whole, ids_of(whole, ["ab"])))
    assert small.tokenize("A") == whole.tokenize("A") == ["[UNK]"]
    small.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["do_lower_case"] is False
    assert str(tmp_path) not in json.dumps(small.init_kwargs, default=str)


def test_bad_input_is_named():
    whole = bert()
    kept = kept_tokens(whole, [])
    for call in (lambda: kept_tokens(roberta_tokenizer(), []), lambda: smaller_tokenizer(roberta_tokenizer(), kept)):
        with pytest.raises(UserError, match="is BPE, whose pieces are put together step by step, and cannot be cut"):
            call()
    with pytest.raises(UserError, match="is not a fast one"):
        kept_tokens(object(), [])
    assert refusal(bert_tokenizer()) is None
    for frequent in (-1, 1.5, True):
        with pytest.raises(UserError, match=r"frequent: .* is out of range"):
            kept_tokens(whole, [], frequent=frequent)
    with pytest.raises(UserError, match="token_ids_of_data: 9999 is no id"):
        kept_tokens(whole, [np.array([9999])])
    with pytest.raises(UserError, match="token_ids_of_data: -1 is no id"):
        kept_tokens(whole, np.array([-1]))
    for wrong in (kept[::-1], np.append(kept, kept[-1]), kept[None], kept[:0], kept.astype(float)):
        with pytest.raises(UserError, match="kept: must be token ids in increasing order"):
            smaller_tokenizer(whole, wrong)
    with pytest.raises(UserError, match="kept: 9999 is no id"):
        smaller_tokenizer(whole, np.append(kept, 9999))
    with pytest.raises(UserError, match=r"kept: the special token '\[PAD\]' \(0\) is left out"):
        smaller_tokenizer(whole, kept[1:])
