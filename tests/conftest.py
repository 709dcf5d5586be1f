"""What every test starts from: no hub, no screen, none of the user's data, no spinning threads. Set before torch is imported."""

import atexit
import os
import shutil
import tempfile

HOME = tempfile.mkdtemp(prefix="rankmamba-tests-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)

os.environ.update(
    OMP_WAIT_POLICY="passive",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HOME=os.path.join(HOME, "huggingface"),
    IR_DATASETS_HOME=os.path.join(HOME, "ir_datasets"),
    IPYTHONDIR=os.path.join(HOME, "ipython"),
    MPLBACKEND="Agg",
)

import signal  # noqa: E402
import threading  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from tqdm.std import tqdm  # noqa: E402

# tqdm's own lock is shared by forks: one that is killed while it holds it would block every other, this process too
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread that could hold it at the moment of a fork

settings.register_profile("no deadline", deadline=None)  # a busy machine is no defect
settings.load_profile("no deadline")

FORKING = ("test_kill.py", "test_resume.py", "test_distributed.py")


def pytest_collection_modifyitems(items):
    """Tests that fork come first: a lock that another thread of the parent holds at that moment would be held for ever in the fork.

    `run.py test` gives --no-loadscope-reorder for that: pytest-xdist would begin with the largest files.
    """
    items.sort(key=lambda item: item.path.name not in FORKING)


@pytest.fixture(scope="module")
def one_thread():
    """Torch as the forks of a test run it: with another number of threads sums are rounded in another order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ctrl_c():
    """Python's own handler of Ctrl-C, whatever a shell in the background or an earlier test has put in its place."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
