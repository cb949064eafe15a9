"""The check of a GPU, on devices that are faked in one respect each; and which errors a device is blamed for."""

import pickle
import threading
from types import SimpleNamespace

import pytest
import torch

from areal_ray.cluster.bad_devices import BadDevice, DeviceName
from areal_ray.cluster.failures import annotate, root_cause
from areal_ray.distributed import RankError
from areal_ray.worker import device_check
from areal_ray.worker.device_check import CudaDevice, blame, check
from areal_ray.worker.nvml import Unknown, open_health

pytestmark = pytest.mark.unit

NAME = DeviceName("host-7", "ab12", 3, "GPU-1234", "00000000:1B:00.0")


class Health(Unknown):
    def __init__(self, problems=(), xids=()):
        self._problems, self._xids = list(problems), list(xids)

    def problems(self):
        return self._problems

    def xids(self):
        return self._xids


class FakeDevice:
    """Computes on the CPU, and counts calls; `spoil` changes what a call returns, or raises."""

    def __init__(self, health=None, **spoil):
        self._health, self._spoil, self.calls, self.threads = health or Unknown(), spoil, [], set()

    def _call(self, name, value):
        self.calls.append(name)
        self.threads.add(threading.get_ident())
        return self._spoil[name](value) if name in self._spoil else value

    def select(self):
        self._call("select", None)

    def upload(self, tensor):
        return self._call("upload", tensor.clone())

    def product(self, left, right):
        return self._call("product", left @ right)

    def download(self, tensor):
        return self._call("download", tensor.clone())

    def release(self):
        self._call("release", None)

    def health(self):
        return self._health

    def name(self):
        return NAME


def raising(error):
    def spoil(_):
        raise error

    return spoil


def one_bit(tensor):
    tensor.view(torch.int32).view(-1)[12345] ^= 1 << 20
    return tensor


def test_a_device_that_computes_right_passes_in_a_thread_of_its_own_that_selects_it_first():
    device = FakeDevice()
    check(device)
    assert device.calls[0] == "select"
    assert device.calls[-1] == "release"
    assert device.calls.count("product") == 2
    assert threading.get_ident() not in device.threads


def test_on_a_cpu_worker_nothing_happens(monkeypatch):
    monkeypatch.setattr(device_check.threading, "Thread", None)
    check(None)
    error = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    assert blame(None, error) is error


ECC = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nSearch for ...")


@pytest.mark.parametrize(
    ("device", "problem"),
    [
        (FakeDevice(download=one_bit), "1 of 16777216 words came back changed"),
        (FakeDevice(product=one_bit), "1 of 4194304 elements of a matrix product are wrong"),
        (FakeDevice(product=raising(ECC)), "the check failed: AcceleratorError: CUDA error: uncorrectable ECC"),
        (FakeDevice(select=raising(torch.AcceleratorError("CUDA error: unknown error"))), "unknown error"),
        (FakeDevice(product=raising(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))), "EXECUTION_FAILED"),
        (FakeDevice(select=raising(RuntimeError("No CUDA GPUs are available"))), "No CUDA GPUs are available"),
        (FakeDevice(select=raising(RuntimeError("CUDA unknown error - this may be due to"))), "CUDA unknown error"),
        (FakeDevice(Health(["2 uncorrected ECC errors", "a row"])), "2 uncorrected ECC errors; a row"),
    ],
)
def test_a_bad_device_is_named_with_what_is_wrong(device, problem):
    with pytest.raises(BadDevice) as caught:
        check(device)
    arrived = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert problem in str(arrived)
    assert str(arrived).startswith("GPU 3 (GPU-1234, PCI 00000000:1B:00.0) of host-7, in Ray ab12: ")
    assert arrived.device == NAME


def test_a_result_that_is_wrong_the_second_time_only_is_found():
    results = iter([lambda tensor: tensor, one_bit])
    with pytest.raises(BadDevice, match="matrix product"):
        check(FakeDevice(product=lambda tensor: next(results)(tensor)))


def test_a_device_that_does_not_answer_is_bad():
    never = threading.Event()
    with pytest.raises(BadDevice, match=r"the check has not ended in 0 s"):
        check(FakeDevice(select=lambda _: never.wait(30)), limit_s=0.05)
    never.set()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate"),
        RuntimeError("CUDA driver version is insufficient for CUDA runtime version"),
    ],
)
def test_what_is_not_the_devices_fault_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught:
        check(FakeDevice(upload=raising(error)))
    assert caught.value is error


def seen(error):
    try:
        raise error
    except type(error) as caught:
        annotate(caught, 6)
        return caught


