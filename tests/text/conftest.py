from __future__ import annotations

from pathlib import Path

import pytest

from minisrv.text.tokenizer import Tokenizer
from tests.text import tiny_tokenizer
from tests.text.tiny_tokenizer import tokenizer_of


@pytest.fixture(scope="session")
def chatml_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer.save_chatml(tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="session")
def tokenizer(chatml_directory: Path) -> Tokenizer:
    return tokenizer_of(chatml_directory)


@pytest.fixture(scope="session")
def byte_fallback_tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer.byte_fallback())


@pytest.fixture(scope="session")
def word_tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer.word_level())
