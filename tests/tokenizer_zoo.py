"""Tokenizers of several kinds, trained here, and templates of several shapes."""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bayes_lora.episodes import PromptTemplate

LETTERS = [chr(code) for code in range(32, 127)] + list("\n\té")
TEXT = ["the film was good and bad. Answer: yes no maybe not so positive negative"] * 3
SPECIAL = ["<unk>", "<s>", "</s>"]
TEMPLATES = [
    PromptTemplate(),
    PromptTemplate("{input}", "{option}"),
    PromptTemplate("{input}\nIs it", "{option}"),
    PromptTemplate("{input} Ans", "wer: {option}"),
    PromptTemplate("Q: {input}\n", "{option}."),
    PromptTemplate("{x: {input}}\n{options}", " {option}", separator=", "),
    PromptTemplate("{input}\n{options}\nAnswer:", separator="\n", letters=True),
]


def finish(raw: Tokenizer, after: str = "") -> PreTrainedTokenizerFast:
    """Wrap a tokenizer that puts <s> before a text, and `after` behind it."""
    ids = [(token, raw.token_to_id(token)) for token in SPECIAL]
    raw.post_processor = processors.TemplateProcessing(single=f"<s> $A {after}".strip(), special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's unigram model as newer conversions have it: the space is marked by a pre-tokenizer."""
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.Replace("\u200b", "")
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    raw.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=180, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=LETTERS, show_progress=False
    )
    raw.train_from_iterator(TEXT, trainer)
    return finish(raw)


def llama() -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as Llama 2 has it: the space is marked by a normalizer, unknown letters fall to bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=120, initial_alphabet=LETTERS, show_progress=False))
    trained = json.loads(bpe.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *trained["vocab"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in trained["merges"]]
    raw = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    raw.decoder = decoders.Sequence(steps)
    return finish(raw)


def merging() -> PreTrainedTokenizerFast:
    """Bytes as Llama 3 and Qwen split them: newlines after punctuation belong to its token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "\u010a"  # how byte-level tokenizers write it
    merges = [(".", newline), (newline, newline), (".", newline * 2)]
    tokens = ["<s>", *alphabet, f".{newline}", newline * 2, f".{newline}{newline}"]
    raw = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    split = Regex(r"[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+| ?\p{L}+|\s+(?!\S)|\s+")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>", pad_token="<s>")
