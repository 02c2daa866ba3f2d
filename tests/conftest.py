import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The Triton kernels run on CPU tensors. Triton reads this when it decorates, so it comes before any import of it.
os.environ.setdefault("TRITON_INTERPRET", "1")

# One of several processes of tests has one core, and so have those that it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from contextlib import contextmanager

import pytest
import torch
from torch.utils._device import _device_constructors

OURS = ("ella", "ella_kernels")
TOGETHER = ("tests/distributed/", "tests/kernels/test_triton_compile.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests that share what takes minutes to make all in one worker: it is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return next(filter(nodeid.startswith, TOGETHER), nodeid)

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def poisoned():
    """Uninitialised memory of the packages is NaN: what should be written and is not, or is read before, shows.

    Other callers get what they asked for. So does a compiler: it traces the allocation, not its caller.
    """
    with poisoning():
        yield


@contextmanager
def poisoning():
    """:func:`poisoned` for other processes than pytest's."""
    # PyTorch remembers which functions torch.device("meta") acts on: the ones that are replaced here too.
    _device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            plain = getattr(torch, name)
            patch.setattr(torch, name, _poisoning(plain, plain))
        patch.setattr(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty, _traced_new_empty))
        yield


def _poisoning(plain, traced):
    def allocate(*args, **kwargs):
        if torch.compiler.is_compiling():
            return traced(*args, **kwargs)
        tensor = plain(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        # Fake tensors have no memory.
        if caller.partition(".")[0] in OURS and type(tensor) is torch.Tensor and tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    return allocate


def _traced_new_empty(like, *size, **kwargs):
    # A compiler that follows the replaced method finds a descriptor of C there, which it does not know.
    return torch.ops.aten.new_empty(like, size if isinstance(size[0], int) else size[0], **kwargs)
