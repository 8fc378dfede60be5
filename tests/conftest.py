"""For every test: no network, no W&B, one torch thread, fixed seeds."""
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}

import random
import signal

import pytest

SEED = 1234
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:      # started in the background: tests of interrupts need theirs heard
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    import numpy
    import torch
    random.seed(SEED)
    numpy.random.seed(SEED)
    torch.manual_seed(SEED)
