"""Tokenizers small enough to be trained in a test, one of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.trainers import BpeTrainer

from minisrv.checkpoint import describe_tokenizer
from minisrv.text.tokenizer import Tokenizer as ServedTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello world, hello there! stop here or stop there",
    "naïve café über straße 你好世界 世界你好 🎉🎉 emoji",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and loop.first %}"
    "{{ raise_exception('the first message must not be from the assistant') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_level() -> Tokenizer:
    """Byte-level BPE, as used by GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_tokens([AddedToken("two words", special=False), AddedToken("ü ü", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """SentencePiece's BPE with byte fallback, as used by Llama 2."""
    words = ["▁", "▁hello", "▁world", "h", "e", "l", "o", "w", "r", "d", ",", "!", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def word_level() -> Tokenizer:
    """Whole words, joined by WordPiece's decoder, so that tokens are not strings of bytes."""
    words = ["hello", "world", "##ly", "##s", "stop", "."]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="."))
    tokenizer.decoder = decoders.WordPiece("##", cleanup=True)
    return tokenizer


def word_piece() -> Tokenizer:
    """WordPiece with `[CLS]` and `[SEP]` around a text, as used by BERT."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, "hello", "world", "##ly", "stop", ",", ".", "!", "a", "b", "don", "'", "t"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def unigram() -> Tokenizer:
    """SentencePiece's unigram model, as used by T5."""
    words = ["▁", "▁hello", "▁world", *"abcdehlorwtnxisup ,.!"]
    scores = [(word, -float(i + 1)) for i, word in enumerate(words)]
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.Unigram([*((s, 0.0) for s in special), *scores], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, **config: Any) -> Path:
    """Write the tokenizer files of a checkpoint, with `config` as tokenizer_config.json; return the
    directory."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def save_chatml(directory: Path) -> Path:
    """Write a byte-level tokenizer with the ChatML template; return the directory."""
    end = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    tokens = {"eos_token": end, "bos_token": "<|endoftext|>"}
    return save(byte_level(), directory, chat_template=CHATML, **tokens)


def tokenizer_of(directory: str | Path) -> ServedTokenizer:
    """Return the tokenizer of the checkpoint in a directory."""
    return ServedTokenizer.from_description(describe_tokenizer(Path(directory)))
