# ruff: noqa: E501
"""Generated expository text: short descriptions and how-to texts from small tables of facts.

Knows: the tables and the sentences around them. Everything stated is common knowledge. Does not
know who asks.
"""

from __future__ import annotations

import random

from recipe.grammar import expand

# name | what it is | where | eats | what is special
_ANIMALS = """
fox|a small wild animal with red fur and a bushy tail|in forests, in fields, and even in cities|mice, berries, and insects|it can hear a mouse under deep snow
wolf|a large wild relative of the dog|in forests and on open plains|deer and other animals|it lives and hunts in a family group called a pack
bear|a big, strong animal with thick fur|in forests and in the mountains|berries, fish, roots, and honey|it sleeps through most of the winter
rabbit|a small animal with long ears|in meadows and at the edge of forests|grass, leaves, and carrots|it digs long tunnels in the ground
owl|a bird that hunts at night|in forests and old barns|mice and small birds|it can fly almost without a sound
eagle|a large bird with sharp eyes and strong claws|in the mountains and near lakes|fish and small animals|it can see a rabbit from very far away
penguin|a black and white bird that cannot fly|on cold coasts in the far south|fish and small sea animals|it swims very fast under water
elephant|the largest animal on land|in the grasslands and forests of Africa and Asia|grass, leaves, and bark|it uses its long trunk to drink, to smell, and to lift things
lion|a big cat with golden fur|in the grasslands of Africa|zebras and antelopes|its roar can be heard many kilometers away
giraffe|the tallest animal in the world|in the grasslands of Africa|leaves from tall trees|its neck is longer than a grown man is tall
camel|a large animal with one or two humps|in dry deserts|dry grass and thorny plants|it can live for many days without water
horse|a strong animal that people have kept for thousands of years|on farms and on wide grasslands|grass, hay, and oats|it can sleep while it is standing
cow|a farm animal that gives milk|on farms all over the world|grass and hay|it has a stomach with four parts
sheep|a farm animal with thick wool|on farms and on green hills|grass and herbs|its wool is cut once a year and made into cloth
goat|a farm animal that climbs very well|on farms and in the mountains|grass, leaves, and twigs|it can stand on very narrow rocks
dog|a friendly animal that lives with people|in homes all over the world|meat and other food that people give it|it can smell far better than a human
cat|a small animal that many people keep at home|in homes, on farms, and in the streets|mice, birds, and fish|it can see well when there is very little light
mouse|a tiny animal with a long tail|in fields, in forests, and in houses|seeds, grain, and fruit|it can squeeze through a very small hole
hedgehog|a small animal covered with spines|in gardens and hedges|insects, worms, and snails|it rolls into a ball when it is in danger
squirrel|a small animal with a big tail|in trees, in forests and parks|nuts, seeds, and mushrooms|it hides nuts in the ground for the winter
beaver|an animal with a flat tail and strong teeth|in rivers and ponds|bark, leaves, and water plants|it cuts down trees and builds dams
otter|a playful animal with thick brown fur|in rivers and along the coast|fish and crabs|it can close its ears and nose under water
frog|a small animal with long back legs|in ponds and wet meadows|insects and worms|it begins its life as a tadpole
turtle|an animal with a hard shell|in water and on land|plants, insects, and small fish|some turtles live for more than a hundred years
snake|a long animal without legs|in forests, deserts, and fields|mice, frogs, and eggs|it smells with its tongue
whale|a huge animal that lives in the sea|in all the oceans of the world|small sea animals and fish|it breathes air, so it must come to the surface
dolphin|a clever animal that lives in the sea|in warm seas and some rivers|fish and squid|it finds its way by listening to echoes
shark|a large fish with many rows of teeth|in all the oceans|fish and seals|when it loses a tooth, a new one grows
bee|a small flying insect|in hives and in hollow trees|the sweet juice of flowers|it makes honey and carries pollen from flower to flower
ant|a tiny insect that lives in large groups|in nests in the ground or in wood|seeds, sugar, and other insects|it can carry many times its own weight
butterfly|an insect with four colorful wings|in gardens and meadows|the sweet juice of flowers|it begins its life as a caterpillar
spider|a small animal with eight legs|in gardens, in houses, and in forests|flies and other insects|many spiders build a web to catch their food
"""

