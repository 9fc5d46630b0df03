# ruff: noqa: E501, SIM905 - texts and lists read better in one line
"""Tools, and conversations in which they are called.

Knows: families of functions whose names, parameters and descriptions vary, questions that they
answer, what they return, and how the assistant reports it. Does not know tokens or the template.

The names vary so that a model has to read the schemas. A tool of another family is never useful for
a question, so every question has one right call. The answer to a result has one form as well: a
sentence about a value, the text itself, or the fields of an object.
"""

from __future__ import annotations

import calendar
import datetime
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from recipe.grammar import expand
from recipe.words import CITIES, COLORS, LONG_CITIES, NAMES, NOUNS, open_word

Schema = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Use:
    """A question, the call that it needs, what the tool returns, and the final answer.

    about, frame: the words that the question asks about, and the question with `@` for them, where
        one question may ask about several.
    """

    question: str
    name: str
    arguments: dict[str, Any]
    result: str
    answer: str
    key: str
    about: str = ""
    frame: str = ""

    @property
    def call(self) -> dict[str, Any]:
        """The call as a message has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"type": "function", "function": function}


Ask = Callable[[], Use]
Family = Callable[[random.Random], tuple[Tool, Ask]]

_INTEGER: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_STRING: Schema = {"type": "string"}


def _identifier(rng: random.Random, words: str) -> str:
    """The words as a name in one of the usual styles."""
    parts = words.split()
    if rng.random() < 0.2:
        return parts[0] + "".join(p.capitalize() for p in parts[1:])
    return ("-" if rng.random() < 0.04 else "_").join(parts)


def _tool(
    rng: random.Random,
    names: str,
    descriptions: str,
    parameters: Sequence[tuple[str, Schema, str]],
    optional: int = 0,
) -> tuple[Tool, list[str]]:
    """A tool and the names of its parameters; the last `optional` ones are not required.

    A parameter is given by its possible names, its schema and its possible descriptions.
    """
    name = _identifier(rng, rng.choice(names.split("|")))
    if rng.random() < 0.06:
        name += rng.choice(("_v2", "_tool", "_2", f"_{rng.choice(NOUNS)}"))
    described = rng.random() < 0.6
    properties: dict[str, Schema] = {}
    for possible, schema, about in parameters:
        parameter = _identifier(rng, rng.choice(possible.split("|")))
        if rng.random() < 0.08 and described:
            parameter = open_word(rng)
        while parameter in properties:
            parameter = open_word(rng)
        schema = dict(schema)
        if described:
            schema["description"] = expand(f"[{about}]", {}, rng)
        if rng.random() < 0.2:
            schema = dict(reversed(schema.items()))
        properties[parameter] = schema
    keys = list(properties)
    schema = {"type": "object", "properties": properties}
    required = keys[: len(keys) - optional]
    if required and rng.random() < 0.9:
        schema["required"] = required
    if rng.random() < 0.15:
        schema["additionalProperties"] = False
    function: Schema = {"name": name}
    if rng.random() < 0.92:
        function["description"] = expand(f"[{descriptions}]", {}, rng)
    function["parameters"] = schema
    if not keys and rng.random() < 0.3:
        del function["parameters"]
    if rng.random() < 0.06:
        function["strict"] = rng.random() < 0.5
    return {"type": "function", "function": function}, keys


def _typed(rng: random.Random, question: str, name: str) -> str:
    """The question, now and then with the tool's name or a greeting, or typed carelessly."""
    if rng.random() < 0.05:
        return question + rng.choice((f" Use the tool {name}.", f" Use {name}.", f" Call {name}."))
    if rng.random() < 0.06:
        return rng.choice(("Hello! ", "Hi. ", "OK. ", "Thanks. ", "Now: ")) + question
    if rng.random() < 0.12 and question[-1] in ".?":
        question = question[:-1]
    return question[0].lower() + question[1:] if rng.random() < 0.15 else question


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _replaced(text: str, old: str, new: str) -> str:
    """The text with the last `old` replaced."""
    before, _, after = text.rpartition(old)
    return before + new + after


_REFUSALS = "not found|service unavailable|invalid argument|permission denied|timeout|no such entry"


