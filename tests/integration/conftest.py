import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # test helpers beside the tests


@pytest.fixture(scope="module")
def small_ray() -> Iterator[None]:
    """A Ray of two CPUs in this process, for the tests of a file."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    yield
    ray.shutdown()
