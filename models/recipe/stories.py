# ruff: noqa: SIM905 - lists read better as text
"""Generated stories.

Knows: who can be in a story, where it can happen, and how plots chain into longer stories with the
same people. Does not know the sentences (`plots`) or how they are learned.
"""

from __future__ import annotations

import random

from recipe.grammar import expand
from recipe.plots import ENDINGS, LINKS, OPENINGS, PLOTS

GIRLS = (
    "Ada Alice Anna Bella Clara Dora Elena Emma Eva Fiona Grace Hana Ida Jane Julia Lara Lena Lily "
    "Lucy Maria Maya Mia Nina Nora Olga Priya Rosa Ruth Sara Sofia Stella Tara Vera Zoe"
).split()
BOYS = (
    "Amir Ben Carl Daniel Emil Felix Frank Henry Hugo Isaac Ivan Jack Jonas Karl Leo Lucas Marco "
    "Mark Milo Noah Oliver Omar Oscar Paul Peter Sam Simon Theo Tom Umar Victor"
).split()
PLACES = (
    "the old mill|the river|the market|the beach|the forest|the lake|the library|the park|"
    "the harbor|the hill behind the village|the apple orchard|the old castle|the lighthouse|"
    "the meadow|the train station|the little island|the town square|the duck pond|the stone bridge"
).split("|")
HOMES = (
    "a small village|a little house with a red roof|a big city|a town by the sea|"
    "a wooden house at the edge of the forest|an old farmhouse|a tall house with many stairs|"
    "a quiet street|a village in the mountains|a house next to the bakery|a boat on the river"
).split("|")
THINGS = (
    "blue kite|silver key|wooden flute|red scarf|small lantern|music box|golden coin|old compass|"
    "paper boat|glass marble|toy horse|green umbrella|picture book|little drum|warm hat|"
    "pocket watch|yellow balloon|wooden sword|painted cup|string of beads|small telescope"
).split("|")
TREATS = (
    "apples|bread and cheese|honey cake|plums|cookies|nuts|sandwiches|pancakes|"
    "strawberries|carrot cake|pears|raisins"
).split("|")
ANIMALS = (
    "fox|rabbit|hedgehog|owl|squirrel|kitten|puppy|duck|bird|turtle|mouse|lamb|deer|otter|"
    "goat|raven|frog"
).split("|")
WEATHER = "sunny|rainy|windy|cold|warm|foggy|bright|cloudy|snowy|quiet|golden".split("|")
TRAITS = (
    "brave|curious|shy|cheerful|clever|kind|quiet|patient|stubborn|careful|dreamy|lively".split("|")
)
ELDERS = (
    ("mother", "she", "her"),
    ("grandmother", "she", "her"),
    ("aunt", "she", "her"),
    ("father", "he", "his"),
    ("grandfather", "he", "his"),
    ("uncle", "he", "his"),
)


def _person(rng: random.Random, taken: str = "") -> tuple[str, str, str, str]:
    while True:
        girl = rng.random() < 0.5
        name = rng.choice(GIRLS if girl else BOYS)
        if name != taken:
            return (name, "she", "her", "her") if girl else (name, "he", "him", "his")


def _slots(rng: random.Random, hero: str = "") -> dict[str, str]:
    if hero:
        she = hero in GIRLS or (hero not in BOYS and rng.random() < 0.5)
        he, him, his = ("she", "her", "her") if she else ("he", "him", "his")
    else:
        hero, he, him, his = _person(rng)
    friend, fhe, fhim, fhis = _person(rng, hero)
    elder, ehe, ehis = rng.choice(ELDERS)
    return {
        "hero": hero, "he": he, "him": him, "his": his,
        "friend": friend, "fhe": fhe, "fhim": fhim, "fhis": fhis,
        "elder": elder, "ehe": ehe, "ehis": ehis,
        "place": rng.choice(PLACES), "home": rng.choice(HOMES),
        "trait": rng.choice(TRAITS), **_episode(rng),
    }  # fmt: skip


def _episode(rng: random.Random) -> dict[str, str]:
    """What may change from one episode to the next."""
    return {
        "thing": rng.choice(THINGS),
        "treat": rng.choice(TREATS),
        "animal": rng.choice(ANIMALS),
        "weather": rng.choice(WEATHER),
    }


def story(
    rng: random.Random,
    episodes: int = 1,
    *,
    hero: str = "",
    animal: str = "",
    plot: str = "",
) -> str:
    """A story of so many episodes, told about the same people; the first may be asked for."""
    slots = _slots(rng, hero)
    if animal:
        slots["animal"] = animal
    names = rng.sample(list(PLOTS), min(episodes, len(PLOTS)))
    if plot:
        names = [plot, *[n for n in names if n != plot]][:episodes]
    paragraphs = [expand(rng.choice(OPENINGS), slots, rng)]
    for i, name in enumerate(names):
        if i:
            slots |= _episode(rng)
            paragraphs.append(expand(rng.choice(LINKS), slots, rng))
        paragraphs += [expand(rng.choice(beat), slots, rng) for beat in PLOTS[name]]
    if rng.random() < 0.6:
        paragraphs.append(expand(rng.choice(ENDINGS), slots, rng))
    return rng.choice(("\n\n", "\n\n", " ")).join(paragraphs)
