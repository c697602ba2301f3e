"""The scripts are flat files in the repository's root; tests import them from there."""

import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread costs more than it brings
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which is not needed
import torch  # noqa: E402, F401
import pytest  # noqa: E402

@pytest.fixture(autouse=True)
def machine_as_it_was():
    """A run sets how this process computes."""
    yield
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.mkldnn.matmul.fp32_precision = "none"
