"""Two fine-tuned vision towers become one model; nobody says which task an image belongs to."""

import mingle
from mingle import suites

# Two tasks of a suite that ships with the package: Greek letters, white on black; Cyrillic on a chessboard.
suite = suites.load("glyphs4")
tasks = ["greek-inverted", "cyrillic-checker"]

merger = mingle.Merger(suite.base, method="routed", rank=32)
for task in tasks:
    merger.add(task, suite.expert(task), suite.seeds(task))  # the model, and a few unlabelled images
    result = merger.evaluate(suite)  # accuracy on all tasks merged so far

base = mingle.Merger(suite.base, method="pre-trained")
for task in tasks:
    base.add(task, suite.expert(task))
untouched = base.evaluate(suite)

for place, task in enumerate(tasks):
    print(f"{task}: {untouched.matrix[-1][place]:.1f} % before, {result.matrix[-1][place]:.1f} % merged")
print(f"ACC {result.acc:.1f} %, BWT {result.bwt:+.1f} points")

# The merged model is an ordinary module.
print(type(merger.model).__name__, "with", mingle.count_parameters(merger.model)[1], "parameters")
