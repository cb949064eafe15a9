"""Names that are private to Ray: in this file only, with a check that all of them are as they were when it was written.

Nothing of Ray is imported before it is used: a module that a new Ray has renamed shows in `core_problems` or
`train_problems`, and the run goes on with Ray's public API alone. The classes that controller/ extends are listed, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from areal_ray.cluster.ray_checks import missing

KNOWN = ("2.60",)  # as pyproject says
SYNC_ACTOR = "ray.train.v2._internal.execution.checkpoint.sync_actor"  # module of the actor beside every worker group
_KV_NAMESPACE = b"areal_ray"
_EXECUTION = "ray.train.v2._internal.execution"

_CORE = {
    "ray._private.worker": "_worker_logs_enabled _global_node",
    "ray._private.node:Node": "get_logs_dir_path get_session_dir_path",
    "ray._private.ray_logging:global_worker_stdstream_dispatcher": "add_handler(name,handler) remove_handler(name)",
    "ray._private.state": "state.get_draining_nodes available_resources_per_node",
    "ray._private.ray_constants": "WORKER_PROCESS_SETUP_HOOK_ENV_VAR GLOBAL_GRPC_OPTIONS",
    "ray._private.grpc_utils": "init_grpc_channel(address,options)",
    "ray._common.network_utils": "build_address(host,port)",
    "ray._common.constants": "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR",
    "ray._raylet": "RAY_NODE_ID_KEY PlacementGroupID.from_hex",
    "ray.core.generated.common_pb2": "Language.PYTHON",
    "ray.core.generated.node_manager_pb2": "GetResourceLoadRequest GetResourceLoadReply.resources",
    "ray.core.generated.node_manager_pb2:PrestartWorkersRequest": "language job_id runtime_env_info num_workers "
    "keep_alive_duration_secs",
    "ray.core.generated.gcs_pb2:ResourcesData": "resources_total resources_available is_draining",
    "ray.core.generated.node_manager_pb2_grpc:NodeManagerServiceStub": "PrestartWorkers GetResourceLoad",
    "ray.core.generated.gcs_service_pb2": "GetClusterIdRequest GetClusterIdReply.cluster_id",
    "ray.core.generated.gcs_service_pb2_grpc:NodeInfoGcsServiceStub": "GetClusterId",
    "ray.experimental.internal_kv": "_internal_kv_put(key,value,namespace) _internal_kv_get(key,namespace) "
    "_internal_kv_del(key,namespace)",
    "ray.runtime_context:RuntimeContext": "get_runtime_env_string gcs_address",
    "ray.actor:ActorClassID": "from_random nil",
}
_TRAIN = {
    "ray.train._internal.utils": "get_address_and_port",
    "ray.train.torch": "TorchConfig.backend_cls TorchTrainer._get_train_func TorchTrainer.train_run_context "
    "TorchTrainer._create_default_callbacks",
    "ray.train:ScalingConfig": "_resources_per_worker_not_none",
    "ray.train.torch.config:_TorchBackend": "on_start(worker_group,backend_config) "
    "on_shutdown(worker_group,backend_config)",
    "ray.train.v2._internal.callbacks.datasets": "DatasetsCallback",
    "ray.train.v2._internal.callbacks.placement_group_callback": "PlacementGroupCleanerCallback",
    "ray.train.v2._internal.callbacks.preemption_callback:PreemptionCallback": "_watcher _poll_interval_s "
    "_stop_watcher after_worker_group_start(worker_group)",
    "ray.train.v2._internal.constants": "get_env_vars_to_propagate CHECKPOINT_MANAGER_SNAPSHOT_FILENAME",
    "ray.train.v2._internal.exceptions": "WorkerGroupStartupTimeoutError WorkerGroupStartupFailedError "
    "WorkerHealthCheckTimeoutError WorkerHealthCheckFailedError.health_check_failure",
    SYNC_ACTOR: "SynchronizationActor",
    f"{_EXECUTION}.callback:ControllerCallback": "after_controller_start(train_run_context) "
    "before_controller_execute_failure_decision(failure_decision)",
    f"{_EXECUTION}.callback:WorkerGroupCallback": "before_worker_group_start(worker_group_context) "
    "on_worker_group_start before_init_train_context(workers) after_worker_group_start(worker_group) "
    "after_worker_group_training_start(worker_group) after_worker_group_poll_status(worker_group_status) "
    "before_worker_group_shutdown(worker_group) after_worker_group_shutdown(worker_group_context)",
    f"{_EXECUTION}.checkpoint.checkpoint_manager": "CheckpointManager._write_state_to_storage "
    "_TrainingResultState(checkpoint_dir_name,metrics) "
    "_CheckpointManagerState(checkpoint_results,checkpoint_report_indices,latest_checkpoint_result,"
    "pending_training_results,pending_validation_specs,current_report_index,validated_checkpoint_dir_names,"
    "timed_out_validation_checkpoint_dir_names,failed_validation_checkpoint_dir_names)",
    f"{_EXECUTION}.context": "get_train_context TrainContext.preemption_context TrainRunContext.run_id",
    f"{_EXECUTION}.controller": "TrainController(train_fn_ref,train_run_context,callbacks,scaling_policy,"
    "failure_policy)",
    f"{_EXECUTION}.controller:TrainController": "worker_group_cls run get_result abort "
    "_start_worker_group(num_workers,resources_per_worker) _shutdown _checkpoint_manager _failure_policy "
    "_worker_group_callbacks_to_propagate",
    f"{_EXECUTION}.failure_handling": "FailureDecision.RETRY FailureDecision.RAISE FailurePolicy(failure_config) "
    "FailurePolicy.make_decision(training_failed_error)",
    f"{_EXECUTION}.preemption": "PreemptionWatcher(node_to_ranks,poll_interval_s,worker_actors_by_rank) "
    "PreemptionWatcher._stop_event PreemptionContext.preemption_info",
    f"{_EXECUTION}.scaling_policy": "NoopDecision ResizeDecision(num_workers,resources_per_worker)",
    f"{_EXECUTION}.scaling_policy.elastic:ElasticScalingPolicy": "_get_num_workers_for_resource_request "
    "_send_resource_request _maybe_send_resource_request _cancel_resource_request _get_resize_decision(num_workers) "
    "make_decision_for_non_running_worker_group "
    "make_decision_for_running_worker_group(worker_group_state,worker_group_status)",
    f"{_EXECUTION}.worker_group": "WorkerGroup(train_run_context,worker_group_context,callbacks)",
    f"{_EXECUTION}.worker_group:WorkerGroup": "_start _create_placement_group(scaling_config,worker_group_context) "
    "shutdown abort has_started get_workers _clear_state _worker_group_state _worker_group_context _train_run_context "
    "get_resources_per_worker execute(fn) execute_single(rank,fn)",
    f"{_EXECUTION}.worker_group.worker:Worker": "actor metadata distributed_context",
    f"{_EXECUTION}.worker_group.worker:RayTrainWorker": "run_train_fn(train_fn_ref)",
    f"{_EXECUTION}.worker_group.placement_group_handle:DefaultPlacementGroupHandle": "wait(timeout_seconds) "
    "placement_group",
    f"{_EXECUTION}.worker_group.state": "WorkerGroupContext(run_attempt_id,train_fn_ref,num_workers,"
    "resources_per_worker,placement_strategy,label_selector)",
    f"{_EXECUTION}.worker_group.state:WorkerGroupState": "placement_group_handle shutdown num_workers start_time",
}


def core_problems() -> list[str]:
    """List differences of this Ray, by name: its version and all that `import ray` brings. Empty if there are none."""
    import ray

    if ray.__version__.rpartition(".")[0] not in KNOWN:
        return [f"Ray {ray.__version__} is not one of those whose internals are known ({', '.join(KNOWN)})"]
    return missing(_CORE)


def train_problems() -> list[str]:
    """List differences of Ray Train, by name; imports ray.train."""
    return missing(_TRAIN)


@contextmanager
def worker_logs_printed(on: bool) -> Iterator[None]:
    """Have Ray print lines of workers and the raylet's accounts of dead ones, or not, while the block lasts."""
    from ray._private import worker

    before, worker._worker_logs_enabled = worker._worker_logs_enabled, on
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


