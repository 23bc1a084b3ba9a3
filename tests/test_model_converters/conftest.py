import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The maps here are tiny: waking a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
