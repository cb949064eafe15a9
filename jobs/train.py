"""The entry point for `ray job submit --working-dir . -- python jobs/train.py --config FILE key=value ...`."""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the uploaded code, before an installed one

from areal_ray.cli.main import main

if __name__ == "__main__":
    missing = [name for name in ("ray", "torch", "omegaconf", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"{sys.executable} lacks {', '.join(missing)}: a job runs with the `python` of the shell that started Ray "
            "there. Start it where areal_ray is installed: . .venv/bin/activate && ray start --head"
        )
    sys.exit(main(["train", *sys.argv[1:]]))
