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

from hypothesis import settings  # noqa: E402

settings.register_profile("no deadline", deadline=None)  # a busy machine is no defect
settings.load_profile("no deadline")
