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

@pytest.fixture
def group():
    """A process group of this process alone."""
    dist = pytest.importorskip("torch.distributed", reason="this torch is built without it")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()

@pytest.fixture(autouse=True)
def machine_as_it_was():
    """A run sets how this process computes."""
    yield
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.mkldnn.matmul.fp32_precision = "none"
