"""Ray Train's list of checkpoints, rebuilt from the manifests.

Ray keeps `checkpoint_manager_snapshot.json` in the run directory, writes it in place, and refuses to start a run whose
list is torn or names a directory that is gone. The manifests say all that is in it, so it is rewritten before every
start.
"""

from __future__ import annotations

from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
    _CheckpointManagerState,
    _TrainingResultState,
)

from areal_ray.checkpoint import Catalog
from areal_ray.storage import Storage


def rebuild(run: Storage) -> list[str]:
    """Write the list of the good checkpoints of a run directory, oldest first, and their index; their names.

    Raises:
        OSError: if it cannot be written.
    """
    catalog = Catalog(run)
    found = catalog.summaries()
    good = [each for each in found if each.problem is None][::-1]
    if not all(each.indexed for each in good):
        catalog.write_index(found)
    results = [
        _TrainingResultState(checkpoint_dir_name=each.name, metrics={"step": each.step, **each.info.get("metrics", {})})
        for each in good
    ]
    state = _CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=list(range(len(results))),
        latest_checkpoint_result=results[-1] if results else None,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(results),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    run.replace(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME, state.model_dump_json().encode())
    return [each.name for each in good]
