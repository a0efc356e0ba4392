"""Fixtures of the tests of launch/gpu_*.sh (a pytest plugin): servers, and a job for one."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpu_host import GCLOUD, Job, Server, executable, running_server


@pytest.fixture(scope="session")
def tools() -> None:
    """sshd, rsync and shellcheck. CI must have them; elsewhere a test without them is skipped."""
    os.environ["PATH"] += ":/usr/sbin"
    missing = [name for name in ("sshd", "rsync", "shellcheck") if not shutil.which(name)]
    if missing:
        report = pytest.fail if os.environ.get("MEMPHIS_CI") else pytest.skip
        report(f"needs {' '.join(missing)}: apt-get install openssh-server rsync shellcheck")


@pytest.fixture(scope="session")
def server(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("sshd"), os.environ["PATH"]) as it:
        yield it


@pytest.fixture(scope="session")
def bare_server(tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A host without rsync, with the stand-in for gcloud; its `path` serves for this side too."""
    folder, programs = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("bin")
    names = """awk basename bash cat chmod cp cut df dirname du env find flock grep head id mkdir
        mktemp mv rm sed setsid sh sha256sum sleep sort ssh tail tar tee touch tr true wc xargs"""
    for name in names.split():
        target = shutil.which(name)
        assert target, name
        (programs / name).symlink_to(target)
    executable(programs / "gcloud", GCLOUD)
    with running_server(folder, str(programs)) as it:
        yield it


@pytest.fixture
def job(tmp_path: Path, server: Server) -> Job:
    return Job(tmp_path, server)