def _use(
    rng: random.Random,
    tool: Tool,
    family: str,
    question: str,
    arguments: dict[str, Any],
    value: object,
    sentence: str,
    subject: str,
    fields: dict[str, object] | None = None,
    about: str = "",
) -> Use:
    """A use whose result is a bare value, an object with it, a text, several fields, or an error.

    sentence: the answer about a value, with `@` for the value.
    about: what the question asks about, where it might ask about several.
    """
    kind = rng.random()
    if kind < 0.38:
        result, answer = _shown(value), _replaced(sentence, "@", _shown(value))
    elif kind < 0.62:
        key = rng.choice(("result", "value", "answer", "output", "data", rng.choice(NOUNS)))
        result = json.dumps({key: value}, ensure_ascii=False)
        answer = _replaced(sentence, "@", _shown(value))
    elif kind < 0.72:
        result = answer = expand(
            rng.choice(
                (
                    "It is {value}, says the {noun}.",
                    "{Subject}: {value} and {other}.",
                    "{value} {noun}",
                    "The {noun} of {subject} is {value}.",
                    "{other}, {value}",
                )
            ),
            {
                "value": _shown(value),
                "noun": rng.choice(NOUNS),
                "other": open_word(rng),
                "subject": subject,
            },
            rng,
        )
    elif kind < 0.94:
        if fields is None:
            fields = {rng.choice(("result", "value", "total", "answer")): value}
        extra = rng.sample(NOUNS, rng.randint(1, 2))
        found: dict[str, object] = dict(fields)
        for noun in extra if rng.random() < 0.5 or len(found) < 2 else ():
            found[noun] = rng.choice((rng.randrange(1000), rng.choice(COLORS), open_word(rng)))
        items = list(found.items())
        rng.shuffle(items)
        result = json.dumps(dict(items), ensure_ascii=False)
        listed = ", ".join(f"{k.replace('_', ' ')} {_shown(v)}" for k, v in items)
        answer = f"{subject}: {listed}."
    else:
        reason = rng.choice(_REFUSALS.split("|"))
        if rng.random() < 0.4:
            reason = f"{open_word(rng)} {reason}"
        result = json.dumps({"error": reason}) if rng.random() < 0.7 else f"Error: {reason}"
        answer = f"I am sorry, the tool failed: {reason}."
    name = tool["function"]["name"]
    key = f"{family}|{json.dumps(list(arguments.values()) or name)}"
    frame = _replaced(question, about, "@") if about else ""
    return Use(_typed(rng, question, name), name, arguments, result, answer, key, about, frame)


def _proper(rng: random.Random) -> str:
    """A name made of one to three words."""
    word: Callable[[], str] = lambda: open_word(rng) if rng.random() < 0.6 else rng.choice(NOUNS)  # noqa: E731
    return " ".join(word().capitalize() for _ in range(rng.choice((1, 1, 2, 2, 3))))


def _place(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.3:
        return _proper(rng)
    city = rng.choice(LONG_CITIES if kind < 0.5 else CITIES)
    return f"{city}, {_proper(rng)}" if rng.random() < 0.06 else city


def _person(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.15:
        return open_word(rng).capitalize()
    name = rng.choice(NAMES)
    return f"{name} {_proper(rng)}" if kind < 0.4 else name


def _address(rng: random.Random) -> str:
    """An address for mail."""
    name = rng.choice((rng.choice(NAMES).lower(), open_word(rng)))
    return f"{name}@{open_word(rng)}.{rng.choice('com org net de io'.split())}"


def _code(rng: random.Random) -> str:
    """Capitals, or a few with digits."""
    letters = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(1, 5)))
    return letters if rng.random() < 0.6 else f"{letters}{rng.randrange(1000)}"


def _thing(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.06:
        return _code(rng)
    if kind < 0.12:
        return f"{open_word(rng)} {rng.choice(NOUNS)}"
    return open_word(rng) if kind < 0.4 else rng.choice(NOUNS)


def _noun(rng: random.Random) -> str:
    """A word for names of functions and parameters."""
    return open_word(rng) if rng.random() < 0.35 else rng.choice(NOUNS)


def _amount(rng: random.Random) -> int:
    digits = rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 6))
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _quantity(rng: random.Random) -> int | float:
    """A number as people ask about them: mostly whole, some with a fraction, some negative."""
    number: int | float = _amount(rng)
    if rng.random() < 0.2:
        number = round(_amount(rng) / 100, rng.choice((1, 2)))
    return -number if rng.random() < 0.08 else number


