"""No dependency may be of a version that a stranger's file is known to harm."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    Requirement(text)
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in texts
]
# the last ones with a known advisory
AFFECTED = {"torch": "2.12.1", "torchvision": "0.28.0", "lightning": "2.6.5", "filelock": "4.2.0", "pillow": "12.3.0"}


@pytest.mark.parametrize("name", AFFECTED)
def test_versions_with_known_advisories_are_not_taken(name):
    found = [requirement for requirement in REQUIREMENTS if requirement.name == name]
    assert found and not any(requirement.specifier.contains(AFFECTED[name]) for requirement in found)
    assert all(requirement.specifier.contains(version(name)) for requirement in found)
