"""rankmamba: does Mamba rank documents as well as a Transformer, and what does it cost?"""

import os

# libgomp's spinning threads slow a shared machine up to 25-fold; it reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