_PAIRS = ("a|b", "x|y", "first|second", "left|right", "num1|num2", "first number|second number", "lhs|rhs", "n|m", "value1|value2", "number 1|number 2")  # fmt: skip


def _two_numbers(
    operation: str, names: str, descriptions: str, questions: str, sign: str
) -> Family:
    """The family of an operation on two numbers."""

    def family(rng: random.Random) -> tuple[Tool, Ask]:
        first, second = rng.choice(_PAIRS).split("|")
        schema = rng.choice((_INTEGER, _INTEGER, _NUMBER))
        tool, keys = _tool(
            rng,
            names,
            descriptions,
            [(first, schema, "[The|A] first number|The left number"), (second, schema, "[The|A] second number|The right number")],
        )  # fmt: skip

        def ask() -> Use:
            drawn = _amount if schema is _INTEGER else _quantity
            a, b = drawn(rng), drawn(rng)
            if operation == "divide":
                b = rng.randrange(2, 100)
                a = b * rng.randrange(1, 1000)
            question = expand(questions, {"a": str(a), "b": str(b), "sign": sign}, rng)
            results = {
                "add": a + b,
                "subtract": a - b,
                "multiply": a * b,
                "divide": a // b if b else 0,
            }
            value = round(results[operation], 4)
            return _use(
                rng, tool, operation, question, dict(zip(keys, (a, b), strict=True)), value,
                f"{a} {sign} {b} = @", f"{a} {sign} {b}",
            )  # fmt: skip

        return tool, ask

    return family


_SIGNS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


def _calculator(rng: random.Random) -> tuple[Tool, Ask]:
    tool, (key,) = _tool(
        rng,
        "calculate|calculator|evaluate|compute|eval expression|do math|math|solve|calc|evaluate expression",
        "[Evaluate|Compute|Calculate] [an arithmetic expression|a formula|a calculation][.|]",
        [("expression|expr|formula|input|term|calculation", _STRING, "The [expression|formula], [for example|e.g.|such as] 2 + 3 * 4|An arithmetic expression")],
    )  # fmt: skip

    def ask() -> Use:
        terms = [str(abs(_quantity(rng))) for _ in range(rng.choice((2, 2, 2, 3)))]
        signs = rng.choices("+-*/", weights=(4, 3, 4, 2), k=len(terms) - 1)
        written = terms[0] + "".join(f" {s} {t}" for s, t in zip(signs, terms[1:], strict=True))
        said = written
        if len(terms) == 3 and rng.random() < 0.5:
            a, b, c = terms
            s, t = signs
            said = written = rng.choice((f"({a} {s} {b}) {t} {c}", f"{a} {s} ({b} {t} {c})"))
        elif rng.random() < 0.3:
            said = terms[0] + "".join(
                f" {_SIGNS[s]} {t}" for s, t in zip(signs, terms[1:], strict=True)
            )
        question = expand(
            "[What is {said}?|How much is {said}?|Calculate {said}.|Compute {said}.|What's {said}?|Please calculate {said}.|{said} = ?|Use the calculator: {said}|Can you work out {said}?]",
            {"said": said}, rng,
        )  # fmt: skip
        return _use(
            rng, tool, "calculator", question, {key: written}, rng.randrange(10**6),
            f"{written} = @", written,
        )  # fmt: skip

    return tool, ask


_CONDITIONS = "sunny cloudy rainy windy snowy foggy clear stormy warm cold".split()


