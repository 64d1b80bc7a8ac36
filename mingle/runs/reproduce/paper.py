"""Published results, in per cent and points: the expected column of reproduced tables.

Sources: the MINGLE paper (arXiv 2505.11883) and, for the methods that it does not list, their own papers.
Nothing here was measured by this package.
"""

from __future__ import annotations

from collections.abc import Mapping

#: ACC and BWT of one suite; None where it was not published.
Scores = tuple[float | None, float | None]

#: task → base → accuracy on its test images, of (the pre-trained model, the task's own fine-tuned model)
PER_TASK: Mapping[str, Mapping[str, tuple[float, float]]] = {
    name: dict(zip(("clip-b32", "clip-b16", "clip-l14"), figures, strict=True))
    for name, figures in {
        "sun397": ((63.2, 74.9), (65.5, 78.9), (68.2, 82.8)),
        "stanford-cars": ((59.6, 78.5), (64.7, 85.9), (77.9, 92.8)),
        "resisc45": ((60.3, 95.1), (66.4, 96.6), (71.3, 97.4)),
        "eurosat": ((45.0, 99.1), (54.1, 99.0), (61.2, 99.1)),
        "svhn": ((31.6, 97.3), (52.0, 97.6), (58.4, 97.9)),
        "gtsrb": ((32.5, 98.9), (43.5, 99.0), (50.5, 99.2)),
        "mnist": ((48.3, 99.6), (51.7, 99.7), (76.3, 99.8)),
        "dtd": ((44.2, 79.7), (45.0, 82.3), (55.5, 85.5)),
        "oxford_flowers102": ((66.4, 88.6), (71.3, 94.9), (79.2, 97.7)),
        "pcam": ((60.6, 88.0), (54.0, 90.6), (51.2, 91.1)),
        "fer2013": ((41.3, 71.6), (46.4, 72.8), (50.0, 75.9)),
        "oxford-iiit-pet": ((83.3, 92.5), (88.4, 94.5), (93.2, 95.7)),
        "stl10": ((97.1, 97.5), (98.3, 98.2), (99.4, 99.2)),
        "cifar100": ((63.7, 88.4), (66.3, 88.8), (75.1, 93.0)),
        "cifar10": ((89.8, 97.6), (90.8, 98.3), (95.6, 99.1)),
        "food101": ((82.4, 88.4), (87.0, 91.9), (91.2, 94.8)),
        "fashion_mnist": ((63.0, 94.7), (67.3, 94.5), (67.0, 95.3)),
        "emnist_letters": ((12.0, 95.6), (12.4, 95.3), (12.3, 95.4)),
        "kmnist": ((10.0, 98.2), (11.2, 98.1), (9.7, 98.3)),
        "rendered-sst2": ((58.6, 71.3), (60.6, 75.7), (68.9, 80.5)),
    }.items()
}

_COUNTS = (8, 14, 20)


def _suites(
    base: str, acc: tuple[float | None, ...], bwt: tuple[float | None, ...] = (None, None, None)
) -> dict[str, Scores]:
    """The base's three suites that have a published ACC."""
    rows = zip(_COUNTS, acc, bwt, strict=True)
    return {f"{base}-{count}": (mean, transfer) for count, mean, transfer in rows if mean is not None}


#: (method, suite) → ACC and BWT
METHODS: Mapping[tuple[str, str], Scores] = {
    (method, suite): scores
    for method, rows in {
        "individual": (
            _suites("clip-b32", (90.4, 89.3, 89.8)),
            _suites("clip-b16", (92.4, 91.3, 91.6)),
            _suites("clip-l14", (94.3, 93.4, 93.5)),
        ),
        "opcm": (
            _suites("clip-b32", (75.5, 71.9, 65.7)),
            _suites("clip-b16", (81.8, 77.1, 70.3)),
            _suites("clip-l14", (87.0, 83.5, 76.0)),
        ),
        "nufilt": (
            _suites("clip-b32", (83.6, None, 71.0)),
            _suites("clip-l14", (91.6, None, 84.7)),
        ),
        "mingle": (
            _suites("clip-b32", (85.8, 81.6, 77.1)),
            _suites("clip-b16", (88.3, 84.9, 81.9), (-0.4, -0.9, -1.9)),
            _suites("clip-l14", (91.8, 88.8, 85.5)),
            {"mtil-11": (83.0, None), "glue-8": (83.3, 0.1)},
        ),
        "mingle-light": (
            _suites("clip-b32", (85.0, 81.7, 77.1), (-0.1, -0.4, -1.3)),
            _suites("clip-b16", (87.0, 84.7, 81.6)),
            _suites("clip-l14", (91.4, 89.2, 83.6)),
        ),
        "mingle-seq": ({"mtil-11": (85.8, None)},),
        "made-it": (  # arXiv 2604.22464; not a method of this package
            _suites("clip-b32", (87.1, None, 81.4)),
            _suites("clip-b16", (90.4, None, 83.0)),
            _suites("clip-l14", (93.1, None, 89.6)),
        ),
    }.items()
    for row in rows
    for suite, scores in row.items()
}

#: suite → ACC of MINGLE on the four tasks that have corrupted test images; first, on their clean ones
CORRUPTIONS: Mapping[str, float] = {
    "clip-b32-clean": 89.9,
    "clip-b32-motion_blur": 82.8,
    "clip-b32-impulse_noise": 67.5,
    "clip-b32-gaussian_noise": 70.7,
    "clip-b32-pixelate": 37.9,
    "clip-b32-spatter": 77.0,
    "clip-b32-contrast": 80.1,
    "clip-b32-jpeg_compression": 82.9,
}

#: the last part of MINGLE that is switched on → suite → ACC and BWT
ABLATION: Mapping[str, Mapping[str, Scores]] = {
    "static coefficients": _suites("clip-b16", (78.7, 76.4, 70.6), (-0.5, -1.0, -1.3)),
    "all gates trainable": _suites("clip-b16", (86.4, 81.7, 76.7), (-6.0, -7.7, -12.8)),
    "old gates frozen": _suites("clip-b16", (87.4, 81.3, 76.2), (-2.3, -4.3, -6.8)),
    "hard projector": _suites("clip-b16", (86.0, 83.5, 78.3), (-0.1, -0.1, -0.2)),
    "relaxed projector": _suites("clip-b16", (88.3, 84.9, 81.9), (-0.4, -0.9, -1.9)),
}

#: suite → seconds of MINGLE's adaptations on an RTX 4090
COST: Mapping[str, float] = {"clip-b32-8": 78.0, "clip-b32-14": 138.0, "clip-b32-20": 211.0}

#: the parameters of the newest gates, and of the whole model: a CLIP ViT-B/32 with eight tasks, rank 64 and
#: experts in all layers
TRAINABLE_PARAMETERS, TOTAL_PARAMETERS = 83.0e3, 173.1e6
