"""Fixtures that several test files share.

A fixture that a test names as an argument is made before the test runs.

glyph_dir   folder with `glyphs.npz` (20 classes of 24 images) and `glyph_digits.npz` (10 classes
            of 24 images), usable as --data_dir. Made once per session and read by all tests: copy
            it before changing anything in it.
one_thread  the tests of a module compute in one thread, so that sums have the same order as in the
            processes that they start.
no_network  no host name resolves within the test, so whatever tries to download fails at once.
"""

import contextlib
import os
import socket

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side

import pytest
import torch

with contextlib.suppress(ImportError):  # the tests of a GPU do without it
    import hypothesis

    # The same examples in every run, none remembered: a failure here is one on every machine.
    profile = {"derandomize": True, "database": None, "deadline": None}
    hypothesis.settings.register_profile("repeatable", **profile)
    hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def glyph_dir(tmp_path_factory):
    import stress

    folder = tmp_path_factory.mktemp("glyph_data")
    stress.make_data(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_network(monkeypatch):
    def resolve_nothing(*args, **options):
        raise socket.gaierror("the tests have no network")

    monkeypatch.setattr(socket, "getaddrinfo", resolve_nothing)
