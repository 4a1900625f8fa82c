import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Thousands of tiny products: waiting for a second thread would take longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
