"""Small tokenizers and data sets the data tests share; nothing here touches a network or an installed model."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine.data import EncodedDataset

_TEXT = "the a cat dog bird sat ran flew on under over mat log sky big small red blue and then it was good bad"
WORDS = _TEXT.split()


def bert_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """WordPiece with [CLS] a [SEP] b [SEP] and token types, whole words of `WORDS` and single letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *letters,
        *("##" + x for x in letters),
        ".",
        "!",
        "?",
    ]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with <s> a </s></s> b </s>, pad id 1 and no token types."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def sentences(count: int, seed: int = 0, low: int = 1, high: int = 20) -> list[str]:
    """Distinct-looking sentences of `low` to `high` known words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(low, high + 1))) for _ in range(count)]


def dataset(lengths: list[int], *, labels: bool = True) -> EncodedDataset:
    """Rows of the given lengths; row i holds only the token i + 10, so that a batch shows which rows it has."""
    sizes = np.asarray(lengths, dtype=np.int64)
    return EncodedDataset(
        tokens=np.repeat(np.arange(len(sizes)) + 10, sizes).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        second=(sizes // 2).astype(np.int32),
        labels=np.arange(len(sizes), dtype=np.int64) if labels else None,
        pad_id=3,
    )
