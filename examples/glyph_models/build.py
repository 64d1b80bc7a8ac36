"""Fine-tune the experts of the embedded suite that ship with the package, and write the manifest of its data.

Run after ``pretrain.py``.  Deterministic for one machine and version of torch; about 40 seconds a task on 2
CPU cores.

    python examples/glyph_models/build.py [--suite glyphs8]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

import torch

from mingle.io.files import sha256, write_json
from mingle.io.provenance import versions
from mingle.suites import glyphs
from mingle.suites.glyphs.finetune import FinetuneConfig, finetune
from mingle.suites.glyphs.tasks import SUITES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="glyphs8", choices=SUITES, help="whose experts ship")
    args = parser.parse_args()
    config = FinetuneConfig()
    for task in SUITES[args.suite]:
        began = time.perf_counter()
        finetune(glyphs.BASE, task, glyphs.DATA / "experts" / task.name, config)
        print(f"{task.name}: {time.perf_counter() - began:.0f} s", flush=True)
    shipped = [
        path for path in sorted(glyphs.DATA.rglob("*")) if path.is_file() and path.name != "manifest.json"
    ]
    files = {str(path.relative_to(glyphs.DATA)): sha256(path) for path in shipped}
    write_json(
        glyphs.DATA / "manifest.json",
        {
            "pretraining": {
                "command": "python examples/glyph_models/pretrain.py mingle/suites/glyphs/data/base",
                "seed": 0,
            },
            "fine-tuning": {
                "command": f"python examples/glyph_models/build.py --suite {args.suite}",
                "seed": "crc32 of '<task>/train'",
                "settings": asdict(config),
            },
            "versions": versions() | {"threads": str(torch.get_num_threads())},
            "files": files,
        },
    )
    total = sum(path.stat().st_size for path in shipped)
    print(json.dumps({"files": len(files), "megabytes": round(total / 1e6, 2)}))


if __name__ == "__main__":
    main()
