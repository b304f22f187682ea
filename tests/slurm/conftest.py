import pytest

from tests.helpers.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    """A Slurm of two nodes; its processes end with the tests."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    running = Cluster(tmp_path_factory.mktemp("slurm"))
    yield running
    running.stop()