def _weather(rng: random.Random) -> tuple[Tool, Ask]:
    with_unit = rng.random() < 0.35
    units = rng.choice((("celsius", "fahrenheit"), ("C", "F"), ("metric", "imperial")))
    unit = ("unit|units|scale", {"type": "string", "enum": list(units)}, "The unit[| of the temperature]")  # fmt: skip
    tool, keys = _tool(
        rng,
        "get weather|weather|current weather|get current weather|fetch weather|weather lookup|weather report|check weather|get forecast|query weather",
        "[Get|Look up|Return|Fetch|Tell] the [current |]weather [in|for|of] a [city|place|location|given city|given location][.|]",
        [
            ("city|location|place|town|city name|where", _STRING, "[The|A] [city|place|town]|[The city|City] name|The city and state, e.g. San Francisco, CA"),
            *([unit] if with_unit else []),
        ],
        optional=int(with_unit),
    )  # fmt: skip

    def ask() -> Use:
        city = _place(rng)
        arguments = {keys[0]: city}
        asked = ""
        if with_unit and rng.random() < 0.5:
            arguments[keys[1]] = asked = rng.choice(units)
        question = expand(
            "[What is the weather in {city}?|What's the weather like in {city}?|How is the weather in {city}?|What is the weather like in {city} today?|Weather in {city}?|Tell me the weather in {city}.|Is it raining in {city}?|How warm is it in {city}?|Will it rain in {city}?|Will it rain tomorrow in {city}?|Do I need an umbrella in {city}?|Can you tell me the weather in {city}?|What's the weather in {city} right now?|Check the weather in {city}.|What is the temperature in {city}?]",
            {"city": city}, rng,
        )  # fmt: skip
        if asked:
            question = question[:-1] + expand(
                "[ in {unit}| (in {unit})|, in {unit}]", {"unit": asked}, rng
            ) + question[-1]  # fmt: skip
        temperature, condition = rng.randrange(-20, 100), rng.choice(_CONDITIONS)
        value = rng.choice((f"{condition}, {temperature} degrees", f"{temperature} degrees and {condition}", condition, temperature))  # fmt: skip
        key = rng.choice(("temperature", "temp", "temperature_c", "degrees"))
        fields: dict[str, object] = {key: temperature, rng.choice(("condition", "conditions", "sky", "weather")): condition}  # fmt: skip
        if rng.random() < 0.3:
            fields[rng.choice(("humidity", "wind", "rain"))] = rng.randrange(100)
        if rng.random() < 0.3:
            fields[rng.choice(("unit", "city"))] = rng.choice(("celsius", city))
        return _use(
            rng, tool, "weather", question, arguments, value,
            f"The weather in {city}: @.", f"The weather in {city}", fields, "" if asked else city,
        )  # fmt: skip

    return tool, ask


_ATTRIBUTES = "price|weight|color|size|age|owner|stock|code|shelf|address|phone number|room|balance|score|rank|birthday|email|status|salary|length"


def _attribute(rng: random.Random) -> tuple[Tool, Ask]:
    """A look-up of one attribute of a thing or a person."""
    attribute = rng.choice(_ATTRIBUTES.split("|")) if rng.random() < 0.85 else rng.choice(NOUNS)
    people = rng.random() < 0.5
    what = rng.choice(("person|customer|employee|user|name" if people else "item|product|article|thing|key").split("|"))  # fmt: skip
    tool, (key,) = _tool(
        rng,
        f"get {attribute}|{attribute}|find {attribute}|lookup {attribute}|{attribute} of|fetch {attribute}|query {attribute}|get {what} {attribute}|read {attribute}",
        f"[Get|Look up|Find|Return|Read] the {attribute} of [a|one|the given] {what}[.|]",
        [(f"{what}|name|{what} name|key|query|{what} id", _STRING, f"[The|A] {what}|The name of the {what}|The {what} to look up")],
    )  # fmt: skip

    def ask() -> Use:
        subject = _person(rng) if people else _thing(rng)
        the = subject if people or rng.random() < 0.3 else f"the {subject}"
        question = expand(
            "[What is the {attribute} of {the}?|Look up the {attribute} of {the}.|Find the {attribute} of {the}.|Tell me the {attribute} of {the}.|Which {attribute} does {the} have?|{Attribute} of {the}?|I need the {attribute} of {the}.|Can you find the {attribute} of {the}?]",
            {"attribute": attribute, "the": the}, rng,
        )  # fmt: skip
        value = rng.choice((_amount(rng), open_word(rng), rng.choice(COLORS), round(rng.random() * 100, 2)))  # fmt: skip
        return _use(
            rng, tool, f"attribute/{attribute}", question, {key: subject}, value,
            f"The {attribute} of {subject} is @.", f"The {attribute} of {subject}", about=the,
        )  # fmt: skip

    return tool, ask


