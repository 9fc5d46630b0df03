# ruff: noqa: SIM905 - lists read better as text
"""Word lists shared by the tasks and the chat.

Knows: plain English words, first names, cities and jobs, and how to make up words. Does not know
what they are used for.
"""

from __future__ import annotations

import random
from pathlib import Path

NOUNS: tuple[str, ...] = tuple(
    """
    apple arrow autumn baby badge bag ball band bank barn basin basket beach bean bear bed bee bell
    bench berry bike bird blanket boat bone book boot bottle bowl box branch bread breeze brick
    bridge brook broom brush bucket bus bush butter button cabin cake camel camera candle canoe
    card carpet carrot cart castle cat cave chain chair chalk cheese cherry chest chicken circle
    city clay clock cloth cloud coat coin copper corn cotton couch cow crab cradle cream crown cup
    curtain daisy deer desk dish doctor dog doll door dove dragon drawer dream dress drum duck dust
    eagle ear earth egg elbow engine envelope fabric farm feather fence fern field finger fire fish
    flag flame flour flower flute fog forest fork fox frame friend frog frost fruit garden garlic
    gate ghost gift ginger glass globe glove goat gold goose grain grape grass guitar hammer hand
    harbor hat hay heart hedge helmet hen hill hole honey hook horn horse house ice igloo ink insect
    iron island ivory ivy jacket jam jar jelly jewel juice kettle key king kitchen kite kitten knee
    knife knot ladder lake lamb lamp lantern lawn leaf leather lemon letter lily lion lizard lock
    log lunch magnet maple marble market mask meadow melon metal milk mill mirror mitten monkey moon
    morning moss moth mountain mouse mud mushroom nail napkin necklace needle nest net night nose
    notebook nut oak oar ocean olive onion orange orchard otter oven owl ox paddle page paint palm
    pan panda paper parrot path peach peanut pear pebble pen pencil penguin pepper piano picnic
    picture pie pig pigeon pillow pine pipe pirate plane planet plate plum pocket poem pond pony
    potato prince puddle pumpkin puppy purse puzzle queen quilt rabbit radio raft rain raven reed
    ribbon rice ring river road robin robot rock roof room root rope rose ruler saddle sail salad
    salt sand scarf school scissors seal seed shadow sheep shell ship shirt shoe shovel silk silver
    skate sky sled slipper snail snake snow soap sock soup spark spider spoon spring squirrel stable
    star steam stick stone storm stove straw stream street string sugar summer sun swan sweater
    table tail tea teapot tent thread throne thumb thunder ticket tiger tin toast tomato tooth torch
    tower town toy train treasure tree truck trumpet tulip tunnel turkey turtle umbrella valley vase
    velvet village vine violin wagon wall walnut water wave wax whale wheat wheel whistle willow
    wind window wing winter wolf wood wool worm yarn zebra
    """.split()
)

NAMES: tuple[str, ...] = tuple(
    """
    Ada Alice Amir Anna Ben Bella Carl Clara Daniel Dora Elena Emil Emma Eric Eva Felix Fiona Frank
    Grace Greta Hana Henry Hugo Ida Irene Isaac Ivan Jack Jane Jonas Julia Karl Kate Lara Leo Lena
    Lily Lucas Lucy Marco Maria Mark Maya Mia Milo Mina Nadia Nina Noah Nora Olga Oliver Omar Oscar
    Paul Petra Peter Priya Rosa Ruth Sam Sara Simon Sofia Stella Theo Tom Tara Umar Vera Victor
    Wanda Willa Xavier Yara Yuki Zara Zoe
    """.split()
)

CITIES: tuple[str, ...] = tuple(
    """
    Amsterdam Athens Berlin Bern Boston Brussels Budapest Cairo Chicago Copenhagen Dublin Florence
    Geneva Hamburg Helsinki Istanbul Kyoto Lima Lisbon London Lyon Madrid Milan Montreal Munich
    Nairobi Oslo Paris Porto Prague Quito Rome Seattle Seoul Stockholm Sydney Tokyo Toronto Vienna
    Warsaw Zurich
    """.split()
)

LONG_CITIES: tuple[str, ...] = tuple(
    """
    Addis Ababa, Buenos Aires, Cape Town, Cedar Rapids, Den Haag, El Paso, Fort Worth, Ho Chi Minh
    City, Hong Kong, Kansas City, Kuala Lumpur, Las Vegas, Los Angeles, Mexico City, New Delhi, New
    Orleans, New York, New York City, Palo Alto, Panama City, Port Louis, Rio de Janeiro, Salt Lake
    City, San Diego, San Francisco, San Jose, Santa Fe, Sri Lanka, St. Louis, Stoke-on-Trent, São
    Paulo, Tel Aviv, The Hague, Washington, Zürich, Bogotá, Córdoba, Malmö, Kraków, Göteborg,
    Köln, München, Genève, Besançon, Tromsø, Reykjavík, Brasília, Medellín
    """.replace("\n    ", " ")
    .strip()
    .split(", ")
)
"""Names of several words, or with letters beyond those of English."""

JOBS: tuple[str, ...] = tuple(
    """
    actor artist baker barber builder butcher carpenter chef clerk dancer dentist doctor driver
    editor engineer farmer fisher gardener guard judge lawyer librarian mechanic miner musician
    nurse painter pilot plumber poet porter printer sailor singer tailor teacher waiter writer
    """.split()
)

COLORS: tuple[str, ...] = tuple(
    "black blue brown gold gray green orange pink purple red silver white yellow".split()
)

EVERYDAY: tuple[str, ...] = tuple(
    word
    for line in (Path(__file__).parent / "wordnet_words.txt").read_text("utf-8").splitlines()
    if not line.startswith("#")
    for word in line.split()
)
"""Four thousand words of all kinds, for lists that should not always hold the nouns above."""

_ONSETS = (
    "b c d f g h j k l m n p r s t v w y z br ch cl cr dr fl gr kr ph pl qu sh sl st th tr".split()
)
_VOWELS = "a a e e i i o o u u ai au ea ee oo ou ie y".split()
_CODAS = ["", "", "", "", *"b d ck f g k l m mp n nd ng nt p r rd rn rt s ss st t tch x".split()]


def open_word(rng: random.Random) -> str:
    """A word that need not exist, so that it can only be handled piece by piece."""
    kind = rng.random()
    if kind < 0.5:
        return rng.choice(EVERYDAY)
    if kind < 0.9:
        syllables = rng.choice((1, 2, 2, 3))
        return "".join(
            rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables)
        )
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 7)))
