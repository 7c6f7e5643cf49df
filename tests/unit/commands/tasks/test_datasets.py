import gzip
import sysconfig
from pathlib import Path

import pytest
import torch

from abtrain.commands.tasks import datasets as data
from abtrain.commands.tasks.datasets import (
    DEBIAN_FASHION_MNIST,
    PYSRC_FILES,
    Split,
    load_digits,
    load_fashion_mnist,
    load_pysrc,
)
from abtrain.errors import DataError

needs_fashion_mnist = pytest.mark.skipif(
    not DEBIAN_FASHION_MNIST.is_dir(), reason="Fashion-MNIST is not installed: `apt install dataset-fashion-mnist`"
)


def idx(values: list[int], *shape: int, kind: int = 8) -> bytes:
    header = bytes((0, 0, kind, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape)
    return header + bytes(values)


def write_fashion(folder: Path, images: int = 2, size: int = 28, label: int = 9) -> None:
    for part in ("train", "t10k"):
        content = idx([7] * (images * size * size), images, size, size)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(content)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx([label] * images, images)))


def test_digits_are_split_without_overlap_and_evenly() -> None:
    digits = load_digits(None)
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.train.x.shape == (1437, 64) and digits.train.x.dtype == torch.float32
    assert digits.train.x.min() >= 0 and digits.train.x.max() == 1
    counts = digits.test.y.bincount(minlength=10)
    assert counts.min() >= 34 and counts.max() <= 38


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'abtrain\[data\]'"):
        load_digits(None)


@needs_fashion_mnist
def test_fashion_mnist_from_debian() -> None:
    fashion = load_fashion_mnist(None)
    assert fashion.train.x.shape == (60_000, 1, 28, 28) and fashion.test.x.shape == (10_000, 1, 28, 28)
    assert fashion.train.x.dtype == torch.uint8
    assert fashion.test.y.bincount().tolist() == [1000] * 10


def test_fashion_mnist_from_a_folder_plain_or_gzipped(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    fashion = load_fashion_mnist(tmp_path)
    assert fashion.train.x.shape == (2, 1, 28, 28) and fashion.test.y.tolist() == [9, 9]


def test_fashion_mnist_folder_that_is_missing_or_incomplete(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a folder.*apt install dataset-fashion-mnist"):
        load_fashion_mnist(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be read"):
        load_fashion_mnist(tmp_path / ("x" * 300))
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte"):
        load_fashion_mnist(tmp_path)


@pytest.mark.parametrize("wrong", [{"size": 27}, {"label": 10}])
def test_other_data_under_fashion_mnists_names(tmp_path: Path, wrong: dict[str, int]) -> None:
    write_fashion(tmp_path, **wrong)
    with pytest.raises(DataError, match="Fashion-MNIST has"):
        load_fashion_mnist(tmp_path)


def test_fashion_mnist_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(root: str, download: bool) -> None:
        calls.append(root)
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        write_fashion(raw)

    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", download)
    for _ in range(2):
        assert len(load_fashion_mnist(None).train) == 2
    assert len(calls) == 1
    assert [entry.name for entry in (tmp_path / "cache" / "abtrain").iterdir()] == ["fashion-mnist"]


def test_fashion_mnist_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(root: str, download: bool) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", download)
    with pytest.raises(DataError, match=r"no network.*apt install"):
        load_fashion_mnist(None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx([1, 2, 3, 4], 2, 2)[:-1], "contains 3 values, but its header says 4"),
        (idx([1, 2, 3, 4], 2, 2) + b"x", "contains 5 values, but its header says 4"),
        (idx([1, 2, 3, 4], 4), "are 00000801 instead of 00000802"),
        (idx([1, 2, 3, 4], 2, 2, kind=13), "are 00000d02 instead of 00000802"),
        (idx([], 0, 2), "contains 0 values"),
        (b"", "are missing instead of"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.read_idx(path, dimensions=2)


def test_damaged_gzip_files(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    for content in (b"not gzip", gzip.compress(idx([1] * 100, 100))[:-9]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            data.read_idx(path, dimensions=1)


def test_pysrc_is_there_and_its_targets_are_the_next_bytes() -> None:
    assert len(PYSRC_FILES) == len(set(PYSRC_FILES)) >= 150 and sorted(PYSRC_FILES) == PYSRC_FILES
    library = Path(sysconfig.get_path("stdlib"))
    assert all((library / name).is_file() for name in PYSRC_FILES)
    pysrc = load_pysrc(None)
    assert len(pysrc.train) > 30_000 and len(pysrc.test) > 1_000
    for split in (pysrc.train, pysrc.test):
        x, y = split.x.flatten(), split.y.flatten()
        assert torch.equal(x[1:], y[:-1])
    first = (library / PYSRC_FILES[0]).read_bytes()[:128]
    assert bytes(pysrc.train.x[0].tolist()) == first


def test_pysrc_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "abc.py").write_text("")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=f"lacks {len(PYSRC_FILES) - 1} of {len(PYSRC_FILES)} .* argparse.py"):
        load_pysrc(None)


def test_a_split_pairs_samples_and_targets() -> None:
    with pytest.raises(DataError, match="3 inputs have 2 targets"):
        Split(torch.zeros(3), torch.zeros(2))
    x, y = Split(torch.arange(3), torch.arange(3) + 1)[1]
    assert (int(x), int(y)) == (1, 2)