def _table(rng: random.Random) -> tuple[Tool, Ask]:
    """A look-up of a key in a named table."""
    tool, keys = _tool(
        rng,
        "lookup|look up|query table|table lookup|get entry|find entry|read table|search table|get row|fetch value",
        "[Look up|Find|Read] [a value|an entry|a key] in a [table|named table|list|database][.|]",
        [
            ("table|list|source|table name|database", _STRING, "The [table|list]|The name of the [table|list]"),
            ("key|entry|row|name|id", _STRING, "The key|The [entry|row] to find"),
        ],
    )  # fmt: skip

    def ask() -> Use:
        table, key = _thing(rng), _thing(rng)
        if rng.random() < 0.3:
            key = f"{rng.choice('ABCDEFGHKMPRSTX')}{rng.randrange(1000)}"
        question = expand(
            "[Look up {key} in the table {table}.|What does the table {table} say for {key}?|Find {key} in the {table} table.|What is the value of {key} in the table {table}?|In the table {table}, what is {key}?|Read {key} from the {table} table.|Get {key} from the table {table}.]",
            {"key": key, "table": table}, rng,
        )  # fmt: skip
        value = rng.choice((_amount(rng), open_word(rng), rng.choice(CITIES)))
        return _use(
            rng, tool, "table", question, dict(zip(keys, (table, key), strict=True)), value,
            f"The value of {key} is @.", key,
        )  # fmt: skip

    return tool, ask


def _day(rng: random.Random) -> datetime.date:
    return datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(35000))


def _said_day(rng: random.Random, day: datetime.date) -> str:
    if rng.random() < 0.5:
        return day.isoformat()
    month = calendar.month_name[day.month]
    return rng.choice((f"{month} {day.day}, {day.year}", f"{day.day} {month} {day.year}"))


def _days(rng: random.Random) -> tuple[Tool, Ask]:
    pair = rng.choice(("start|end", "from|to", "date1|date2", "first|second", "start date|end date", "from date|to date", "begin|finish", "earlier|later"))  # fmt: skip
    schema: Schema = dict(_STRING)
    if rng.random() < 0.4:
        schema["format"] = "date"
    first, second = pair.split("|")
    tool, keys = _tool(
        rng,
        "days between|date difference|date diff|count days|get days between|number of days|day difference|days from to",
        "[Count|Return|Compute|Get] the [number of |]days [between|from one to another of] two dates[.|]",
        [(first, schema, "[The|A] first date[|, YYYY-MM-DD]"), (second, schema, "[The|A] second date[|, YYYY-MM-DD]")],
    )  # fmt: skip

    def ask() -> Use:
        a = _day(rng)
        b = a + datetime.timedelta(days=rng.choice((rng.randrange(1, 60), rng.randrange(1, 3000))))
        question = expand(
            "[How many days are between {a} and {b}?|How many days are there from {a} to {b}?|How many days lie between {a} and {b}?|Count the days from {a} to {b}.|What is the difference in days between {a} and {b}?|Days between {a} and {b}?|How long is it from {a} to {b}?|How many days from {a} to {b}?]",
            {"a": _said_day(rng, a), "b": _said_day(rng, b)}, rng,
        )  # fmt: skip
        dates = (a.isoformat(), b.isoformat())
        return _use(
            rng, tool, "days", question, dict(zip(keys, dates, strict=True)), (b - a).days,
            f"There are @ days from {dates[0]} to {dates[1]}.", f"From {dates[0]} to {dates[1]}",
        )  # fmt: skip

    return tool, ask


def _clock(rng: random.Random) -> tuple[Tool, Ask]:
    with_city = rng.random() < 0.6
    city_parameter = ("city|location|place|where|town", _STRING, "[The|A] [city|place]")
    tool, keys = _tool(
        rng,
        "get time|current time|clock|get current time|time now|what time|local time",
        "[Get|Return|Tell] the [current |local |]time" + (" [in|of] a [city|place]" if with_city else "") + "[.|]",
        [city_parameter] if with_city else [],
    )  # fmt: skip

    def ask() -> Use:
        time = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
        if not with_city:
            question = expand("[What time is it?|What is the time?|What time is it now?|Tell me the time.|Can you tell me what time it is?|What's the current time?]", {}, rng)  # fmt: skip
            return _use(rng, tool, "clock", question, {}, time, "It is @.", "The time")
        city = _place(rng)
        question = expand("[What time is it in {city}?|What is the time in {city}?|Tell me the time in {city}.|What's the local time in {city}?|What time is it now in {city}?]", {"city": city}, rng)  # fmt: skip
        return _use(
            rng, tool, "clock", question, {keys[0]: city}, time,
            f"In {city} it is @.", f"The time in {city}", about=city,
        )  # fmt: skip

    return tool, ask


def _words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(_thing(rng) for _ in range(rng.randint(low, high)))


