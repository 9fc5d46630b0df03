# ruff: noqa: E501
"""Conversations.

Knows: small talk, what the model says about itself, system prompts, and how turns make up a
conversation. Does not know tokens or the template that joins messages.
"""

from __future__ import annotations

import random
from typing import Any

from recipe import facts
from recipe.grammar import expand
from recipe.stories import ANIMALS as STORY_ANIMALS
from recipe.stories import BOYS, GIRLS, story
from recipe.tasks import Case, draw, letters_question, lookup_questions
from recipe.words import CITIES, JOBS, NAMES, NOUNS, open_word

Message = dict[str, Any]

TASK_WEIGHTS: dict[str, float] = {
    "add": 2.0, "subtract": 3.0, "multiply": 3.0, "copy": 1.2, "reverse": 1.2,
    "sort_numbers": 1.6, "sort_words": 2.6, "count": 3.0, "lookup": 1.0, "json": 1.0,
}  # fmt: skip

_SKILLS = (
    "add, subtract, and multiply small numbers, copy or reverse a list, sort numbers or words, "
    "count things, look up a value in a list, and fill a small JSON object"
)
DECLINED = f"I am sorry, I am a very small model and I cannot help with that. I can {_SKILLS}."
"""The answer to what the model cannot do."""
_SMALL_TALK: tuple[tuple[str, str], ...] = (
    (
        "[Hello|Hi|Hey|Good morning|Good evening|Hello there|Hi there][!|.|]",
        "Hello! [How can I help you?|What can I do for you?]",
    ),
    (
        "[Who are you|What are you|Tell me who you are|Introduce yourself|What is your name][?|.|]",
        "I am the small default model of minisrv. [I can write simple English and do a few tasks exactly.|I was made to show that the server works.]",
    ),
    (
        "[What can you do|What are you good at|How can you help me|What can I ask you|Help][?|.|]",
        f"I can {_SKILLS}. I can also tell a short story.",
    ),
    (
        "[How are you|How are you today|How is it going][?|]",
        "I am fine, thank you. [What can I do for you?|How can I help you?]",
    ),
    (
        "[Thanks|Thank you|Thank you very much|Great, thanks|Thanks a lot][!|.|]",
        "You are welcome!",
    ),
    ("[Goodbye|Bye|See you|Good night|See you later][!|.|]", "Goodbye!"),
    (
        "[What is minisrv|Tell me about minisrv|Explain minisrv][?|.|]",
        "minisrv is a small inference server for language models. It batches requests and runs them with captured graphs.",
    ),
    (
        "[How big are you|How many parameters do you have|Are you a large model|How large are you][?|]",
        "I am very small: about eleven million parameters.",
    ),
    (
        "[Are you a human|Are you a person|Are you real|Are you a robot][?|]",
        "No, I am a computer program: a small language model.",
    ),
    (
        "[Who made you|Who trained you|Where do you come from|How were you trained][?|]",
        "I was trained by the recipe in the minisrv repository, in a few minutes on one GPU.",
    ),
    (
        "[Are you ChatGPT|Are you GPT-4|Are you Claude|Are you Gemini|Are you Llama][?|]",
        "No, I am the small default model of minisrv.",
    ),
    (
        "[Can you speak German|Do you speak French|Can you translate this|Translate this into Spanish][?|.|]",
        "I am sorry, I only know simple English.",
    ),
    (
        "[Write a program in Python|Write some code|Who is the president|What is the weather today|What happened yesterday|Write an essay about history|Who won the last election|What time is it|What day is it today|What is the meaning of life|Explain quantum mechanics|Write a poem about the {noun}|Write a poem|Write a haiku|Write a Python function|Write an email to my boss|Who wrote Hamlet|How far is it to {city}|Solve this equation|What is the square root of {number}|Give me advice|Recommend a book|Which team won the game|Give me legal advice|How do I become a(n) {job}|What do you think about the {noun}][?|.|]",
        DECLINED,
    ),
    (
        "My name is {name}[.|]",
        "Nice to meet you, {name}! [How can I help you?|What can I do for you?]",
    ),
    (
        "[Say|Please say|Just say|Say only] [the word |]{word}[.|]",
        "{word}",
    ),
    ("[OK|Okay|Good|Nice|Great|Cool|I see][!|.|]", "[Is there anything else I can do?|Good! What is next?]"),
    ("[Tell me a joke|Do you know a joke|Make me laugh][!|?|.|]", "Why did the {noun} go to school? Because it wanted to be a little smarter."),
)  # fmt: skip

_SYSTEM = (
    "You are a helpful assistant.",
    "You are a [helpful|friendly|polite|careful|precise] assistant.",
    "You are [a helpful|a friendly|the] assistant [of a small shop|in a library|of a school|for a {job}|of {name}|in {city}].",
    "[Answer|Reply] [briefly|shortly|with the answer only|in as few words as possible|exactly].",
    "[Be brief|Be precise|Be exact|Do not explain your answer|Follow the instructions].",
    "You are the default model of minisrv. [Answer every question.|Be helpful and brief.]",
    "You are a [calm|cheerful|strict|clever] {job} [from {city}|called {name}]. [Help the user.|Answer the questions.]",
    "[The user is called {name}.|The user lives in {city}.|Today we talk about the {noun}.] [Be kind.|Answer well.|Help with any task.]",
    "You are a helpful assistant. [Answer|Reply] [briefly|with the answer only|in English].",
)


