"""Tasks whose answers a program can check.

Knows: how to draw a case of each task, how it may be phrased, what the one right answer is, and
which side of the held-out split it falls on. Does not know tokens, models or conversations.

The split is by construction: a case's `key` names its content without its phrasing (for sums and
products the unordered operands, for sorting the unordered items), and a keyed hash of it decides.
Training draws only from one side, the evaluation only from the other.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from recipe.words import CITIES, COLORS, EVERYDAY, JOBS, NAMES, NOUNS, open_word

HELD_OUT_ONE_IN = 16
MAX_ANSWER_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Case:
    """One question with its only right answer."""

    task: str
    prompt: str
    answer: str
    key: str

    @property
    def held_out(self) -> bool:
        digest = hashlib.blake2b(f"{self.task}|{self.key}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def _said(rng: random.Random, *phrasings: str) -> str:
    """One of the phrasings, now and then without its last sign or its first capital.

    They must begin with an instruction and must not end with a sign that belongs to the content.
    """
    text = rng.choice(phrasings)
    if rng.random() < 0.2 and text[-1] in ".?=":
        text = text[:-1].rstrip()
    return text[0].lower() + text[1:] if rng.random() < 0.2 else text


def _number(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


_ASKING = ("How much is", "Compute", "What's")


def _bare(rng: random.Random, a: int, sign: str, b: int) -> str:
    """The sum as one would type it."""
    space = rng.choice((" ", " ", " ", ""))
    return f"{a}{space}{sign}{space}{b}" + rng.choice(("", "", " =", "=", " = ?", "?"))


def _add(rng: random.Random) -> Case:
    a, b = (_number(rng, rng.choice((1, 2, 2, 3, 3, 3))) for _ in range(2))
    prompt = _said(
        rng,
        f"What is {a} + {b}?",
        f"{a} + {b} =",
        f"Add {a} and {b}.",
        f"Calculate {a} + {b}.",
        f"What is {a} plus {b}?",
        f"What is the sum of {a} and {b}?",
        f"{a} plus {b}",
        f"What is {_bare(rng, a, '+', b)}",
        _bare(rng, a, "+", b),
        f"{rng.choice(_ASKING)} {a} + {b}?",
    )
    return Case("add", prompt, str(a + b), f"{min(a, b)},{max(a, b)}")


def _subtract(rng: random.Random) -> Case:
    pair = [_number(rng, rng.choice((1, 2, 2, 3, 3, 3))) for _ in range(2)]
    a, b = max(pair), min(pair)
    prompt = _said(
        rng,
        f"What is {a} - {b}?",
        f"{a} - {b} =",
        f"Subtract {b} from {a}.",
        f"Calculate {a} - {b}.",
        f"What is {a} minus {b}?",
        f"What is the difference between {a} and {b}?",
        f"{a} minus {b}",
        f"What is {_bare(rng, a, '-', b)}",
        _bare(rng, a, "-", b),
        f"{rng.choice(_ASKING)} {a} - {b}?",
    )
    return Case("subtract", prompt, str(a - b), f"{a},{b}")


def _multiply(rng: random.Random) -> Case:
    a, b = _number(rng, rng.choice((1, 2, 2, 2, 3, 3))), rng.randrange(2, 10)
    if rng.random() < 0.3:
        a, b = b, a
    sign = rng.choice("**x\u00d7")
    prompt = _said(
        rng,
        f"What is {a} * {b}?",
        f"{a} {sign} {b} =",
        f"Multiply {a} by {b}.",
        f"Calculate {a} * {b}.",
        f"What is {a} times {b}?",
        f"What is the product of {a} and {b}?",
        f"{a} times {b}",
        f"What is {_bare(rng, a, sign, b)}",
        _bare(rng, a, sign, b),
        f"{rng.choice(_ASKING)} {a} * {b}?",
    )
    return Case("multiply", prompt, str(a * b), f"{min(a, b)},{max(a, b)}")


def _items(rng: random.Random, low: int, high: int) -> list[str]:
    """A list of words, numbers, names or letters."""
    n = rng.randint(low, high)
    kind = rng.random()
    if kind < 0.25:
        return rng.sample(NOUNS, n)
    if kind < 0.6:
        share = rng.random()
        words = [
            open_word(rng) if rng.random() < share else rng.choice(NOUNS) for _ in range(min(n, 14))
        ]
        return [w.capitalize() for w in words] if rng.random() < 0.15 else words
    if kind < 0.7:
        return rng.sample(NAMES, n)
    if kind < 0.85:
        return [str(x) for x in rng.sample(range(1000), n)]
    return [rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(n)]


def _listed(rng: random.Random, items: Sequence[str]) -> str:
    """The items as one would type them."""
    kind = rng.random()
    if kind < 0.8:
        return ", ".join(items)
    if kind < 0.88:
        return " ".join(items)
    if kind < 0.95:
        return ",".join(items)
    return f"[{', '.join(items)}]"


def _copy(rng: random.Random) -> Case:
    items = _items(rng, 2, 24)
    text = rng.choice((" ", " ", ", ")).join(items)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:] + rng.choice(".!?")
    prompt = _said(
        rng,
        "Repeat this exactly:",
        "Copy the following text:",
        "Say this back to me:",
        "Write this again, word for word:",
        "Please repeat after me:",
        "Repeat after me:",
        f"{rng.choice(('Repeat', 'Copy', 'Echo', 'Copy this'))}:",
    )
    return Case("copy", f"{prompt} {text}", text, text)


def _reverse(rng: random.Random) -> Case:
    items = _items(rng, 2, 12)
    text = _listed(rng, items)
    prompt = _said(
        rng,
        f"Reverse this list: {text}",
        f"Write this list backwards: {text}",
        f"Put these items in reverse order: {text}",
        f"Reverse the order of the following: {text}",
        f"List these from last to first: {text}",
        f"Reverse the list {text}.",
        f"Reverse: {text}",
        f"Reverse {text}.",
    )
    return Case("reverse", prompt, ", ".join(reversed(items)), ", ".join(items))


def _sort_numbers(rng: random.Random) -> Case:
    limit = rng.choice((10, 100, 100, 1000, 1000))
    numbers = rng.sample(range(limit), rng.randint(3, min(9, limit)))
    text, key = _listed(rng, [str(x) for x in numbers]), ",".join(map(str, sorted(numbers)))
    if rng.random() < 0.3:
        prompt = _said(
            rng,
            f"Sort these numbers from largest to smallest: {text}",
            f"Sort these numbers in descending order: {text}",
            f"Sort {text} in descending order.",
        )
        return Case("sort_numbers", prompt, ", ".join(map(str, sorted(numbers)[::-1])), key)
    prompt = _said(
        rng,
        f"Sort these numbers: {text}",
        f"Sort these numbers from smallest to largest: {text}",
        f"Put these numbers in ascending order: {text}",
        f"Arrange these numbers in increasing order: {text}",
        f"Sort the numbers {text}.",
        f"Sort {text}.",
        f"Sort: {text}",
    )
    return Case("sort_numbers", prompt, ", ".join(map(str, sorted(numbers))), key)


def _sort_words(rng: random.Random) -> Case:
    if rng.random() < 0.2:
        made_up = 0.3 * rng.random()
        drawn = (
            open_word(rng) if rng.random() < made_up else rng.choice(EVERYDAY)
            for _ in range(rng.randint(3, 5))
        )
        words = list(dict.fromkeys(drawn))
    else:
        words = rng.sample(NOUNS, rng.randint(3, 8))
    text = _listed(rng, words)
    prompt = _said(
        rng,
        f"Sort these words alphabetically: {text}",
        f"Put these words in alphabetical order: {text}",
        f"Sort this list of words from A to Z: {text}",
        f"Arrange these words in alphabetical order: {text}",
        f"Sort these words: {text}",
        f"Sort alphabetically: {text}",
        f"Sort {text}.",
    )
    return Case("sort_words", prompt, ", ".join(sorted(words)), ",".join(sorted(words)))


def _count(rng: random.Random) -> Case:
    if rng.random() < 0.6:
        items = _items(rng, 1, 16)
        text = ", ".join(items)
        prompt = _said(
            rng,
            f"How many items are in this list: {text}?",
            f"Count the items: {text}",
            f"How many things are listed here: {text}?",
            f"Count the entries in this list: {text}",
            f"How many items are there: {text}?",
        )
        return Case("count", prompt, str(len(items)), text)
    target, *others = rng.sample(NOUNS, rng.randint(3, 5))
    if rng.random() < 0.25:
        target = open_word(rng)
        others = [o for o in (*others, open_word(rng)) if o != target]
    items = [target] * rng.randint(1, 7) + rng.choices(others, k=rng.randint(1, 9))
    rng.shuffle(items)
    text = ", ".join(items)
    prompt = _said(
        rng,
        f'How many times does the word "{target}" appear here: {text}?',
        f'Count how often "{target}" occurs in this list: {text}',
        f'How often is "{target}" in this list: {text}?',
        f"How many times does {target} appear here: {text}?",
    )
    return Case("count", prompt, str(items.count(target)), f"{target}:{text}")


def letters_question(rng: random.Random) -> tuple[str, str]:
    """A question about the letters of one word; for training, and no part of the evaluation."""
    word = open_word(rng) if rng.random() < 0.7 else rng.choice(NOUNS)
    shown = rng.choice((word, word, word, f'"{word}"'))
    match rng.randrange(4):
        case 0:
            question = _said(
                rng,
                f"Spell {shown}.",
                f"Spell the word {shown}.",
                f"How do you spell {shown}?",
                f"Which letters are in the word {shown}?",
            )
            return question, "-".join(word)
        case 1:
            question = _said(
                rng,
                f"How many letters are in the word {shown}?",
                f"How many letters does {shown} have?",
                f"Count the letters in {shown}.",
            )
            return question, str(len(word))
        case _:
            question = _said(
                rng,
                f"Reverse the word {shown}.",
                f"Write the word {shown} backwards.",
                f"Spell {shown} backwards.",
                f"Reverse the letters of {shown}.",
                f"Reverse {shown}.",
            )
            return question, word[::-1]


def _entries(rng: random.Random, n: int) -> dict[str, str]:
    """Key-value pairs; the kinds of keys and values vary from list to list."""
    kind = rng.randrange(5)
    if kind == 0:
        return {k: str(_number(rng, rng.randint(2, 4))) for k in rng.sample(NOUNS, n)}
    if kind == 1:
        return {k: rng.choice(NOUNS) for k in rng.sample(NAMES, min(n, len(NAMES)))}
    if kind == 2:
        return {str(k): rng.choice(NOUNS) for k in rng.sample(range(100, 1000), n)}
    if kind == 3:
        numeric = rng.random() < 0.5
        return {
            open_word(rng): str(_number(rng, rng.randint(1, 4))) if numeric else open_word(rng)
            for _ in range(min(n, 30))
        }
    codes = rng.sample(range(26 * 26 * 100), n)
    return {
        f"{chr(65 + c // 2600)}{chr(65 + c // 100 % 26)}{c % 100:02d}": str(_number(rng, 3))
        for c in codes
    }


def _lookup_list(rng: random.Random) -> tuple[dict[str, str], str]:
    entries = _entries(
        rng, rng.choice((rng.randint(3, 12), rng.randint(8, 40), rng.randint(30, 70)))
    )
    line = rng.choice(("{}: {}", "{}: {}", "{} = {}", "{} -> {}"))
    separator = rng.choice(("\n", "\n", "; "))
    return entries, separator.join(line.format(k, v) for k, v in entries.items())


def _ask(rng: random.Random, key: str) -> str:
    return _said(
        rng,
        f"What is the value of {key}?",
        f"Which value belongs to {key}?",
        f"Look up {key}.",
        f"What does the list say for {key}?",
        f"Find the value for {key}.",
    )


def _lookup(rng: random.Random) -> Case:
    entries, text = _lookup_list(rng)
    key = rng.choice(list(entries))
    question = _ask(rng, key)
    if rng.random() < 0.3:
        prompt = f"{question} Here is the list:\n{text}"
    else:
        intro = rng.choice(("Here is a list:", "Given this list:", "Use this table:", "Data:", ""))
        prompt = f"{intro}\n{text}\n{question}".lstrip()
    return Case("lookup", prompt, entries[key], f"{key}|{text}")


def lookup_questions(rng: random.Random, n: int) -> list[Case]:
    """One list, `n` questions: only the first prompt holds the list; for training."""
    entries, text = _lookup_list(rng)
    cases = []
    for i in range(n):
        key = rng.choice(list(entries))
        prompt = _ask(rng, key) if i else f"Here is a list:\n{text}\n{_ask(rng, key)}"
        cases.append(Case("lookup", prompt, entries[key], f"{key}|{text}"))
    return cases


def _json(rng: random.Random) -> Case:
    def proper(known: Sequence[str]) -> str:
        return open_word(rng).capitalize() if rng.random() < 0.25 else rng.choice(known)

    name, age, city, job = proper(NAMES), rng.randrange(5, 100), proper(CITIES), rng.choice(JOBS)
    color, price = rng.choice(COLORS), rng.randrange(2, 1000)
    thing = open_word(rng) if rng.random() < 0.25 else rng.choice(NOUNS)
    facts: dict[str, str | int]
    match rng.randrange(4):
        case 0:
            facts = {"name": name, "age": age, "city": city}
            text = rng.choice(
                (
                    f"{name} is {age} years old and lives in {city}.",
                    f"{name}, who lives in {city}, is {age} years old.",
                    f"In {city} lives {name}, aged {age}.",
                )
            )
        case 1:
            facts = {"name": name, "job": job, "city": city}
            text = rng.choice(
                (
                    f"{name} lives in {city} and works as {job}.",
                    f"{name} from {city} has one job: {job}.",
                    f"The {job} {name} lives in {city}.",
                )
            )
        case 2:
            facts = {"item": thing, "color": color, "price": price}
            text = rng.choice(
                (
                    f"The {thing} is {color} and costs {price} dollars.",
                    f"For {price} dollars you get one {color} {thing}.",
                    f"One {color} {thing} is sold for {price} dollars.",
                )
            )
        case _:
            facts = {"name": name, "item": thing, "count": price}
            text = rng.choice(
                (
                    f"{name} ordered {price} pieces of {thing}.",
                    f"{name} bought the {thing}, {price} of them.",
                    f"An order of {price} times {thing} came from {name}.",
                )
            )
    content = json.dumps(facts)
    asked = list(facts)
    if rng.random() < 0.2:
        rng.shuffle(asked)
    if rng.random() < 0.2:
        asked.pop()
    keys = ", ".join(asked)
    if rng.random() < 0.25:
        prompt = f"{text} Give me that as JSON with the keys {keys}" + rng.choice((".", ""))
    else:
        prompt = _said(
            rng,
            f"Make a JSON object with the keys {keys}: {text}",
            f"Write this as JSON with the keys {keys}. {text}",
            f"Fill a JSON object ({keys}) from this text: {text}",
        )
    return Case("json", prompt, json.dumps({k: facts[k] for k in asked}), content)


TASKS: dict[str, Callable[[random.Random], Case]] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "copy": _copy,
    "reverse": _reverse,
    "sort_numbers": _sort_numbers,
    "sort_words": _sort_words,
    "count": _count,
    "lookup": _lookup,
    "json": _json,
}


def draw(rng: random.Random, task: str, *, held_out: bool) -> Case:
    """A case of `task` from the wanted side of the split."""
    while True:
        case = TASKS[task](rng)
        if case.held_out == held_out:
            return case
