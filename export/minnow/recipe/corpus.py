"""Text for the embedded voice: sentences from Debian's `fortunes` and `scowl` packages and from the templates below.

There are three sources, all freely licensed: sentences of the fortune files, templates with random words, and short lists of
words, which teach the spelling of words that no sentence has. The hash of a sentence decides whether it is held out, so that a
longer corpus never moves a held-out sentence into training.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

FORTUNES = Path("/usr/share/games/fortunes")
WORD_LISTS = Path("/usr/share/dict/scowl")
HELD_OUT_ONE_IN = 50
SENTENCE_WORDS = range(2, 19)

TEMPLATES = (
    "The {adj} {noun} {did} {place}.",
    "My {noun} is {adj}, and your {noun} is {adj}.",
    "Please bring the {noun} and the {adj} {noun}.",
    "Can you see the {adj} {noun} {place}?",
    "Every {noun} needs a {adj} {noun}.",
    "{name} {did} {place} on {day}.",
    "{name} and {name} bought a {adj} {noun}.",
    "On {day}, the {noun} {did} {place}.",
    "Is there a {noun} {place}?",
    "I have never seen such a {adj} {noun}.",
    "There were {count} {noun}s {place}.",
    "The train leaves at {hour} {minute} on {day}.",
    "In {month}, the {noun} is always {adj}.",
    "She said that the {noun} was too {adj}.",
    "He asked {name} for a {adj} {noun}.",
    "We will meet {place} at {hour} o'clock.",
    "Turn left {place}, then look for the {adj} {noun}.",
    "They wanted a {noun}, but they got a {noun}.",
    "How {adj} is the {noun}?",
    "Good morning, {name}. The {noun} is {adj} today.",
    "It costs {count} dollars and {minute} cents.",
    "The {noun} weighs {count} pounds.",
    "Nobody knows why the {noun} {did}.",
    "If the {noun} is {adj}, call {name}.",
    "Yesterday a {adj} {noun} {did} {place}.",
    "Thank you for the {adj} {noun}, {name}.",
    "My number is {digits}.",
    "The year was {year}.",
    "Chapter {count}: the {adj} {noun}.",
    "Hello {name}, how was {day}?",
)
SLOTS: dict[str, tuple[str, ...]] = {
    "noun": tuple(
        "river window garden letter teacher doctor mountain kitchen bridge farmer island picture machine dragon castle "
        "village painter hammer basket lantern blanket market pencil morning engine forest harbor ticket mirror "
        "station pocket sailor wizard library carpet bottle button summer winter feather ladder orange potato rabbit tiger "
        "chicken monkey turtle fish fox dog cat horse bird cow ship boat car truck plane road street house tower church school "
        "book table chair lamp door floor wall roof stone tree flower leaf cloud storm star moon planet ocean beach valley "
        "field song story question answer problem secret promise journey battle soldier captain king queen prince neighbor "
        "brother sister father mother cousin uncle child friend stranger guest thief judge lawyer nurse baker driver singer "
        "computer telephone camera radio hat coat shoe shirt jacket umbrella knife fork spoon plate cup sandwich apple lemon "
        "cake cookie pie soup dinner breakfast holiday birthday party present box bag key clock watch ring coin".split()
    ),
    "adj": tuple(
        "quick lazy brown old new small large tiny huge quiet loud gentle angry happy sad bright dark cold warm hot cool "
        "empty full heavy light soft hard smooth rough sharp strange famous ancient modern clever foolish brave honest "
        "careful careless golden silver purple yellow green blue red white black wooden broken perfect beautiful ugly "
        "expensive cheap useful dangerous safe simple difficult hungry thirsty tired lonely friendly polite rude serious "
        "funny wonderful terrible ordinary special public private wet dry clean dirty young sweet bitter early late".split()
    ),
    "did": (
        "jumped over the fence",
        "ran away",
        "fell asleep",
        "waited for hours",
        "sang a song",
        "danced all night",
        "disappeared",
        "moved slowly",
        "looked around",
        "asked a question",
        "told a story",
        "opened the door",
        "closed the window",
        "walked home",
        "laughed",
        "cried",
        "made a noise",
        "found a treasure",
        "lost the key",
        "won the game",
        "broke down",
        "came back",
        "stood still",
        "went to sleep",
        "changed its mind",
        "wrote a letter",
        "learned to swim",
        "caught a cold",
        "drank the water",
        "ate the bread",
        "climbed the hill",
        "crossed the river",
        "paid the bill",
        "shook hands",
        "turned around",
        "grew very fast",
        "stopped suddenly",
        "started to rain",
        "burned brightly",
        "floated past",
    ),
    "place": (
        "near the river",
        "in the garden",
        "behind the house",
        "under the table",
        "over the bridge",
        "at the station",
        "by the window",
        "in the forest",
        "on the roof",
        "across the street",
        "beside the road",
        "at the market",
        "in the kitchen",
        "next to the church",
        "below the hill",
        "above the clouds",
        "between the trees",
        "outside the city",
        "inside the castle",
        "on the beach",
        "along the shore",
        "through the tunnel",
        "around the corner",
        "in front of the school",
        "far from home",
        "at the top of the tower",
        "on the left side",
        "down the hall",
        "up the stairs",
        "in the middle of the lake",
    ),
    "name": tuple(
        "Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Laura Martin Nancy Oliver Peter Rachel Sarah "
        "Thomas Victor William Anna George Helen James Kate Linda Mary Paul Susan Robert Richard Charles Elizabeth".split()
    ),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": tuple("January February March April May June July August September October November December".split()),
    "hour": tuple("one two three four five six seven eight nine ten eleven twelve".split()),
    "minute": tuple("ten fifteen twenty thirty forty fifty twenty-five thirty-five forty-five fifty-five".split()),
}


@dataclass(frozen=True, slots=True)
class Sentence:
    """One line to be spoken. `source` is "fortune", "template" or "words"."""

    text: str
    source: str

    @property
    def held_out(self) -> bool:
        """Return whether the text's SHA-256 keeps it out of training."""
        digest = hashlib.sha256(self.text.lower().encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def build_corpus(*, templates: int, word_lists: int, seed: int) -> list[Sentence]:
    """Return all sentences, without repeats, in a seeded random order. Raises FileNotFoundError without the Debian packages."""
    rng = random.Random(seed)
    common = _words((10, 20, 35, 40, 50))
    sentences = [Sentence(text, "fortune") for text in _fortunes(common)]
    sentences += [Sentence(_fill(rng), "template") for _ in range(templates)]
    frequent, rest = _words((10, 20)), _words((35, 40, 50))
    pool = sorted(w for w in frequent if len(w) > 1)
    rare = sorted(w for w in rest if len(w) > 2)
    for n in range(word_lists):
        source = pool if n % 2 else rare
        sentences.append(Sentence(_word_list(rng.sample(source, rng.randint(2, 6))), "words"))
    unique = {s.text: s for s in sentences}
    ordered = sorted(unique.values(), key=lambda s: s.text)
    rng.shuffle(ordered)
    return ordered


def _words(levels: tuple[int, ...]) -> set[str]:
    """Return the lower-case words of the given SCOWL sizes (10 = the commonest)."""
    found: set[str] = set()
    for level in levels:
        for kind in ("english-words", "american-words"):
            path = WORD_LISTS / f"{kind}.{level}"
            if path.exists():
                found |= set(path.read_text(encoding="latin-1").split())
            elif kind == "english-words":
                raise FileNotFoundError(f"{path}: install the Debian packages scowl, fortunes, fortunes-min and flite")
    return {w for w in found if re.fullmatch(r"[a-z]+('[a-z]+)?", w)}


def _fortunes(common: set[str]) -> list[str]:
    """Return the sentences of the fortune files that have only common words, and so no markup or foreign text."""
    if not FORTUNES.is_dir():
        raise FileNotFoundError(f"{FORTUNES}: install the Debian packages fortunes and fortunes-min")
    out = []
    for path in sorted(FORTUNES.iterdir()):
        if path.suffix or path.is_dir() or path.name == "ascii-art":
            continue
        for cookie in re.split(r"\n%\n?", path.read_text(encoding="utf-8", errors="ignore")):
            cookie = re.split(r"\n\s*--", cookie)[0]
            flat = re.sub(r"\s+", " ", cookie).strip()
            for text in re.split(r"(?<=[.!?])[\"')]*\s+[\"'(]*(?=[A-Z])", flat):
                text = text.strip(" \"'()-*")
                if _speakable(text, common):
                    out.append(text)
    return out


def _speakable(text: str, common: set[str]) -> bool:
    if not re.fullmatch(r"[A-Z][A-Za-z',;:\- ]*[.!?]", text) or re.search(r"[A-Z]{2}|--| -|- |[,;:']{2}", text):
        return False
    words = re.findall(r"[A-Za-z']+", text)
    known = all(w.lower().strip("'") in common or w in ("I", "A") for w in words)
    return known and len(words) in SENTENCE_WORDS and len(text) <= 110


def _fill(rng: random.Random) -> str:
    def slot(match: re.Match[str]) -> str:
        name = match[1]
        if name == "count":
            return str(rng.randint(2, 99)) if rng.random() < 0.5 else str(rng.randint(100, 999))
        if name == "year":
            return str(rng.randint(1100, 2030))
        if name == "digits":
            return " ".join(rng.choice("0123456789") for _ in range(rng.randint(3, 6)))
        return rng.choice(SLOTS[name])

    return re.sub(r"\{(\w+)\}", slot, rng.choice(TEMPLATES))


def _word_list(words: list[str]) -> str:
    head = ", ".join(words[:-1])
    text = f"{head} and {words[-1]}."
    return text[0].upper() + text[1:]
