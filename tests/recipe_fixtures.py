"""Every data set of the recipes in every form, once for a file of tests (a pytest plugin)."""

from pathlib import Path

import pytest
from hub_fixtures import DATA_SETS, write
from recipe_rows import FORMS


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every data set in every form, as FORM/OWNER/NAME."""
    root = tmp_path_factory.mktemp("mirror")
    for name, form in FORMS:
        data = DATA_SETS[name]
        write(root / form / data.repo, data.rows(), form, data.schema)
    return root