@pytest.mark.parametrize(
    ("text", "health"),
    [
        ("CUDA error: uncorrectable ECC error encountered", Health()),
        ("CUDA error: uncorrectable NVLink error detected during the execution", Health()),
        ("GPU has fallen: Xid (PCI:0000:1b:00): 79", Health()),
        ("CUDA error: unspecified launch failure", Health(xids=[13, 95])),
        ("CUDA error: an illegal memory access was encountered", Health(["1 uncorrected ECC errors"])),
    ],
)
def test_the_hardware_is_blamed_if_the_error_or_the_driver_says_so(text, health):
    error = seen(torch.AcceleratorError(text))
    bad = blame(FakeDevice(health), error)
    assert isinstance(bad, BadDevice)
    assert text in bad.problem
    assert (bad.__notes__, bad.areal_ray["step"]) == (error.__notes__, 6)
    assert "Xid 13" not in bad.problem


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: unspecified launch failure"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("Xid (PCI:0000:1b:00): 13, pid=790"),
        RuntimeError("uncorrectable ECC error"),
        ValueError("Xid 79"),
    ],
)
def test_the_code_is_blamed_else(error):
    assert blame(FakeDevice(Health(xids=[13, 31, 43])), seen(error)) is error


def test_an_error_that_the_ranks_have_agreed_on_is_looked_through():
    error = RankError([(1, "AcceleratorError: ECC", ["AcceleratorError"])])
    error.__cause__ = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    assert isinstance(blame(FakeDevice(), seen(error)), BadDevice)


def test_a_bad_device_is_the_root_cause_whatever_else_is_wrong():
    bad = BadDevice(NAME, "it does not answer")
    cause = root_cause({0: seen(ValueError("x")), 1: seen(bad), 2: seen(RuntimeError("Connection reset"))})
    assert (cause.rank, cause.kind, cause.infrastructure) == (1, "BadDevice", True)


class NotSupported(Exception):
    pass


def nvml(**answers):
    """The module pynvml of a device that supports what is given."""

    def unsupported(*_):
        raise NotSupported

    functions = ("GetIndex", "GetPciInfo", "GetTotalEccErrors", "GetRemappedRows", "GetRetiredPagesPendingStatus")
    module = {f"nvmlDevice{name}": unsupported for name in (*functions, "RegisterEvents")}
    constants = dict.fromkeys(
        ("NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "NVML_VOLATILE_ECC", "nvmlEventTypeXidCriticalError"), 8
    )
    plain = {"nvmlInit": lambda: None, "nvmlDeviceGetHandleByUUID": lambda uuid: uuid, "nvmlEventSetCreate": object}
    wait = {"nvmlEventSetWait_v2": unsupported, "NVMLError": NotSupported}
    return SimpleNamespace(**{**module, **constants, **plain, **wait, **answers})


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ({"nvmlDeviceGetTotalEccErrors": lambda *_: 3}, "3 uncorrected ECC errors"),
        ({"nvmlDeviceGetRemappedRows": lambda _: (0, 1, 1, 0)}, "waits to be remapped"),
        ({"nvmlDeviceGetRemappedRows": lambda _: (0, 1, 0, 1)}, "could not be remapped"),
        ({"nvmlDeviceGetRetiredPagesPendingStatus": lambda _: 1}, "waits to be retired"),
    ],
)
def test_the_driver_s_counters_are_read(answers, problem):
    (found,) = open_health("GPU-1", lambda _: nvml(**answers)).problems()
    assert problem in found


def test_a_device_without_fault_or_without_counters_has_no_problem():
    good = nvml(nvmlDeviceGetTotalEccErrors=lambda *_: 0, nvmlDeviceGetRemappedRows=lambda _: (4, 2, 0, 0))
    for module in (good, nvml()):
        health = open_health("GPU-1", lambda _, module=module: module)
        assert (health.problems(), health.xids()) == ([], [])


def test_xid_errors_come_as_events():
    events = [SimpleNamespace(eventData=13), SimpleNamespace(eventData=79)]

    def wait(_set, milliseconds):
        assert milliseconds == 0
        if not events:
            raise NotSupported
        return events.pop(0)

    module = nvml(nvmlDeviceRegisterEvents=lambda *_: None, nvmlEventSetWait_v2=wait)
    assert open_health("GPU-1", lambda _: module).xids() == [13, 79]


def test_without_nvml_or_for_a_device_that_it_does_not_know_nothing_is_known():
    assert isinstance(open_health("GPU-1", raising(ImportError("pynvml"))), Unknown)
    assert isinstance(open_health("GPU-1", lambda _: nvml(nvmlInit=lambda: raising(NotSupported())(0))), Unknown)


def test_the_device_that_ray_has_set_is_checked_and_selected_in_the_thread(monkeypatch):
    calls = []
    fakes = {
        "set_device": lambda index: calls.append(("set_device", index, threading.current_thread().name)),
        "get_device_properties": lambda index: SimpleNamespace(uuid=f"uuid-of-{index}"),
        "synchronize": lambda index: calls.append(("synchronize", index)),
        "empty_cache": lambda: calls.append(("empty_cache",)),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    device = CudaDevice(5, lambda: ("host-7", "ab12"), lambda uuid: Health([f"{uuid} is bad"]))
    monkeypatch.setattr(device, "upload", lambda tensor: tensor)
    with pytest.raises(BadDevice, match=r"GPU 5 .GPU-uuid-of-5.*GPU-uuid-of-5 is bad"):
        check(device)
    assert calls == [("set_device", 5, "device check"), ("empty_cache",)]
