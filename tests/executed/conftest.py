"""These tests compile kernels, which no process can that interprets: `test_executed.py` starts one for each file."""

import os

collect_ignore_glob = ["test_*.py"] if os.environ.get("TRITON_INTERPRET") == "1" else []
