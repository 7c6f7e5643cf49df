"""The public surface is one screen, and each name of it is there."""

import subprocess
import sys

import pytest

import abtrain


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
