"""What must be seen on a GPU: correctness of every kernel, ceilings of the device, timings.

``python -m tools.gpu_check`` from the repository's root needs torch and a built (or buildable)
libmqc_cuda.so, nothing else. Every part runs in a process of its own with a time limit, so that a
fault or a hang in one leaves the others; results go to one JSON file and a table.
"""

from pathlib import Path

import mqc

ROOT = Path(__file__).resolve().parents[2]

# In a checkout that is not installed, mqc.cuda and the like are folders beside mqc.
if str(ROOT) not in mqc.__path__:
    mqc.__path__.append(str(ROOT))
