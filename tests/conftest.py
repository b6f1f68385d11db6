"""What holds for every test: torch's own threads only get in each other's way here, twenty times slower."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