def _search(rng: random.Random) -> tuple[Tool, Ask]:
    tool, (key,) = _tool(
        rng,
        "search|web search|search web|find documents|search documents|google|query|search the web|lookup web|retrieve",
        "[Search|Look in] the [web|library|documents|internet|archive] [for a text|for a query|for something][.|]",
        [("query|q|text|search|terms|search query|topic", _STRING, "The [query|text to search for|topic]|[What|The words] to search for")],
    )  # fmt: skip

    def ask() -> Use:
        words = _words(rng, 1, 4)
        question = expand(
            "[Search for {words}.|Search the web for {words}.|Find something about {words}.|Look for {words}.|Please search for {words}.|Find documents about {words}.|Google {words}.]",
            {"words": words}, rng,
        )  # fmt: skip
        return _use(
            rng, tool, "search", question, {key: words}, _words(rng, 2, 6),
            "I found this: @.", words,
        )  # fmt: skip

    return tool, ask


def _message(rng: random.Random) -> tuple[Tool, Ask]:
    tool, keys = _tool(
        rng,
        "send message|send email|message|notify|send text|send mail|write message|send note|text",
        "[Send|Write] a [message|mail|text|note] to [someone|a person|somebody][.|]",
        [
            ("to|recipient|name|person|receiver|contact", _STRING, "[The recipient|Who gets it|The name of the person]"),
            ("text|body|message|content|words", _STRING, "The [text|words|content][| of the message]"),
        ],
    )  # fmt: skip

    def ask() -> Use:
        name = _address(rng) if rng.random() < 0.2 else _person(rng)
        words = _words(rng, 1, 6)
        question = expand(
            "[Send {name} the message: {words}|Send a message to {name}: {words}|Write to {name}: {words}|Tell {name} this: {words}|Send this to {name}: {words}|Send {name} the text: {words}]",
            {"name": name, "words": words}, rng,
        )  # fmt: skip
        status = rng.choice(("sent", "ok", "done", "queued", "delivered"))
        return _use(
            rng, tool, "message", question, dict(zip(keys, (name, words), strict=True)), status,
            f"Your message to {name}: @.", f"Your message to {name}",
        )  # fmt: skip

    return tool, ask


def _timer(rng: random.Random) -> tuple[Tool, Ask]:
    unit = rng.choice(("minutes", "minutes", "seconds", "hours"))
    tool, (key,) = _tool(
        rng,
        "set timer|start timer|timer|set alarm|countdown|create timer|wait",
        f"[Set|Start|Create] a timer [for|of] [some|a number of] {unit}[.|]",
        [(f"{unit}|duration {unit}|{unit}|length {unit}", _INTEGER, f"The [number of |]{unit}")],
    )  # fmt: skip

    def ask() -> Use:
        n = rng.randrange(2, 500)
        question = expand(
            "[Set a timer for {n} {unit}.|Start a timer of {n} {unit}.|Timer for {n} {unit}.|Wake me in {n} {unit}.|Count down {n} {unit}.|Please set a timer for {n} {unit}.]",
            {"n": str(n), "unit": unit}, rng,
        )  # fmt: skip
        status = rng.choice(("started", "ok", "running", "set", f"timer {rng.randrange(100)}"))
        return _use(
            rng, tool, "timer", question, {key: n}, status,
            f"The timer of {n} {unit}: @.", f"The timer of {n} {unit}",
        )  # fmt: skip

    return tool, ask


_UNITS = "meters feet miles kilometers inches yards pounds kilograms grams ounces liters gallons cups dollars euros francs yen USD EUR GBP JPY CHF".split()


def _convert(rng: random.Random) -> tuple[Tool, Ask]:
    pair = rng.choice(("from|to", "source|target", "from unit|to unit", "unit from|unit to", "from currency|to currency", "base|target"))  # fmt: skip
    first, second = pair.split("|")
    schema = rng.choice((_NUMBER, _NUMBER, _INTEGER))
    tool, keys = _tool(
        rng,
        "convert|convert units|unit converter|convert currency|conversion|exchange|convert amount",
        "[Convert|Change] [an amount|a value|a quantity] [from one unit to another|between units|between currencies][.|]",
        [
            ("amount|value|quantity|number|n", schema, "The [amount|value|quantity]"),
            (first, _STRING, "The [unit|currency] to convert from"),
            (second, _STRING, "The [unit|currency] to convert to"),
        ],
    )  # fmt: skip

    def ask() -> Use:
        n = _amount(rng) if schema is _INTEGER else abs(_quantity(rng))
        a, b = rng.sample(_UNITS, 2)
        question = expand(
            "[Convert {n} {a} to {b}.|How many {b} are {n} {a}?|How much is {n} {a} in {b}?|What is {n} {a} in {b}?|Change {n} {a} into {b}.|{n} {a} to {b}]",
            {"n": str(n), "a": a, "b": b}, rng,
        )  # fmt: skip
        value = rng.choice((rng.randrange(10**5), round(rng.random() * 1000, 2)))
        return _use(
            rng, tool, "convert", question, dict(zip(keys, (n, a, b), strict=True)), value,
            f"{n} {a} are @ {b}.", f"{n} {a} in {b}",
        )  # fmt: skip

    return tool, ask


