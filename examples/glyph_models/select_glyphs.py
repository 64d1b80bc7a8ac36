"""Pick the characters of every alphabet of the glyph suites: farthest-point selection over rendered outlines.

Prints the table that stands in ``mingle/suites/glyphs/alphabets.py``.  Deterministic for one version of
matplotlib's fonts; run it again only to design a new suite.

    python examples/glyph_models/select_glyphs.py [--classes 20]
"""

from __future__ import annotations

import argparse
import re
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F

from mingle.suites.glyphs.alphabets import CELL_ALPHABETS
from mingle.suites.glyphs.render import TEST_FACES, TRAIN_FACES, faces_with, outline

#: alphabet → code points that may belong to it: a range, and a pattern their Unicode names must match
POOLS: dict[str, tuple[range, str]] = {
    "greek": (range(0x391, 0x3CA), r"GREEK SMALL LETTER (?!FINAL)\w+$"),
    "cyrillic": (range(0x410, 0x430), r"CYRILLIC CAPITAL LETTER"),
    "hebrew": (range(0x5D0, 0x5EB), r"HEBREW LETTER"),
    "georgian": (range(0x10D0, 0x10F1), r"GEORGIAN LETTER"),
    "armenian": (range(0x531, 0x557), r"ARMENIAN CAPITAL LETTER"),
    "arabic": (range(0xFE80, 0xFEF0), r"ARABIC LETTER \w+ ISOLATED FORM$"),
    "box": (
        range(0x2500, 0x2580),
        r"BOX DRAWINGS (HEAVY|DOUBLE|LIGHT (DOWN|UP|VERTICAL|HORIZONTAL|ARC|DIAGONAL))",
    ),
    "syllabics": (range(0x1401, 0x1500), r"CANADIAN SYLLABICS \w+$"),
    "lao": (range(0xE81, 0xEB0), r"LAO LETTER"),
    "braille": (range(0x2801, 0x2840), r"BRAILLE PATTERN"),
    "arrows": (range(0x2190, 0x2200), r".*ARROW"),
    "operators": (range(0x2200, 0x2300), r".*"),
    "lisu": (range(0xA4D0, 0xA4F8), r"LISU LETTER"),
    "tifinagh": (range(0x2D30, 0x2D66), r"TIFINAGH LETTER"),
    "hexagrams": (range(0x4DC0, 0x4E00), r"HEXAGRAM FOR"),
    "shapes": (range(0x25A0, 0x2600), r".*"),
    "latin": (range(0x180, 0x250), r"LATIN (CAPITAL|SMALL) LETTER \w+$"),
    "dingbats": (range(0x2701, 0x27C0), r".*"),
    "ipa": (range(0x250, 0x2B0), r"LATIN (SMALL )?LETTER"),
    "signs": (range(0x2600, 0x2700), r"(?!DIGRAM|WHITE CHESS|BLACK CHESS).*"),
    "capitals": (range(0x41, 0x5B), r"LATIN"),
    "apl": (range(0x2336, 0x237B), r"APL"),
    "blackboard": (range(0x1D538, 0x1D56C), r"MATHEMATICAL DOUBLE-STRUCK"),
    "nko": (range(0x7C0, 0x7EB), r"NKO"),
    "lowercase": (range(0x61, 0x7B), r"LATIN"),
    "digits": (range(0x30, 0x3A), r"DIGIT"),
    "greek-capitals": (range(0x391, 0x3AA), r"GREEK CAPITAL LETTER"),
    "cyrillic-small": (range(0x430, 0x450), r"CYRILLIC SMALL LETTER"),
    "armenian-small": (range(0x561, 0x587), r"ARMENIAN SMALL LETTER"),
    "blocks": (range(0x2580, 0x25A0), r".*"),
}


def separable(name: str, pool: list[str], count: int) -> list[str]:
    """`count` characters, each as far as possible from those already taken (greedy, cosine distance of
    blurred outlines).
    """
    faces = TRAIN_FACES + TEST_FACES
    stack = [
        np.mean([outline(c, f, cell=name in CELL_ALPHABETS) for f in faces_with(c, faces)], 0) for c in pool
    ]
    features = F.avg_pool2d(
        torch.tensor(np.stack(stack), dtype=torch.float32)[:, None], 5, stride=2, padding=2
    ).flatten(1)
    features = F.normalize(features - features.mean(0), dim=1)
    distance = 1 - features @ features.T
    taken = [int(distance.sum(1).argmax())]
    while len(taken) < min(count, len(pool)):
        nearest = distance[:, taken].min(1).values
        nearest[taken] = -1
        taken.append(int(nearest.argmax()))
    return sorted(pool[i] for i in taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=20, help="characters per alphabet")
    count = parser.parse_args().classes
    for name, (points, pattern) in POOLS.items():
        named = [c for c in map(chr, points) if re.match(pattern, unicodedata.name(c, "?"))]
        pool = [c for c in named if faces_with(c, TRAIN_FACES) and faces_with(c, TEST_FACES)]
        print(f'    "{name}": "{"".join(separable(name, pool, count))}",  # of {len(pool)}')


if __name__ == "__main__":
    main()