# name | what it is | why it matters | a detail
_THINGS = """
rain|water that falls from clouds|plants, animals, and people need it to live|It forms when tiny drops in a cloud join together and become too heavy to float
snow|frozen water that falls in white flakes|when it melts in spring, it fills the rivers|Every snowflake has six sides
wind|air that moves from one place to another|it carries seeds, turns mills, and drives sailing ships|It begins when the sun warms some places more than others
the sun|the star at the center of our solar system|it gives us light and warmth|Its light needs about eight minutes to reach the earth
the moon|a ball of rock that travels around the earth|it lights the night and moves the tides|It takes about a month to go once around the earth
a rainbow|an arc of colors in the sky|it shows that sunlight is made of many colors|You can see it when the sun shines behind you and rain falls in front of you
a river|a large stream of water that flows to the sea or to a lake|people use it for water, for food, and for travel|Most rivers begin as small springs in hills or mountains
a mountain|a very high piece of land|it catches clouds and is the source of many rivers|The higher you climb, the colder the air becomes
an island|a piece of land with water all around it|many plants and animals live on islands and nowhere else|Some islands were made by volcanoes
a desert|a place where it almost never rains|only plants and animals that need little water can live there|Days can be very hot there, and nights very cold
a forest|a large area covered with trees|it cleans the air and is home to many animals|In autumn, many trees drop their leaves
a volcano|a mountain that can throw out hot, melted rock|its ash makes the soil rich|The melted rock is called lava when it reaches the surface
a bridge|a structure that carries a road or a path over a river or a valley|it connects people on both sides|The first bridges were simple tree trunks
a clock|a machine that shows the time|people use it to meet, to work, and to travel on time|Before there were clocks, people looked at the sun
a compass|a small tool with a needle that points north|sailors and hikers use it to find their way|Its needle is a tiny magnet
a telescope|a tool that makes distant things look near|with it, people study the stars and the planets|It uses lenses or mirrors to collect light
a book|a set of pages with text or pictures|it keeps knowledge and stories for a long time|For many centuries, books were copied by hand
a library|a place where people can read and borrow books|everyone can learn there for free|Most libraries keep their books in a careful order
a school|a place where children and adults learn|people learn to read, to write, and to think there|A school day often begins with a bell
a market|a place where people buy and sell things|farmers bring fresh food there|Many towns have a market once or twice a week
a bicycle|a vehicle with two wheels that you drive with your legs|it is cheap, quiet, and needs no fuel|The faster it rolls, the easier it is to keep your balance
a train|a row of wagons that runs on rails|it can carry many people over long distances|The first trains were pulled by steam engines
a ship|a large boat that can cross the sea|most goods in the world travel by ship|A ship floats because it pushes water aside
bread|a food made of flour, water, and salt|people in many countries eat it every day|Yeast fills the dough with small bubbles, so it rises
honey|a sweet, golden food made by bees|people have eaten it for thousands of years|It can be kept for many years without going bad
salt|a white mineral that gives food its taste|the body needs a little of it|It comes from the sea or from mines under the ground
cheese|a food made from milk|it keeps much longer than milk|There are many hundreds of kinds
paper|a thin material made mostly from wood|people write, print, and paint on it|Old paper can be used to make new paper
glass|a hard, clear material made from sand|windows, bottles, and lenses are made of it|The sand must become very hot before it melts
iron|a strong, heavy metal|tools, bridges, and machines are made of it|If it gets wet, it slowly turns to rust
gold|a soft, yellow metal|it is used for jewelry and coins, and in electronics|It does not rust, even after thousands of years
wood|the hard part of a tree|people build houses and furniture with it, and burn it for heat|The rings in a trunk tell the age of the tree
a computer|a machine that follows instructions and works with data|people use it to write, to calculate, and to talk with each other|Everything in it is stored as numbers
a language model|a computer program that learned to continue text|it can answer questions and help with writing|It reads text in small pieces called tokens
a server|a computer or a program that answers requests from other programs|many people can use it at the same time|It waits until a request arrives, does the work, and sends back the answer
a map|a drawing that shows a place from above|it helps people find their way|The small picture that explains its signs is called a legend
music|sound that is ordered in time|it can make people happy, calm, or sad|All over the world, people sing and play instruments
a garden|a piece of land where people grow plants|it gives food, flowers, and a place to rest|A good garden needs sun, water, and patience
"""