@contextmanager
def worker_logs_to(name: str, handler: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Hand batches of lines that processes of the job have printed to `handler` while the block lasts."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    dispatcher.add_handler(name, handler)
    try:
        yield
    finally:
        dispatcher.remove_handler(name)


def session_directory() -> str:
    """Directory of this node's Ray session."""
    return str(import_module("ray._private.worker")._global_node.get_session_dir_path())


def log_directory() -> str:
    """Directory of the logs on this node; "Ray's session directory" while there is no connection."""
    node = import_module("ray._private.worker")._global_node
    return "Ray's session directory" if node is None else str(node.get_logs_dir_path())


def cluster_id(address: str) -> str | None:
    """Identity of the cluster whose head node's store is at host:port; None if it does not say within a second."""
    grpc, messages = import_module("grpc"), import_module("ray.core.generated.gcs_service_pb2")
    with import_module("ray._private.grpc_utils").init_grpc_channel(address) as channel:
        store = import_module("ray.core.generated.gcs_service_pb2_grpc").NodeInfoGcsServiceStub(channel)
        try:
            return str(store.GetClusterId(messages.GetClusterIdRequest(), timeout=1.0).cluster_id.hex())
        except grpc.RpcError:
            return None


def draining_nodes() -> dict[str, int]:
    """Nodes that are about to be taken away, by id, with their deadlines."""
    return dict(import_module("ray._private.state").state.get_draining_nodes())


def free_resources() -> dict[str, dict[str, float]]:
    """Resources that nobody uses at the moment, by node id."""
    return dict(import_module("ray._private.state").available_resources_per_node())


@contextmanager
def node_service(node: Mapping[str, Any]) -> Iterator[Any]:
    """The service (node_manager.proto) of the raylet of a node, one of `ray.nodes()`, while the block lasts."""
    from ray._common.network_utils import build_address
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    address = build_address(node["NodeManagerAddress"], node["NodeManagerPort"])
    channel = init_grpc_channel(address, options=GLOBAL_GRPC_OPTIONS)
    try:
        yield NodeManagerServiceStub(channel)
    finally:
        channel.close()


def resource_load(service: Any, timeout_s: float) -> Any:
    """Resources of a node, asked of its raylet: resources_total, resources_available, is_draining (grpc.RpcError)."""
    request = import_module("ray.core.generated.node_manager_pb2").GetResourceLoadRequest()
    return service.GetResourceLoad(request, timeout=timeout_s).resources


def prestart_workers(service: Any, job_id: str, runtime_env: str, count: int, keep_s: int, timeout_s: float) -> None:
    """Have a raylet start idle processes of a job and runtime environment (grpc.RpcError if it refuses)."""
    from ray.core.generated import common_pb2, node_manager_pb2

    request = node_manager_pb2.PrestartWorkersRequest(
        language=common_pb2.Language.PYTHON, job_id=bytes.fromhex(job_id), keep_alive_duration_secs=keep_s
    )
    request.num_workers = count
    request.runtime_env_info.serialized_runtime_env = runtime_env
    service.PrestartWorkers(request, timeout=timeout_s)


def placement_group_id(text: str) -> Any:
    return import_module("ray._raylet").PlacementGroupID.from_hex(text)


def on_this_node() -> dict[str, str]:
    """Label selector for an actor on the node of this process."""
    import ray

    return {import_module("ray._raylet").RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}


def setup_hook_variable() -> str:
    """Environment variable that names a function that a new process runs before all else."""
    return str(import_module("ray._private.ray_constants").WORKER_PROCESS_SETUP_HOOK_ENV_VAR)


def blocking_get_variable() -> str:
    """Environment variable that keeps Ray from warning of `ray.get` in asynchronous actors."""
    return str(import_module("ray._common.constants").RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR)


def put(key: str, value: bytes = b"1") -> None:
    """Set a key in the head node's store."""
    import_module("ray.experimental.internal_kv")._internal_kv_put(key.encode(), value, namespace=_KV_NAMESPACE)


def get(key: str) -> bytes | None:
    found = import_module("ray.experimental.internal_kv")._internal_kv_get
    return found(key.encode(), namespace=_KV_NAMESPACE)


def delete(key: str) -> None:
    import_module("ray.experimental.internal_kv")._internal_kv_del(key.encode(), namespace=_KV_NAMESPACE)


def find_address_function() -> Any:
    """The function by which Ray Train finds the address of a process group's store."""
    return import_module("ray.train._internal.utils").get_address_and_port


def is_preempted() -> bool:
    """Whether the controller has told this worker that a node is being taken away."""
    return import_module(f"{_EXECUTION}.context").get_train_context().preemption_context.preemption_info is not None


def uploaded_files(folder: Path) -> dict[Path, int] | None:
    """The files of a folder that a job's upload takes, with their bytes; None if this Ray does not say."""
    try:
        packaging = import_module("ray._private.runtime_env.packaging")
        found: list[Path] = []
        quiet = logging.getLogger(f"{__name__}.upload")
        quiet.setLevel(logging.ERROR)
        packaging._dir_travel(folder, [], found.append, include_gitignore=True, logger=quiet)
    except (ImportError, AttributeError, TypeError):
        return None
    return {path: path.stat().st_size for path in found if path.is_file()}
