"""Small products on a busy machine wait longer for a second thread than they take."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(reproducible):
    """``reproducible`` puts the session's number of threads back."""
    torch.set_num_threads(1)