def _order(rng: random.Random) -> tuple[Tool, Ask]:
    with_color = rng.random() < 0.5
    color = ("color|colour|shade", _STRING if rng.random() < 0.5 else {"type": "string", "enum": list(COLORS)}, "The color")  # fmt: skip
    tool, keys = _tool(
        rng,
        "order|order item|buy|place order|purchase|create order|add to cart|buy item|order product",
        "[Order|Buy|Purchase] [a product|some items|something|an item][.|]",
        [
            ("item|product|article|thing|name|what", _STRING, "The [item|product|article]|What to [buy|order]"),
            ("count|quantity|number|amount|n|how many", _INTEGER, "How many|The [number|quantity]"),
            *([color] if with_color else []),
        ],
    )  # fmt: skip

    def ask() -> Use:
        item, n = _thing(rng), rng.randrange(2, 1000)
        said, values = f"{n} {item}", [item, n]
        if with_color:
            shade = rng.choice(COLORS)
            said, values = f"{n} {shade} {item}", [item, n, shade]
        question = expand("[Order {said}.|Buy {said}.|I want to buy {said}.|Please order {said}.|I would like {said}.|Get me {said}.]", {"said": said}, rng)  # fmt: skip
        status = rng.choice(("ordered", "ok", "placed", f"order {rng.randrange(10000)}"))
        return _use(
            rng, tool, "order", question, dict(zip(keys, values, strict=True)), status,
            f"Your order of {said}: @.", f"Your order of {said}",
        )  # fmt: skip

    return tool, ask


def _value(rng: random.Random, kind: str) -> Any:
    match kind:
        case "integer":
            return _amount(rng)
        case "number":
            return _quantity(rng)
        case "boolean":
            return rng.random() < 0.5
        case "array":
            return [_thing(rng) for _ in range(rng.randint(1, 4))]
        case _:
            return rng.choice((_thing, _person, _place, _thing))(rng)


def _written(value: Any) -> str:
    """A value as a person writes it."""
    return ", ".join(value) if isinstance(value, list) else _shown(value)


_VERBS = "get set find make open close move read write check start stop update delete create list show add remove count paint clean fix rent book sell".split()


def _named(rng: random.Random) -> tuple[Tool, Ask]:
    """A function of any name, which the question names along with its parameters."""
    verb, noun = rng.choice(_VERBS), _noun(rng)
    kinds = rng.choices(("string", "integer", "number", "boolean", "array"), (5, 3, 1, 1, 1), k=rng.choice((0, 1, 1, 2, 2, 3, 4)))  # fmt: skip
    names = "|".join((f"{verb} {noun}", f"{verb} {noun}", f"{verb} the {noun}", noun))
    parameters = []
    for kind in kinds:
        word = _noun(rng)
        schema: Schema = {"type": kind}
        if kind == "array":
            schema["items"] = {"type": "string"}
        parameters.append((word, schema, f"The {word}"))
    tool, keys = _tool(rng, names, f"{verb.capitalize()} [a|the|one] {noun}[.|]", parameters)

    def ask() -> Use:
        values = [_value(rng, kind) for kind in kinds]
        name = tool["function"]["name"]
        what = rng.choice((name, f"{verb} {noun}", f"{verb} the {noun}"))
        pairs = [f"{k} {_written(v)}" for k, v in zip(keys, values, strict=True)]
        if rng.random() < 0.3:
            pairs = [f"{k} = {_written(v)}" for k, v in zip(keys, values, strict=True)]
        if what == name:
            start = rng.choice((f"Call {name}", f"Use {name}", f"Please call {name}", f"Run {name}"))  # fmt: skip
        else:
            start = what.capitalize() if rng.random() < 0.7 else f"Please {what}"
        glue = "; " if "array" in kinds else rng.choice((" and ", ", "))
        said = glue.join(pairs)
        question = f"{start} with {said}." if pairs else f"{start}."
        value = rng.choice((_amount(rng), open_word(rng), rng.choice(("ok", "done", "true"))))
        return _use(
            rng, tool, f"named/{verb}", question, dict(zip(keys, values, strict=True)), value,
            f"The result of {name} is @.", f"The result of {name}",
        )  # fmt: skip

    return tool, ask