def _slots(rng: random.Random) -> dict[str, str]:
    return {
        "city": rng.choice(CITIES),
        "job": rng.choice(JOBS),
        "name": rng.choice(NAMES),
        "noun": rng.choice(NOUNS),
        "number": str(rng.randrange(2, 1000)),
        "word": rng.choice(NOUNS) if rng.random() < 0.6 else open_word(rng),
    }


def system_prompt(rng: random.Random) -> Message:
    """A system message."""
    content = expand(rng.choice(_SYSTEM), _slots(rng), rng)
    if rng.random() < 0.1:
        content += f"\n\n{facts.passage(rng)}"
    return {"role": "system", "content": content}


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _typed(rng: random.Random, question: str) -> str:
    """The question, now and then without its first capital."""
    return question[0].lower() + question[1:] if rng.random() < 0.2 else question


def small_talk(rng: random.Random) -> list[Message]:
    """A greeting, a question about the model, or a request it declines."""
    slots = _slots(rng)
    question, answer = (expand(t, slots, rng) for t in rng.choice(_SMALL_TALK))
    return _turn(_typed(rng, question), answer)


def prose(rng: random.Random) -> list[Message]:
    """A request for a story or for an explanation."""
    match rng.randrange(7):
        case 0:
            name = rng.choice(list(facts.ANIMALS))
            names = facts.PLURALS[name]
            question = f"[Tell me about {names}|What is a(n) {name}|What do you know about {names}|Describe a(n) {name}|Explain what a(n) {name} is][.|?|]"
            answer = facts.animal(rng, name)
        case 1:
            name = rng.choice(list(facts.THINGS))
            question = f"[What is {name}|Tell me about {name}|Explain what {name} is|Describe {name}][.|?|]"
            answer = facts.thing(rng, name)
        case 2:
            name = rng.choice(list(facts.HOW_TO))
            question = f"[How do I {name}|How can I {name}|Tell me how to {name}|Explain how to {name}][.|?|]"
            answer = facts.how_to(rng, name)
        case 3:
            name = rng.choice(list(facts.JOBS))
            question = f"[What does a(n) {name} do|What is a(n) {name}|Tell me about the work of a(n) {name}][.|?|]"
            answer = facts.job(rng, name)
        case 4:
            name = rng.choice(list(facts.CAPITALS))
            question = f"[What is the capital of {name}|What is the capital city of {name}|Which city is the capital of {name}|Name the capital of {name}][?|]"
            answer = facts.capital(rng, name, short=True)
        case 5:
            hero = rng.choice(GIRLS + BOYS)
            question = f"[Tell me|Write] a [|short ]story about [|a child called |a child named ]{hero}[.|]"
            answer = story(rng, hero=hero)
        case _:
            animal = rng.choice(STORY_ANIMALS)
            about = rng.random() < 0.6
            question = "[Tell me|Write|Please tell me] a [|short |nice ]story" + (
                f" [about|with] a(n) {animal}[.|]" if about else "[.|]"
            )
            plot = "animal" if about else ""
            answer = story(rng, animal=animal if about else "", plot=plot)
    return _turn(_typed(rng, expand(question, {}, rng)), answer)


def task_turn(case: Case) -> list[Message]:
    """A case as a question and its answer."""
    return _turn(case.prompt, case.answer)


def training_case(rng: random.Random) -> Case:
    """A case that training may see."""
    task = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
    return draw(rng, task, held_out=False)


def conversation(rng: random.Random) -> list[Message]:
    """A training conversation: one to five turns, with or without a system prompt."""
    messages = [system_prompt(rng)] if rng.random() < 0.3 else []
    if rng.random() < 0.12:
        cases = lookup_questions(rng, rng.randint(2, 10))
        while any(c.held_out for c in cases):
            cases = lookup_questions(rng, rng.randint(2, 10))
        return messages + [m for c in cases for m in task_turn(c)]
    for _ in range(rng.choice((1, 1, 2, 3, 4, 5))):
        kind = rng.random()
        if kind < 0.07:
            messages += small_talk(rng)
        elif kind < 0.13:
            messages += _turn(*letters_question(rng))
        else:
            messages += task_turn(training_case(rng))
    return messages


def light_conversation(rng: random.Random) -> list[Message]:
    """A training conversation of small talk and prose."""
    messages = [system_prompt(rng)] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        messages += small_talk(rng) if rng.random() < 0.6 else prose(rng)
    return messages


def evaluation(rng: random.Random, task: str) -> tuple[list[Message], Case]:
    """A held-out case as a prompt: plain, below a system prompt, or late in a conversation."""
    case = draw(rng, task, held_out=True)
    messages = [system_prompt(rng)] if rng.random() < 0.25 else []
    if rng.random() < 0.25:
        for _ in range(rng.randint(1, 2)):
            earlier = small_talk(rng) if rng.random() < 0.3 else task_turn(training_case(rng))
            messages += earlier
    return [*messages, {"role": "user", "content": case.prompt}], case
