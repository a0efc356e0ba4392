"""Fixtures of the tests of launch/ (a pytest plugin): a cloud, and a pod that is set up."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_gcloud.cloud import Cloud
from launched import CPU, Place, copy_checkout, copy_of, set_up_pod


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def bare(tmp_path: Path, checkout: Path) -> Iterator[Place]:
    """A cloud without a TPU."""
    place = Place(tmp_path / "place", checkout)
    Cloud.make(place.cloud.folder, CPU)
    yield place
    place.close()


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("template") / "place", checkout)
    assert "8 devices (cpu), 4 on this worker" in set_up_pod(place)
    yield place
    place.close()


@pytest.fixture
def pod(template: Place, tmp_path: Path) -> Iterator[Place]:
    """A spot pod of two workers that is set up."""
    place = copy_of(template, tmp_path / "place")
    yield place
    place.close()