FAMILIES: dict[str, tuple[float, Family]] = {
    "add": (1.2, _two_numbers("add", "add|sum|plus|add numbers|sum numbers|addition|add two numbers|get sum", "[Add|Sum] two [numbers|integers][.|]|[Return|Compute] the sum of two numbers[.|]", "[What is {a} + {b}?|Add {a} and {b}.|What is {a} plus {b}?|What is the sum of {a} and {b}?|{a} + {b}|How much is {a} + {b}?|Calculate {a} + {b}.|{a}+{b}=|Compute {a} plus {b}.]", "+")),
    "subtract": (1.0, _two_numbers("subtract", "subtract|minus|difference|sub|subtraction|subtract numbers", "Subtract [two numbers|the second number from the first|one number from another][.|]|[Return|Compute] the difference of two numbers[.|]", "[What is {a} - {b}?|Subtract {b} from {a}.|What is {a} minus {b}?|{a} - {b}|How much is {a} - {b}?|Calculate {a} - {b}.|{a}-{b}=]", "-")),
    "multiply": (1.2, _two_numbers("multiply", "multiply|times|product|mul|multiplication|multiply numbers|multiply two numbers", "Multiply two [numbers|integers][.|]|[Return|Compute] the product of two numbers[.|]", "[What is {a} * {b}?|Multiply {a} by {b}.|What is {a} times {b}?|What is the product of {a} and {b}?|{a} * {b}|How much is {a} * {b}?|Calculate {a} * {b}.|{a} x {b}]", "*")),
    "divide": (0.8, _two_numbers("divide", "divide|division|div|quotient|divide numbers", "Divide [two numbers|one number by another|the first number by the second][.|]|[Return|Compute] the quotient of two numbers[.|]", "[What is {a} / {b}?|Divide {a} by {b}.|What is {a} divided by {b}?|{a} / {b}|How much is {a} / {b}?|Calculate {a} / {b}.]", "/")),
    "calculator": (1.8, _calculator), "weather": (2.4, _weather), "attribute": (2.0, _attribute),
    "table": (1.4, _table), "days": (1.8, _days), "clock": (1.0, _clock), "search": (1.2, _search),
    "message": (1.2, _message), "timer": (0.7, _timer), "convert": (1.2, _convert),
    "order": (1.2, _order), "named": (2.2, _named),
}  # fmt: skip
"""The weight and the maker of each family."""

_ARITHMETIC = frozenset({"add", "subtract", "multiply", "divide"})


def rivals(family: str) -> frozenset[str]:
    """The families whose tools could answer this family's questions."""
    if family in _ARITHMETIC:
        return frozenset({family, "calculator"})
    if family == "calculator":
        return _ARITHMETIC | {family}
    close = {"attribute": "table", "table": "attribute"}
    return frozenset({family, close.get(family, family)})


def draw_families(rng: random.Random, n: int, excluded: frozenset[str] = frozenset()) -> list[str]:
    """At most so many families, of which none rivals another."""
    chosen: list[str] = []
    for _ in range(n):
        allowed = [f for f in FAMILIES if f not in excluded]
        if not allowed:
            break
        family = rng.choices(allowed, [FAMILIES[f][0] for f in allowed])[0]
        chosen.append(family)
        excluded |= rivals(family)
    return chosen


def toolbox(
    rng: random.Random, n: int, excluded: frozenset[str] = frozenset()
) -> list[tuple[Tool, Ask]]:
    """At most so many tools of different names, in any order."""
    made = [FAMILIES[family][1](rng) for family in draw_families(rng, n, excluded)]
    names = [tool["function"]["name"] for tool, _ in made]
    return [pair for i, pair in enumerate(made) if names[i] not in names[:i]]