# what | first | then | then | last
_HOW_TO = """
make tea|boil some fresh water|put the tea into a warm pot|pour the hot water over it and wait for three to five minutes|take out the leaves and pour the tea into a cup
plant a seed|fill a pot with soft soil|make a small hole with your finger and put the seed into it|cover it with soil and give it some water|put the pot in a bright place and keep the soil a little wet
bake bread|mix flour, water, salt, and yeast|knead the dough until it is smooth|let it rest in a warm place until it is twice as big|bake it in a hot oven until it is brown and sounds hollow
wash your hands|hold your hands under clean water|rub them with soap for at least twenty seconds|do not forget the backs of your hands and your thumbs|rinse them well and dry them with a towel
write a letter|take a sheet of paper and write the date at the top|greet the person you are writing to|tell your news and ask a few questions|end with a friendly word and your name
make soup|cut some onions, carrots, and potatoes into small pieces|fry the onions in a little oil|add the other vegetables and enough water to cover them|cook everything for half an hour and add salt and pepper
paint a wall|cover the floor and the furniture|clean the wall and fill small holes|paint the edges with a brush and the rest with a roller|let it dry for a few hours and paint it once more
learn a new word|read the word aloud|look up what it means|use it in a sentence of your own|repeat it the next day and again a week later
build a campfire|find a safe place away from trees|lay a circle of stones|put small dry sticks in the middle and light them|add bigger pieces of wood, and never leave the fire alone
clean a window|take down the curtains and dust the frame|wash the glass with warm water and a little soap|pull the water off from top to bottom|dry the edges with a soft cloth
pack a suitcase|make a list of what you need|put heavy things at the bottom|roll your clothes so that they need less space|put the things you need first on top
fix a flat tire|turn the bicycle upside down and take off the wheel|pull out the tube and find the hole|clean the place and glue a patch over it|put everything back and fill the tire with air
study for a test|find out what will be asked|divide the work into small parts|study a little every day and take short breaks|ask a friend to test you, and sleep well before the test
make pancakes|mix flour, milk, eggs, and a little salt|heat some butter in a pan|pour in a thin layer of the mix and wait until it is brown below|turn it over, and serve it with sugar or fruit
"""

_JOBS = """
baker|makes bread, rolls, and cakes|gets up very early in the morning
farmer|grows plants and keeps animals|works outside in all kinds of weather
teacher|helps students to learn|must explain hard things in a simple way
doctor|helps people who are sick|must listen well and know a lot about the body
nurse|takes care of patients day and night|often gives comfort as well as medicine
carpenter|builds things out of wood|measures twice and cuts once
sailor|works on a ship|learns to read the wind and the waves
librarian|takes care of books and helps readers|knows where to find an answer
pilot|flies an airplane|checks everything carefully before the start
gardener|looks after plants and trees|knows what each plant needs
cook|prepares meals for others|must taste everything before it is served
engineer|designs machines, roads, or programs|tests an idea before building it
tailor|makes and repairs clothes|works with scissors, needle, and thread
fisher|catches fish in rivers or in the sea|goes out when others are still asleep
musician|plays an instrument or sings|practices for many hours
programmer|writes instructions for computers|spends a lot of time looking for mistakes
"""


# country | capital | continent
_CAPITALS = """
France|Paris|Europe
Germany|Berlin|Europe
Italy|Rome|Europe
Spain|Madrid|Europe
Portugal|Lisbon|Europe
England|London|Europe
Ireland|Dublin|Europe
Austria|Vienna|Europe
Switzerland|Bern|Europe
Belgium|Brussels|Europe
Denmark|Copenhagen|Europe
Sweden|Stockholm|Europe
Norway|Oslo|Europe
Finland|Helsinki|Europe
Poland|Warsaw|Europe
Hungary|Budapest|Europe
Greece|Athens|Europe
Japan|Tokyo|Asia
China|Beijing|Asia
India|New Delhi|Asia
South Korea|Seoul|Asia
Thailand|Bangkok|Asia
Turkey|Ankara|Asia
Egypt|Cairo|Africa
Kenya|Nairobi|Africa
Morocco|Rabat|Africa
Ghana|Accra|Africa
the United States|Washington|North America
Canada|Ottawa|North America
Mexico|Mexico City|North America
Cuba|Havana|North America
Peru|Lima|South America
Brazil|Brasilia|South America
Argentina|Buenos Aires|South America
Chile|Santiago|South America
Australia|Canberra|Australia
"""


