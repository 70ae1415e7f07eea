import pytest
import torch
from twins import save_twin

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """Folder of a tiny Open-Sora 1.2, CLIP and prompts."""
    return save_twin(tmp_path_factory.mktemp("twin"))
