"""The public surface is one screen, and each name of it is there."""

import inspect
import re
import subprocess
import sys
from typing import get_origin, get_type_hints

import pytest

import abtrain
from abtrain import ABTraining, recipes
from abtrain.comm.communicator import SingleProcess
from tests.faults.loops import Loop


def test_every_public_name_resolves() -> None:
    assert len(abtrain.__all__) <= 24
    for name in abtrain.__all__:
        assert getattr(abtrain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = abtrain.missing


def test_the_package_lists_its_public_names_and_no_others() -> None:
    assert dir(abtrain) == sorted(abtrain.__all__)


def test_public_modules_need_no_further_import() -> None:
    code = "import abtrain; print(abtrain.checkpoint.save.__name__, abtrain.errors.UsageError.__name__)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["save", "UsageError"]


def test_the_package_alone_does_not_import_torch() -> None:
    code = "import sys, abtrain, abtrain.commands.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_attributes_have_the_types_that_the_api_page_shows() -> None:
    """The page takes them from the class: tuples that `__init__` assigns would give all names the first one's type."""
    ab, hints = Loop(SingleProcess(), recipes.ddp(1)).ab, get_type_hints(ABTraining)
    listed = (inspect.getdoc(ABTraining) or "").split("Attributes:")[1].split("Raises:")[0]
    names = re.findall(r"^    (\w+): ", listed, re.MULTILINE)
    assert len(names) == 4
    for name in names:
        assert name in ABTraining.__annotations__
        assert isinstance(getattr(ab, name), get_origin(hints[name]) or hints[name])
