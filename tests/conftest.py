"""Settings that all tests share, made before torch, FAISS or Ray are loaded, and inherited by what tests start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads cost more than they give
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads do not spin on a shared machine
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # test helpers that both rooms use