def _table(text: str) -> list[list[str]]:
    return [line.split("|") for line in text.strip().splitlines()]


def _plural(noun: str) -> str:
    irregular = {"wolf": "wolves", "mouse": "mice", "sheep": "sheep"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("x", "s")) else "s")


ANIMALS = {row[0]: row[1:] for row in _table(_ANIMALS)}
THINGS = {row[0]: row[1:] for row in _table(_THINGS)}
HOW_TO = {row[0]: row[1:] for row in _table(_HOW_TO)}
JOBS = {row[0]: row[1:] for row in _table(_JOBS)}
CAPITALS = {row[0]: row[1:] for row in _table(_CAPITALS)}
PLURALS = {name: _plural(name) for name in ANIMALS}


def animal(rng: random.Random, name: str) -> str:
    """A paragraph about an animal."""
    what, where, food, special = ANIMALS[name]
    slots = {
        "name": name, "names": PLURALS[name], "what": what, "where": where, "food": food,
        "special": special,
    }  # fmt: skip
    return expand(
        "[A(n) {name} is {what}.|The {name} is {what}.] [It lives {where}.|You can find it {where}.|{Names} live {where}.] "
        "[It eats {food}.|It feeds on {food}.|Its food is {food}.] [One special thing about the {name} is that {special}.|What makes it special: {special}.|Did you know that {special}?|Many people know that {special}.]",
        slots,
        rng,
    )


def thing(rng: random.Random, name: str) -> str:
    """A paragraph about a thing."""
    what, why, detail = THINGS[name]
    slots = {"name": name, "what": what, "why": why, "detail": detail}
    return expand(
        "{Name} is {what}. [It is important because {why}. {detail}.|{detail}. And it matters: {why}.|It is useful, because {why}. {detail}.]",
        slots,
        rng,
    )


def how_to(rng: random.Random, name: str) -> str:
    """How something is done, in four steps, as a paragraph or as a list."""
    steps = HOW_TO[name]
    if rng.random() < 0.4:
        lines = [f"{i}. {s[0].upper()}{s[1:]}." for i, s in enumerate(steps, 1)]
        return f"How to {name}:\n" + "\n".join(lines)
    a, b, c, d = steps
    return expand(
        "[It is not hard to {name}.|Here is how to {name}.|This is how you {name}.|To {name}, you need a little time.] First, {a}. [Then {b}.|Next, {b}.|After that, {b}.] [Now {c}.|Then {c}.] [Finally, {d}.|At the end, {d}.|Last of all, {d}.]",
        {"name": name, "a": a, "b": b, "c": c, "d": d},
        rng,
    )


def job(rng: random.Random, name: str) -> str:
    """A sentence or two about a job."""
    does, detail = JOBS[name]
    return expand(
        "A(n) {name} [is a person who {does}|{does}]. A [good|typical] {name} {detail}.",
        {"name": name, "does": does, "detail": detail},
        rng,
    )


def capital(rng: random.Random, country: str, *, short: bool = False) -> str:
    """A sentence about a country's capital, and more unless `short`."""
    city, continent = CAPITALS[country]
    slots = {"country": country, "city": city, "continent": continent}
    sentence = "The capital of {country} is {city}."
    if not short:
        sentence += (
            "[| {Country} is in {continent}.| Many visitors come to {city} to see its streets, markets, and museums.]"
            "[| The government sits there.| It is a city with a long history.| Trains and roads from all parts of the country lead there.]"
        )
    return expand(sentence, slots, rng)


def passage(rng: random.Random) -> str:
    """One to five paragraphs on different subjects."""
    makers = [
        lambda: animal(rng, rng.choice(list(ANIMALS))),
        lambda: thing(rng, rng.choice(list(THINGS))),
        lambda: thing(rng, rng.choice(list(THINGS))),
        lambda: how_to(rng, rng.choice(list(HOW_TO))),
        lambda: job(rng, rng.choice(list(JOBS))),
        lambda: capital(rng, rng.choice(list(CAPITALS))),
    ]
    return "\n\n".join(rng.choice(makers)() for _ in range(rng.randint(1, 5)))
