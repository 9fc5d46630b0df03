# ruff: noqa: E501
"""Generated scenes of everyday life: short modern paragraphs, letters and notes.

Knows: text and what fills it. Does not know longer stories (`stories`) or facts (`facts`).
"""

from __future__ import annotations

import random

from recipe.grammar import expand
from recipe.stories import BOYS, GIRLS, TREATS, WEATHER
from recipe.words import CITIES, JOBS

_SCENES: tuple[str, ...] = (
    "[Hello, my|Hi, my|My] name is {name}[ and I am a(n) {job} from {city}|, and I live in {city}|. I am a(n) {job} and I live in {city}]. [I like my work, and I like {treat} even more.|In my free time I read and walk in the park.|On weekends I meet my friend {friend}.] [My family lives in a small house with a garden.|I have two sisters and a brother.|I moved here last spring.] [I am happy to be here.|I would like to learn something new this year.|Please write to me.]",
    "[The future of {job}s|The future of the city|The future of work|The future of AI] is [hard to see|not written yet|open]. [Some people hope for a better life, others are afraid.|Many people talk about it, but nobody knows.] [Machines can help with dull work.|New tools make many things easier.] [Still, people will need people.|What matters is how we use them.]",
    'The train [was late again|stopped in the middle of nowhere|was almost empty]. {name} [looked at the clock|read a book|watched the rain run down the window] and [thought about the day ahead|wondered if {he} would be on time]. [At the next station a woman with a big dog got on.|A man across the aisle was eating {treat}.] [Nobody said a word.|"Is this seat free?" someone asked.] {He} [smiled|nodded] and [closed {his} eyes|put the book away].',
    "The weather in {city} is [mild|changeable|cold] at this time of the year. [In the morning it is often foggy.|Mornings start cool and bright.] By noon [the sun comes out|the clouds break up], and in the evening [a light wind blows from the west|it may rain]. Visitors should bring [a warm coat|good shoes|an umbrella].",
    '{name} works as a(n) {job} in {city}. [The work is hard, but {he} likes it.|{He} has done this for eleven years.] {He} gets up at [five|six|seven], [drinks a cup of coffee|eats some {treat}], and [takes the bus|walks] to work. [In the evening {he} is tired|After work {he} meets friends|On weekends {he} goes to the mountains]. ["I would not want to do anything else," {he} says.|One day {he} wants to open a shop of {his} own.]',
    "Dear {friend},\n\n[thank you for your letter|I hope you are well|it has been a long time]. [Here in {city} everything is fine.|We moved to {city} last month.] [The new house has a garden and a view of the river.|The children like their new school.|I have found work as a(n) {job}.] [When will you come and visit us?|Please write to me soon.]\n\n[Best wishes|Love|Yours],\n{name}",
    "The meeting began at [nine|ten|two] o'clock. [Everyone was there except {name}.|There were three points on the list.] First, [the team looked at the results of the last month|they talked about the new office]. Then [{friend} explained the plan|there was a long discussion about costs]. In the end they agreed [to try it for a few weeks|to wait until spring|to ask the customers first].",
    "The [cafe|bakery|bookshop|small shop] on the corner [opens at seven|has been there for fifty years]. [It smells of coffee and warm bread.|The door has a little bell.] {name}, who owns it, [knows every customer by name|used to be a(n) {job}]. [On {weather} days it is full of people.|Most people come for the {treat}.] [Nobody is ever in a hurry there.|It is the heart of the street.]",
    '{name} could not sleep. [The night was quiet.|A dog barked somewhere.|The moon shone into the room.] {He} got up, [made some tea|opened the window], and sat down at the table. [There was still a letter to write.|Tomorrow would be an important day.] "[It will be fine|One thing at a time]," {he} said to {himself}. [An hour later {he} was asleep.|Then {he} began to write.]',
    "When I was a child, [we lived near the sea|we had a small farm|my family moved often]. [My father was a(n) {job}|My mother worked as a(n) {job}], and [there was never much money|we had everything we needed]. In summer [we swam every day|we picked berries in the woods]. [I still remember the smell of the kitchen.|I did not know then how lucky I was.]",
    "I [woke up|got up] [early|late] today. [The sky was gray|The sun was already up], and [I did not feel like working|I was in a good mood]. After breakfast I [went for a walk along the river|cleaned the kitchen|called {friend}]. [We talked for a long time.|It was {weather}, and there were few people in the street.] In the evening I [read a book|cooked soup|watched a film]. It was [a good day|a quiet day|a day like any other].",
    'The old [man|woman] sat on the bench [every day at noon|in the sun]. [People said hello and walked on.|The birds were not afraid.] One day {name} [sat down as well|stopped and asked a question]. "[What are you waiting for?|Do you live near here?]" "[I am not waiting|I used to live in that house]," was the answer. "[I am watching the world|Now I come here to remember]." [They talked until it got dark.|After that, they met every week.]',
    "{city} is a city with [many bridges|old streets|a large harbor|busy markets]. [Every year, many people come to see it.|People have lived there for many centuries.] In the center there is [a big square|a famous library|an old church], and [around it are shops and cafes|not far away is a park]. [The best time to visit is in spring.|The easiest way to get around is on foot.]",
    "To do good work, you need [a clear goal|a quiet place|enough time]. [Begin with the most important thing.|Make a short list.] [Do one thing after another.|Take a break when you are tired.] [If something does not work, find out why before you try again.|Ask for help when you are stuck.] [Small steps every day bring you further than one big effort.|And do not forget to stop when it is good enough.]",
    'Last [week|month|summer] {name} and {friend} [drove to {city}|took a trip to {city}|visited friends in {city}]. [The car broke down on the way.|They left early in the morning.] [A friendly {job} helped them.|They stopped twice to eat {treat}.] In the city they [walked through the old streets|went to the museum|sat by the water]. ["We should do this more often," said {friend}.|They came home late and happy.]',
    "The river [rose|was high] after [three days of rain|the snow had melted]. [People put sand in front of their doors.|The school was closed.] {name}, a(n) {job}, [helped to carry boxes to the upper floor|looked after the old neighbors]. [By Friday the water was going down.|On the fourth day the rain stopped.] [There was mud everywhere|A lot had to be cleaned], but [nobody was hurt|people helped each other].",
    "It is [important|useful] to [sleep well|drink enough water|move every day|eat fresh food]. [The body needs it to stay healthy.|Many people forget this.] [Even a short walk helps.|Start with small changes.] [After a few weeks you will feel the difference.|Doctors say the same.] [It costs nothing|It is never too late to begin].",
    'The machine did not work. {name} [checked the cable|read the instructions|turned it off and on again], but [nothing happened|the light stayed red]. "[Let me have a look,|What did you change?]" said {friend}. Together they [took off the cover|went through the list step by step]. [The problem was a loose screw.|A small part was broken.] [Ten minutes later|After lunch] everything was running again.',
    'On [Monday|Saturday|Sunday] the market [opens early|is full of people]. [Farmers bring apples, potatoes, and fresh bread.|You can hear the sellers from far away.] {name} always buys [{treat}|flowers|cheese] there. ["Two for the price of one!" someone calls.|"It is fresh from this morning," says the seller.] By noon [most of the tables are empty|the best things are gone].',
    'She looked out of the window. [It had started to snow.|The street was empty.|The lights of {city} went on, one by one.] [For a long time she did not move.|Somewhere a piano played.] Then the phone rang. "[It is me,|Are you at home?]" said {friend}. "[I have good news.|Can we meet?]" She [smiled|took her coat and went out].',
    'He opened the letter with [shaking hands|a knife]. [It was short.|There were only two lines.] "[You have got the job|We are coming on Sunday|The answer is yes]," it said. He read it [twice|three times]. Then he [laughed|ran down the stairs|called {friend}] and [told everyone he met|could not stop smiling].',
    'The team had worked on the program for [months|half a year]. [It was fast, but it had a mistake.|On the first day, it stopped after an hour.] {name} [read the code line by line|wrote a small test]. [Late in the evening {he} found it.|The mistake was very simple.] "[Of course,|How could we miss that?]" said {friend}. They fixed it, ran the tests again, and [went home|everything passed].',
)


def vignette(rng: random.Random) -> str:
    """One to three scenes."""
    scenes = []
    for scene in rng.sample(_SCENES, rng.choice((1, 1, 2, 3))):
        girl = rng.random() < 0.5
        slots = {
            "name": rng.choice(GIRLS if girl else BOYS),
            "he": "she" if girl else "he",
            "his": "her" if girl else "his",
            "himself": "herself" if girl else "himself",
            "friend": rng.choice(GIRLS + BOYS),
            "city": rng.choice(CITIES),
            "job": rng.choice(JOBS),
            "treat": rng.choice(TREATS),
            "weather": rng.choice(WEATHER),
        }
        scenes.append(expand(scene, slots, rng))
    return "\n\n".join(scenes)
