"""An export in a process of its own, at low priority: what it takes from its machine, training does not miss.

A job comes as a line of JSON on standard input; when that is closed, the process that asked has ended, and so does this
one. It says what came of it as a line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

_NICENESS = 19


def main() -> int:
    os.nice(_NICENESS)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = _export(job)
    except Exception as error:  # noqa: BLE001  (told to who asked, whatever it is)
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    print(json.dumps(answer), flush=True)
    return 1 if "error" in answer else 0


def _export(job: dict[str, Any]) -> dict[str, Any]:
    import torch  # here: the line on standard input comes at once

    from areal_ray.checkpoint import Catalog
    from areal_ray.config import AdapterConfig, plugin
    from areal_ray.models import build_adapter
    from areal_ray.run import RunDir
    from areal_ray.storage import storage_at
    from areal_ray.tools.export.directory import Form
    from areal_ray.tools.export.folder import FOLDER, export_into
    from areal_ray.tools.export.tokens import TokenNames

    torch.set_num_threads(1)
    plugin.extend_path(job["search_path"])
    run = RunDir(storage_at(job["run"], job["s3"]), job["job"])
    folder = run.storage.sub(FOLDER)
    folder.ensure()
    form = Form(**{**job["form"], "tokens": TokenNames(**job["form"]["tokens"])})
    checkpoint = Catalog(run.storage).directory(job["checkpoint"])
    # Of the configuration, which the user wrote: what the checkpoint names is not called.
    adapter = None if job["adapter"] is None else build_adapter(AdapterConfig(**job["adapter"]))
    done = export_into(folder, checkpoint, job["step"], form, run, adapter, job["token"])
    return {"bytes": done.total_bytes, "tensors": done.tensors}


def _end_with_parent() -> None:
    # Not by the lines of a text stream: this thread is in the middle of a read when the interpreter ends.
    while os.read(0, 1 << 12):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
