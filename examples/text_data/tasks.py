"""Which classes of which source each task of the text suites tells apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from sources import Row, Sources
from wordnet import NOUN_FILES, VERB_FILES, WordNet

_Rows = dict[str, Callable[[], Iterable[Row]]]

_ANIMALS = {
    "amphibian": "frog or salamander",
    "arachnid": "spider or mite",
    "bat": "bat",
    "beetle": "beetle",
    "bird": "bird",
    "carnivore": "cat, bear or other carnivore",
    "crustacean": "crustacean",
    "dinosaur": "dinosaur",
    "dog": "dog",
    "fish": "fish",
    "horse": "horse",
    "insect": "insect",
    "lepidopterous insect": "butterfly or moth",
    "lizard": "lizard",
    "marsupial": "marsupial",
    "mollusk": "shellfish or snail",
    "primate": "monkey or ape",
    "rodent": "rodent",
    "snake": "snake",
    "even-toed ungulate": "cattle, deer or pig",
    "worm": "worm",
}
_PLANTS = {
    "cactus": "cactus",
    "conifer": "conifer",
    "fern": "fern",
    "fruit": "fruit",
    "fungus": "fungus",
    "grass": "grass",
    "herb": "herb",
    "orchid": "orchid",
    "shrub": "shrub",
    "tree": "tree",
    "vine": "vine",
}
_SECTIONS = {
    "admin": "system administration",
    "comm": "communication",
    "database": "database",
    "editors": "editor",
    "electronics": "electronics",
    "fonts": "font",
    "games": "game",
    "graphics": "graphics",
    "hamradio": "amateur radio",
    "mail": "mail",
    "math": "mathematics",
    "net": "network",
    "otherosfs": "emulator or foreign file system",
    "science": "science",
    "sound": "sound",
    "text": "text processing",
    "utils": "utility",
    "vcs": "version control",
    "video": "video",
    "web": "web",
}
_IMPLEMENTATIONS = {
    "c": "C",
    "c++": "C++",
    "java": "Java",
    "lisp": "Lisp",
    "objc": "Objective-C",
    "ocaml": "OCaml",
    "perl": "Perl",
    "php": "PHP",
    "python": "Python",
    "r": "R",
    "ruby": "Ruby",
    "shell": "shell script",
}
_EMOJI = {
    "Activities": "activity",
    "Animals & Nature": "animal or nature",
    "Flags": "flag of a country",
    "Food & Drink": "food or drink",
    "Objects": "object",
    "People & Body": "person or body",
    "Smileys & Emotion": "smiley or emotion",
    "Symbols": "symbol",
    "Travel & Places": "travel or place",
}
_BLOCKS = {
    "alchemy": (0x1F700, 0x1F77F),
    "arrows": (0x2190, 0x21FF),
    "astrology and weather": (0x2600, 0x26FF),
    "box drawing": (0x2500, 0x257F),
    "Byzantine music": (0x1D000, 0x1D0F5),
    "dingbats": (0x2700, 0x27BF),
    "geometric shapes": (0x25A0, 0x25FF),
    "hexagrams": (0x4DC0, 0x4DFF),
    "mathematics": (0x2200, 0x22FF),
    "more arrows": (0x2900, 0x297F),
    "more mathematics": (0x2A00, 0x2AFF),
    "music": (0x1D100, 0x1D1FF),
    "pictographs": (0x1F300, 0x1F5FF),
    "playing cards": (0x1F0A0, 0x1F0FF),
    "technology": (0x2300, 0x23FF),
}
_CITIES = (
    "BR",
    "CN",
    "DE",
    "ES",
    "FR",
    "GB",
    "ID",
    "IN",
    "IR",
    "IT",
    "JP",
    "MX",
    "NG",
    "PH",
    "PL",
    "RU",
    "TH",
    "TR",
    "US",
    "VN",
)
_REGIONS = ("AZ", "BD", "BF", "CZ", "DZ", "EE", "IS", "LT", "MA", "MK", "MT", "SI", "UG")
_FEELINGS = {
    "very negative": (-4.0, -2.0),
    "negative": (-1.9, -0.1),
    "positive": (0.1, 1.9),
    "very positive": (2.0, 4.0),
}
_LANGUAGES = {
    "cs": "Czech",
    "cy": "Welsh",
    "da": "Danish",
    "de": "German",
    "es": "Spanish",
    "et": "Estonian",
    "fi": "Finnish",
    "fr": "French",
    "hr": "Croatian",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "lt": "Lithuanian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "sl": "Slovenian",
    "sv": "Swedish",
    "tr": "Turkish",
}
_OTHER_LANGUAGES = {
    "af": "Afrikaans",
    "ca": "Catalan",
    "eo": "Esperanto",
    "eu": "Basque",
    "ga": "Irish",
    "gl": "Galician",
    "is": "Icelandic",
    "lv": "Latvian",
    "ms": "Malay",
    "nb_NO": "Norwegian",
    "sk": "Slovak",
    "sq": "Albanian",
    "vi": "Vietnamese",
    "az": "Azerbaijani",
    "oc": "Occitan",
}
_TOPICS = {
    ("law", 14): "law",
    ("military", 14): "the military",
    ("chemistry", 9): "chemistry",
    ("computer science", 9): "computer science",
    ("Greek mythology", 14): "Greek mythology",
    ("biology", 9): "biology",
    ("physics", 9): "physics",
    ("music", 10): "music",
    ("botany", 9): "botany",
    ("mathematics", 9): "mathematics",
    ("baseball", 4): "baseball",
    ("sport", 4): "sport",
    ("statistics", 9): "statistics",
    ("cooking", 4): "cooking",
    ("medicine", 9): "medicine",
    ("genetics", 9): "genetics",
    ("linguistics", 9): "linguistics",
}


def texts8(sources: Sources) -> _Rows:
    """The rows of the tasks of ``texts8``, in their order."""
    wordnet = _wordnet(sources)
    return {
        "nouns": partial(wordnet.glosses, NOUN_FILES),
        "verbs": partial(wordnet.glosses, VERB_FILES),
        "animals": partial(wordnet.kinds, {wordnet.noun(word, 5): kind for word, kind in _ANIMALS.items()}),
        "packages": partial(sources.sections, _SECTIONS),
        "emoji": partial(sources.emoji, _EMOJI),
        "cities": partial(sources.cities, _CITIES),
        "feelings": partial(sources.feelings, _FEELINGS),
        "languages": partial(sources.translations, _LANGUAGES, ("iso3166-1", "iso639-3")),
    }


def tuning(sources: Sources) -> _Rows:
    """The rows of the tasks on which settings are chosen: other classes of other texts."""
    wordnet = _wordnet(sources)
    return {
        "topics": partial(wordnet.topics, {wordnet.noun(*noun): topic for noun, topic in _TOPICS.items()}),
        "plants": partial(wordnet.kinds, {wordnet.noun(word, 20): kind for word, kind in _PLANTS.items()}),
        "implementations": partial(sources.implementations, _IMPLEMENTATIONS),
        "characters": partial(sources.characters, _BLOCKS),
        "regions": partial(sources.regions, _REGIONS),
        "more-languages": partial(
            sources.translations, _OTHER_LANGUAGES, ("iso4217", "iso15924", "iso639-5", "iso3166-1")
        ),
    }


def _wordnet(sources: Sources) -> WordNet:
    return WordNet(sources.folder / "wordnet-base/usr/share/wordnet")
