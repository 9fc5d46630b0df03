"""Text out of Debian packages.

Knows: which packages, how to unpack them without installing, and how to turn their files into
plain documents. Does not know tokens or proportions. Licences are named in the model card.
"""

from __future__ import annotations

import html
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("wordnet-base", "debian-handbook", "gnome-user-docs")

_TAG = re.compile(r"<[^>]+>")
_PARAGRAPH = re.compile(r'<div class="para">(.*?)</div>', re.DOTALL)
_BLOCK = re.compile(r"<(p|h1|h2|h3|title)(?:\s[^>]*)?>(.*?)</\1>", re.DOTALL)
_HIDDEN = re.compile(r"<(info|head|script|style|comment|pre)(?:\s[^>]*)?>.*?</\1>", re.DOTALL)


def unpack(folder: Path) -> Path:
    """Download the packages with apt-get and unpack them; the root of their files."""
    root = folder / "files"
    folder.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        if not list(folder.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", name], cwd=folder, check=True)
        (package,) = folder.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", package, root], check=True)
    return root


def _markup_document(source: str) -> str:
    """The headings and paragraphs of an HTML or Mallard page."""
    blocks = []
    source = _PARAGRAPH.sub(r"<p>\1</p>", _HIDDEN.sub(" ", source))
    for _, block in _BLOCK.findall(source):
        text = " ".join(html.unescape(_TAG.sub("", block)).split())
        if text.isascii() or len(text) > 40:
            blocks.append(re.sub(r"^[\d.]+\s+", "", text).replace("\u00a0", " "))
    return "\n\n".join(b for b in blocks if b)


def _markup_pages(folder: Path, pattern: str) -> Iterator[str]:
    for path in sorted(folder.glob(pattern)):
        text = _markup_document(path.read_text(encoding="utf-8", errors="replace"))
        if len(text) > 300:
            yield text


def manuals(root: Path) -> list[str]:
    """Pages of the Debian Administrator's Handbook and of the GNOME help."""
    share = root / "usr/share"
    return [
        *_markup_pages(share / "doc/debian-handbook/html/en-US", "*.html"),
        *_markup_pages(share / "help/C", "*/*.page"),
    ]


def _entry(line: str, common: set[str]) -> str | None:
    """One line of a WordNet data file as sentences, or None where it makes poor prose."""
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    kind, word = fields[2], fields[4].replace("_", " ").split("(")[0]
    parts = [p.strip() for p in re.split(r";\s*(?=\")", gloss.strip())]
    meaning = re.sub(r"\s*\([^)]*\)", "", parts[0]).split(";")[0].strip(" ;:")
    if word not in common or not word.islower() or not meaning.isascii() or len(meaning) < 8:
        return None
    if re.search(r"genus|family|order|taxonomic|\"", meaning):
        return None
    article = "An" if word[0] in "aeiou" else "A"
    if kind == "n" and re.match(r"(a|an|the|any|someone|something)\s", meaning):
        sentence = f"{article} {word} is {meaning}."
    elif kind == "v":
        sentence = f"To {word} is to {meaning}."
    else:
        sentence = f"{word.capitalize()}: {meaning}."
    examples = [e.strip('" ') for e in parts[1:]]
    for example in examples:
        if example.isascii() and len(example) > 12 and '"' not in example:
            end = "" if example[-1] in ".?!" else "."
            sentence += f" {example[0].upper()}{example[1:]}{end}"
    return sentence


def definitions(root: Path) -> list[str]:
    """WordNet's definitions and examples as sentences; neighbours share a document.

    Only words that WordNet's authors met in their tagged texts: the rest is mostly Latin and
    chemistry.
    """
    counts = (root / "usr/share/wordnet/cntlist.rev").read_text("utf-8").splitlines()
    common = {line.split("%")[0].replace("_", " ") for line in counts}
    documents = []
    for name in ("noun", "verb", "adj", "adv"):
        lines = (root / "usr/share/wordnet" / f"data.{name}").read_text("utf-8").splitlines()
        entries = [e for e in (_entry(x, common) for x in lines if x[0] != " ") if e]
        documents += ["\n".join(entries[i : i + 3]) for i in range(0, len(entries), 3)]
    return documents
