"""The characters that make up a glyph task, and how their class names are spelled.

A task shows about twenty characters of one script.  The lists are data, not code: they were picked once, by
farthest-point selection over rendered outlines (``examples/glyph_models/select_glyphs.py``), so that no two
classes of a task look alike at 28 pixels, and have not changed since.
"""

from __future__ import annotations

import unicodedata

ALPHABETS: dict[str, str] = {
    "greek": "βγδεζηθκλμνοπρστυχψω",
    "cyrillic": "АБДЖЙКМНОРСТУХЦЧЪЭЮЯ",
    "hebrew": "אבדזחטיךכלןנעףפץצקרש",
    "georgian": "აბგეთილმპჟრსუფქყჩცწჯ",
    "armenian": "ԲԶԸԹԻԾԿՀՂՃՄՅՆՇՈՊՍՔՕՖ",
    "arabic": "ﺀﺍﺏﺙﺝﺩﺫﺭﺯﺵﺽﻅﻍﻑﻕﻙﻡﻥﻩﻭ",
    "box": "─│┇┐┓┘┛├┣┫┼═╔╗╚╝╬╭╰╳",
    "syllabics": "ᐌᐒᐱᑌᑖᑙᑩᒤᒨᒸᓁᓂᓅᓍᓛᓪᓯᓵᓶᓾ",
    "lao": "ກຂຄງຈຊຍຕທນປຜຝພມຣລວສຮ",
    "braille": "⠁⠆⠊⠍⠓⠔⠘⠝⠟⠠⠧⠫⠬⠮⠲⠵⠷⠹⠼⠾",
    "arrows": "↕↗↜↭↯↰↱↲↵↶↷↹↺⇈⇖⇙⇫⇰⇱⇲",
    "operators": "∀∂∔∙∡∢≓≞≤≶≷≿⊃⊄⊑⊛⊣⊦⊪⋟",
    "lisu": "ꓐꓗꓘꓚꓜꓝꓞꓟꓡꓢꓣꓥꓦꓨꓪꓫꓲꓴꓵꓶ",
    "tifinagh": "ⴰⴳⴶⴸⴺⴼⴾⴿⵁⵃⵅⵌⵎⵒⵓⵞⵠⵡⵤⵥ",
    "hexagrams": "䷂䷄䷆䷈䷊䷋䷏䷚䷝䷟䷢䷥䷦䷫䷰䷳䷴䷵䷹䷺",
    "shapes": "□▥▪▯▲▵▹►▿◃◄◇◍◎◒◔◚◢◥◧",
    "latin": "ƏƔƕƖƢƣƩƱƷǇǉǊǌǱǳǶǷȜȢȣ",
    "dingbats": "✇✈✉✔✖✞✣✧✬✲❊❚❝➁➍➔➘➫➲➽",
    "ipa": "ɚɤɰɲɳɵɸʂʅʌʐʒʛʟʢʥʦʬʭʮ",
    "signs": "☄☌☣☥☰☹♃♇♎♏♑♿⚈⚖⚟⚤⚧⚨⚩⚶",
    "capitals": "ABCDFHIKLMNQRSUVWXYZ",
    "apl": "⌹⌿⍀⍂⍉⍊⍑⍖⍘⍙⍚⍜⍟⍩⍯⍰⍱⍴⍷⍺",
    "blackboard": "𝔸𝔽𝕂𝕄𝕊𝕌𝕒𝕓𝕔𝕕𝕜𝕝𝕡𝕢𝕣𝕧𝕨𝕩𝕪𝕫",
    "nko": "߀߁߂߃߇߉ߍߎߒߓߕߗߜߝߟߡߢߣߤߥ",
    "lowercase": "abcdegklmopqrsuvwxyz",
    "digits": "0123456789",
    "greek-capitals": "ΑΒΓΔΕΖΗΙΚΜΝΞΟΠΡΣΥΦΧΨ",
    "cyrillic-small": "абгдежйклнортцчъыьэя",
    "armenian-small": "բգըթժիլծկճյնշսվտցւքֆ",
    "blocks": "▀▂▄▆█▊▌▎░▒▖▗▘▙▚▛▜▝▞▟",
}

#: Scripts whose characters differ by *where* they stand in their cell: never re-centred on their ink.
CELL_ALPHABETS = frozenset({"braille", "box", "blocks"})

#: Prompts of the zero-shot head, in the manner of CLIP; ``{}`` takes the class name.
TEMPLATES = ("a glyph of {}.", "the character {}.", "a printed {}.")


def class_name(character: str) -> str:
    """The character's Unicode name in lower case, for example ``greek small letter alpha``."""
    return unicodedata.name(character).lower()
