"""Settings of every test process.

Under pytest-xdist each worker gets one thread: several workers with a thread pool each would wait for one another
at every parallel region. Nothing is fetched from a hub, ever.
"""

import os

if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see search/console/waiting.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
