"""What the model reads while it is trained.

Knows: the sources and their shares, how documents become tokens with a loss mask, and how they are
packed into rows. Does not know the model or the optimizer.

Generated text is made on the fly by the workers of a data loader; text from packages comes from a
prepared file. Documents follow each other in a row, each ended by <|endoftext|>; every row begins
with a new document, and the documents are numbered so that attention can stay within one. In chats
only the assistant's words are learned.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from recipe import chat, facts, tool_chat
from recipe.stories import story
from recipe.tokenizer import END_OF_TEXT, IM_END, IM_START, render
from recipe.vignettes import vignette

IGNORED = -100
# Shares of all tokens.
SHARES: dict[str, float] = {
    "tasks": 0.51, "tools": 0.19, "light": 0.06, "stories": 0.08, "vignettes": 0.05,
    "facts": 0.03, "definitions": 0.05, "manuals": 0.03,
}  # fmt: skip
CHATS = ("tasks", "tools", "light")
FROM_PACKAGES = ("definitions", "manuals")
_DRAWN_TOGETHER = 64


def generate(rng: random.Random, source: str) -> str:
    """One document of a generated source."""
    if source == "tasks":
        return render(chat.conversation(rng))
    if source == "tools":
        return render(*tool_chat.conversation(rng))
    if source == "light":
        return render(chat.light_conversation(rng))
    if source == "stories":
        text = story(rng, rng.choice((1, 1, 1, 2, 2, 3, 4, 6)))
        start = rng.randrange(4) if rng.random() < 0.25 else 0
        return "\n\n".join(text.split("\n\n")[start:]) or text
    if source == "vignettes":
        return vignette(rng)
    return facts.passage(rng)


def split_document(text: str, limit: int = 3000) -> Iterator[str]:
    """Pieces of at most about `limit` characters, cut between paragraphs."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > limit:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    if piece:
        yield piece


def save_documents(path: Path, documents: dict[str, list[str]], tokenizer: Tokenizer) -> int:
    """Store the documents of each source as tokens; the number of tokens."""
    arrays: dict[str, np.ndarray] = {}
    for source, texts in documents.items():
        encoded = [e.ids for e in tokenizer.encode_batch_fast(texts)]
        arrays[source] = np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded])
        arrays[f"{source}_ends"] = np.cumsum([len(ids) for ids in encoded])
    np.savez_compressed(path, **arrays)
    return sum(len(arrays[source]) for source in documents)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class PackedBatches(IterableDataset[Batch]):
    """An endless stream of (inputs, labels, document numbers), each [rows, length]."""

    def __init__(self, folder: Path, tokenizer_file: Path, rows: int, length: int, seed: int):
        self.corpus_file = folder / "packages.npz"
        self.tokenizer_file = tokenizer_file
        self.rows, self.length, self.seed = rows, length, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        rng = random.Random(self.seed * 1000 + (worker.id if worker else 0))
        documents = self._documents(rng)
        while True:
            shape = (self.rows, self.length + 1)
            ids, numbers = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int32)
            learned = np.zeros(shape, dtype=bool)
            for row in range(self.rows):
                filled = number = 0
                while filled <= self.length:
                    tokens, mask = next(documents)
                    n = min(len(tokens), self.length + 1 - filled)
                    ids[row, filled : filled + n] = tokens[:n]
                    learned[row, filled : filled + n] = mask[:n]
                    learned[row, filled] = False  # nothing before it tells the first token
                    numbers[row, filled : filled + n] = number
                    filled, number = filled + n, number + 1
            labels = np.where(learned, ids, IGNORED)
            yield (
                torch.from_numpy(ids[:, :-1].copy()),
                torch.from_numpy(labels[:, 1:].copy()),
                torch.from_numpy(numbers[:, :-1].copy()),
            )

    def _documents(self, rng: random.Random) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Documents from the source that is furthest behind its share."""
        tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        corpus = dict(np.load(self.corpus_file))
        waiting: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {s: [] for s in SHARES}
        used = dict.fromkeys(SHARES, rng.random())
        while True:
            source = min(SHARES, key=lambda s: used[s] / SHARES[s])
            if not waiting[source]:
                if source in FROM_PACKAGES:
                    waiting[source] = self._stored(rng, corpus, source, tokenizer)
                else:
                    waiting[source] = self._generated(rng, source, tokenizer)
            document = waiting[source].pop()
            used[source] += len(document[0])
            yield document

    def _stored(
        self, rng: random.Random, corpus: dict[str, np.ndarray], source: str, tokenizer: Tokenizer
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        end_id = tokenizer.token_to_id(END_OF_TEXT)
        ends = corpus[f"{source}_ends"]
        documents = []
        for i in rng.choices(range(len(ends)), k=_DRAWN_TOGETHER):
            ids = np.append(corpus[source][ends[i - 1] if i else 0 : ends[i]], end_id)
            documents.append((ids, np.ones(len(ids), dtype=bool)))
        return documents

    def _generated(
        self, rng: random.Random, source: str, tokenizer: Tokenizer
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        texts = [generate(rng, source) + END_OF_TEXT for _ in range(_DRAWN_TOGETHER)]
        documents = []
        for encoding in tokenizer.encode_batch_fast(texts):
            ids = np.array(encoding.ids, dtype=np.int64)
            chatted = source in CHATS
            mask = answer_mask(ids, tokenizer) if chatted else np.ones(len(ids), dtype=bool)
            documents.append((ids, mask))
        return documents


def answer_mask(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """True on the assistant's words and on the token that ends them."""
    start, end = tokenizer.token_to_id(IM_START), tokenizer.token_to_id(IM_END)
    assistant = tokenizer.token_to_id("assistant")
    mask = np.zeros(len(ids), dtype=bool)
    ends = np.flatnonzero(ids == end)
    for begin in np.flatnonzero((ids[:-1] == start) & (ids[1:] == assistant)):
        first = begin + 3  # after <|im_start|>, "assistant" and the line end
        mask[first : ends[np.searchsorted(ends, first)] + 1] = True
    return mask
