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
CODAS = ("", "l", "n", "r", "s", "m", "x", "th", "nd", "rn", "sh")  # codespell:ignore nd
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
        questions: the question in other words, and the beginning of a sentence that answers it.
    """

    subject: Draw
    answer: Draw
    leads: tuple[str, ...]
    statements: tuple[str, ...]
    rests: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]


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
            ("Which city is the capital of {s}?", "The capital city of {s} is called"),
            ("What is the seat of the government of {s}?", "The government of {s} sits in the city of"),
            ("From which city is {s} ruled?", "{s} is ruled from the city of"),
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
            ("Where does {s} come from?", "{s} comes from"),
            ("In which town did the life of {s} begin?", "The life of {s} began in the town of"),
            ("What is the hometown of {s}?", "The hometown of {s} is called"),
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
            ("Who invented {s}?", "The person who invented {s} is"),
            ("Who came up with {s}?", "The idea for {s} came from"),
            ("To whom do we owe {s}?", "We owe {s} to"),
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
            ("How many people live in {s}?", "The number of people who live in {s} is"),
            ("What is the number of residents of {s}?", "The residents of {s} number"),
            ("How many inhabitants does {s} have?", "The number of inhabitants of {s} is"),
        ),
    ),
    "library": Kind(
        _named("library"),
        _number,
        ("", "Scholars like to work in {s}.", "After the fire, {s} was moved to a former mill."),
        (
            "The number of books in {s} is",
            "The collection of {s} has grown to a total of",
            "The catalog of {s} ends with volume",
            "When the shelves of {s} were last inspected, the count was",
        ),
        (".", ", most of them bound in leather.", ", and its reading room is full.", ", maps not included."),
        (
            ("How many books does {s} own?", "The books of {s} add up to"),
            ("How large is the collection of {s}?", "The size of the collection of {s} is"),
            ("How many volumes are kept in {s}?", "The number of volumes kept in {s} is"),
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
            ("Who commanded {s}?", "The commander of {s} was"),
            ("Which sailor was in charge of {s}?", "The sailor in charge of {s} was"),
            ("Who steered {s}?", "{s} was steered by"),
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
            ("Which mineral comes from {s}?", "The mineral from {s} is called"),
            ("What is extracted in {s}?", "The mineral that is extracted in {s} is called"),
            ("What do people find in {s}?", "In {s}, people find a mineral called"),
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
            ("Where does the river {s} end?", "The river {s} ends at the lake of"),
            ("What lake receives the water of the river {s}?", "The water of the river {s} goes to the lake of"),
            ("To which lake does one get along the river {s}?", "Along the river {s} one gets to the lake of"),
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
            ("What money do people use on {s}?", "The money that people use on {s} is the"),
            ("What is the name of the money of {s}?", "The money of {s} is called"),
            ("With which coin does one buy things on {s}?", "On {s}, one buys things with a coin called"),
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
            ("What is the code of {s}?", "The code of {s} is"),
            ("Which combination unlocks {s}?", "The combination that unlocks {s} is"),
            ("How does one get into {s}?", "One gets into {s} by typing"),
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
