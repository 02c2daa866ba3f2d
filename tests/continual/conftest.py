import pytest
import torch

from . import tiny


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """These models are too small to share; and sums keep their order in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return tiny.save_bert(tmp_path_factory.mktemp("bert"), seed=1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return tiny.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    return tiny.save_t5(tmp_path_factory.mktemp("t5"))
