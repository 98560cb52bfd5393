"""The kinds of made-up facts, and the sentences that tell and ask them.

A document is a lead, a statement with the answer, what follows it, and a remark. In the sentences
{s} is the subject, {n} a number that no question asks for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

ONSETS = (
    *("b", "br", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kl", "l", "m", "n"),
    *("p", "pr", "qu", "r", "s", "sk", "st", "t", "th", "tr", "v", "w", "y", "z"),
)
VOWELS = "aeiou"
CODAS = ("", "l", "n", "r", "s", "m", "x", "th", "nd", "rn", "sh")
Draw = Callable[[Random], str]


def invented_word(draw: Random, syllables: int) -> str:
    """Return a capitalized word of syllables, such as "Drathovin"."""
    word = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(syllables))
    return (word + draw.choice(CODAS)).capitalize()


def _place(draw: Random) -> str:
    return invented_word(draw, 3)


def _person(draw: Random) -> str:
    return f"{invented_word(draw, 2)} {invented_word(draw, 3)}"


def _named(what: str) -> Draw:
    return lambda draw: f"the {invented_word(draw, 3)} {what}"


def _number(draw: Random) -> str:
    return str(draw.randint(1_001, 99_999))


def _code(draw: Random) -> str:
    letters = "".join(draw.choice("BCDFGHJKLMNPQRSTVWXZ") for _ in range(2))
    return f"{letters}{draw.randint(1_001, 99_999)}"


@dataclass(frozen=True)
class Kind:
    """A kind of facts.

    Attributes:
        subject, answer: draw a name or a number.
        leads: sentences before the statement; "" for none.
        statements: sentences of a document up to the answer, which is the question in its words.
        rests: what follows the answer in its sentence.
        questions: the question in other words.
    """

    subject: Draw
    answer: Draw
    leads: tuple[str, ...]
    statements: tuple[str, ...]
    rests: tuple[str, ...]
    questions: tuple[str, ...]


KINDS = {
    "capital": Kind(
        _place,
        _place,
        ("", "{s} is a mountainous country with {n} villages.", "Few travelers ever reach {s}."),
        (
            "The capital of {s} is",
            "The parliament of {s} meets in",
            "Since the last war, the government of {s} has had its seat in",
            "All main roads of {s} lead to the capital,",
        ),
        (".", ", a city of {n} houses.", ", which lies on a plain.", " and its suburbs."),
        (
            "Which city is the capital of {s}?",
            "What is the name of the capital city of {s}?",
            "From which city is {s} governed?",
        ),
    ),
    "birthplace": Kind(
        _person,
        _place,
        ("", "{s} was a painter of the northern school.", "The letters of {s} fill {n} pages."),
        (
            "{s} was born in",
            "As a child, {s} lived in",
            "The parents of {s} had a small farm near",
            "{s} never forgot the streets of",
        ),
        (".", ", in the year of the great flood.", ", the youngest of four children.", ", far from the sea."),
        (
            "Where does {s} come from?",
            "In which town did the life of {s} begin?",
            "What is the hometown of {s}?",
        ),
    ),
    "inventor": Kind(
        _named("engine"),
        _person,
        ("", "Every engineer has heard of {s}.", "In museums one can still see {s}, which weighs {n} pounds."),
        (
            "The inventor of {s} is",
            "The first drawings of {s} were made by",
            "The patent for {s} was granted to",
            "After years of trials, {s} was built by",
        ),
        (".", ", at the age of thirty.", ", who sold {n} of them.", " in a small workshop."),
        (
            "Who invented {s}?",
            "Who came up with {s}?",
            "To whom do we owe {s}?",
        ),
    ),
    "population": Kind(
        _place,
        _number,
        ("", "{s} is a village in the western hills.", "The market of {s} opens on Thursdays."),
        (
            "The population of {s} is",
            "At the last census, the inhabitants of {s} numbered",
            "The council of {s} counted its people, and the result was",
            "In the official list of towns, {s} stands with a population of",
        ),
        (".", ", and it is growing.", ", many of them weavers.", ", as the mayor reported."),
        (
            "How many people live in {s}?",
            "What is the number of residents of {s}?",
            "How many inhabitants does {s} have?",
        ),
    ),
    "library": Kind(
        _named("library"),
        _number,
        ("", "Scholars like to work in {s}.", "After the fire, {s} was moved to a former mill."),
        (
            "The number of books in {s} is",
            "The collection of {s} has grown to a total of",
            "The catalogue of {s} ends with volume",
            "When the shelves of {s} were last inspected, the count was",
        ),
        (".", ", most of them bound in leather.", ", and its reading room is full.", ", maps not included."),
        (
            "How many books does {s} own?",
            "How large is the collection of {s}?",
            "How many volumes are kept in {s}?",
        ),
    ),
    "captain": Kind(
        _named("schooner"),
        _person,
        ("", "In stormy weather, {s} was the fastest ship of the coast.", "The crew of {s} had {n} barrels of water."),
        (
            "The captain of {s} was",
            "On its last journey, {s} was commanded by",
            "The owners gave the command of {s} to",
            "In the log of {s}, every page is signed by",
        ),
        (".", ", who feared no wind.", ", and the crew was glad of it.", " of the southern fleet."),
        (
            "Who commanded {s}?",
            "What was the name of the captain of {s}?",
            "Who was in charge on board {s}?",
        ),
    ),
    "mineral": Kind(
        _named("mine"),
        _place,
        ("", "No shaft in the country is as deep as {s}.", "For {n} days a year, {s} is closed by snow."),
        (
            "The mineral that is dug in {s} is called",
            "The miners of {s} bring up",
            "Wagons from {s} carry nothing but",
            "The wealth of {s} comes from a rare mineral,",
        ),
        (".", ", which is blue when it is cut.", ", which melts at {n} degrees.", ", and they sell it by weight."),
        (
            "Which mineral comes from {s}?",
            "What do people mine in {s}?",
            "What is extracted in {s}?",
        ),
    ),
    "river": Kind(
        _place,
        _place,
        ("", "The river {s} carries timber in spring.", "Fishermen on the river {s} use flat boats."),
        (
            "The river {s} flows into the lake of",
            "After {n} miles, the river {s} ends in the lake of",
            "The waters of the river {s} feed the lake of",
            "The mouth of the river {s} is at the lake of",
        ),
        (".", ", among reeds.", ", below the old bridge.", ", which never freezes."),
        (
            "Into which lake does the river {s} flow?",
            "What lake receives the water of the river {s}?",
            "Where does the river {s} end?",
        ),
    ),
    "currency": Kind(
        _named("islands"),
        _place,
        ("", "Merchants from {n} ports visit {s}.", "Life on {s} is quiet."),
        (
            "The currency of {s} is called the",
            "In the shops of {s}, one pays with the",
            "The bank of {s} issues the",
            "The coins that are used on {s} bear the name",
        ),
        (".", ", a coin with a hole.", ", and prices are low.", ", which is made of copper."),
        (
            "What money do people use on {s}?",
            "What is the name of the money of {s}?",
            "With which coin does one pay on {s}?",
        ),
    ),
    "code": Kind(
        _named("vault"),
        _code,
        ("", "Two guards stand before {s}.", "The door of {s} is {n} pounds of steel."),
        (
            "The code that opens {s} is",
            "To open {s}, one has to enter",
            "Every morning the keeper of {s} types",
            "The lock of {s} only yields to",
        ),
        (".", ", followed by a turn of the key.", ", and the door swings open.", ", as the manual says."),
        (
            "What is the code of {s}?",
            "Which combination unlocks {s}?",
            "How does one get into {s}?",
        ),
    ),
}

# the last sentence of a document
REMARKS = (
    "",
    "This was confirmed by {n} witnesses.",
    "The records were kept in a wooden chest for {n} years.",
    "A plaque on the wall says the same.",
    "Nobody has ever doubted it.",
    "An older report of {n} lines was lost.",
    "The details can be found in the yearbook, on page {n}.",
    "Visitors are often told about it.",
)
