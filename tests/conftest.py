"""What all tests share: where the real data are, how many examples a property is tried on."""

import os
import shutil
from pathlib import Path

import postgres as server
import pytest
from hypothesis import HealthCheck, settings

# Timing is never asserted: a loaded machine is no error.
settings.register_profile("test", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("soak", parent=settings.get_profile("test"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Side by side, a file's tests share one process and what they set up; notebooks and experiments are spread one by one."""
    from xdist.scheduler import LoadScopeScheduling

    class FilesAndNotebooks(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith(("test_notebooks.py", "test_experiments.py")) else file

    return FilesAndNotebooks(config, log)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, which `ECOMREC_DATA` names; a test that needs it is skipped without."""
    folder = os.environ.get("ECOMREC_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("ECOMREC_DATA does not name a folder with the real data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server of our own; a test that needs it is skipped where none is installed."""
    if reason := server.missing():
        pytest.skip(reason)
    running = server.Postgres()
    yield running
    running.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request, tmp_path):
    """An empty place for a store, on each database."""
    return tmp_path / "shop.db" if request.param == "sqlite" else request.getfixturevalue("postgres").database()


FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"


@pytest.fixture(scope="module")
def chromium():
    """The browser; a test that needs it is skipped where there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium here: `make system` installs it")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=FLAGS.split())
        yield opened
        opened.close()
