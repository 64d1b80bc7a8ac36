"""Reads many edited files and says what became of them.

python tests/fuzz/run.py headers --count 1000000 --seed 0
python tests/fuzz/run.py configs --first 4711 --count 1        # one case again
"""

from __future__ import annotations

import argparse

from targets import TARGETS
from trials import run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = run(args.target, range(args.first, args.first + args.count), args.seed)
    for number, defect in report.defects.items():
        print(f"case {number}:\n{defect}")
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in report.outcomes.most_common())
    print(f"{args.target}, seed {args.seed}: {report.outcomes.total()} cases in {report.seconds:.0f} s")
    print(outcomes)
    print(f"slowest {report.slowest[0]:.2f} s (case {report.slowest[1]}), memory +{report.growth:.0f} MiB")
    return bool(report.defects)


if __name__ == "__main__":
    raise SystemExit(main())
