"""Work in a fork of the test's own process, which has everything imported; a fork may be killed at any moment."""

import faulthandler
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

import torch
from tqdm.std import tqdm


def fork(work: Callable[[], object], on_operation: Callable[[str, tuple], None] | None = None) -> int:
    """Run `work` in a fork and return its process id; the fork ends with 0, 130 after an interrupt, or 1 after printing why.

    on_operation(event, arguments): is told of everything that Python's audit hooks report there, file operations among them.
    """
    process = os.fork()
    if process:
        os.setpgid(process, process)  # a group, so that what it has started can be killed with it
        return process
    status = 1
    try:
        os.setpgid(0, 0)  # here too: whichever comes first, or a fork that kills its group early would kill the tests' own
        gc.freeze()  # what the parent left to be collected may wait for a thread to end, and no thread of the parent lives in a fork
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # its own is shared by forks, and one that is killed would keep it for all
        signal.alarm(120)  # a fork that waits for ever fails, and says before where it waits
        faulthandler.dump_traceback_later(110, file=sys.__stderr__)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if on_operation is not None:
            sys.addaudithook(on_operation)
        work()
        status = 0
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
