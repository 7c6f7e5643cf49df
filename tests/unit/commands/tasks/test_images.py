"""The paper's data in small folders of the real formats."""

from __future__ import annotations

import hashlib
import itertools
import logging
import pickle
from pathlib import Path

import pytest
import torch

from abtrain.commands.tasks.datasets import Data, Split
from abtrain.commands.tasks.evaluation import evaluate
from abtrain.commands.tasks.images import Images, find_cifar, load_cifar, load_imagenet
from abtrain.commands.tasks.samples import Reading
from abtrain.commands.tasks.task import TASKS, batches, shift_by_four
from abtrain.errors import DataError

pytest.importorskip("torchvision")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

CLASSES = ("n01440764", "n01443537", "n01484850")
PER_CLASS = 2


def write_imagenet(folder: Path) -> None:
    numbers = np.random.default_rng(0)
    for part, name, i in itertools.product(("train", "val"), CLASSES, range(PER_CLASS)):
        place = folder / part / name
        place.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 255, (40 + 10 * i, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{name}_{i}.JPEG")


def write_cifar(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, per_file: int = 8) -> Path:
    """CIFAR's own files with random pixels; their digests take the place of the published ones."""
    import torchvision.datasets

    kind = getattr(torchvision.datasets, name)
    place = folder / kind.base_folder
    place.mkdir(parents=True)
    key = "labels" if name == "CIFAR10" else "fine_labels"
    classes = 10 if name == "CIFAR10" else 100
    numbers = np.random.default_rng(0)

    def written(file: str, content: object) -> list[str]:
        raw = pickle.dumps(content)
        (place / file).write_bytes(raw)
        return [file, hashlib.md5(raw).hexdigest()]

    def batch(file: str) -> list[str]:
        pixels = numbers.integers(0, 255, (per_file, 3072), dtype=np.uint8)
        return written(file, {"data": pixels, key: numbers.integers(0, classes, per_file).tolist()})

    monkeypatch.setattr(kind, "train_list", [batch(file) for file, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [batch(file) for file, _ in kind.test_list])
    file, digest = written(kind.meta["filename"], {kind.meta["key"]: [str(i) for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": file, "md5": digest})
    return place


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    write_imagenet(tmp_path)
    return tmp_path


def drawn(data: Data, loaders: int, start: int = 0, count: int = 3) -> list[torch.Tensor]:
    read = data.read_by(Reading(loaders=loaders))
    task = TASKS["imagenet-resnet50"]
    stream = batches(task, read, seed=0, rank=0, world_size=1, batch_size=2, start=start)
    return [x for x, _ in itertools.islice(stream, count)]


def test_imagenet_from_its_folders(imagenet: Path) -> None:
    data = load_imagenet(imagenet, classes=3)
    assert len(data.train) == len(data.test) == 6
    x, y = next(data.test.in_order(4))
    assert x.shape == (4, 3, 224, 224) and x.dtype == torch.uint8 and y.tolist() == [0, 0, 1, 1]
    stream = batches(TASKS["imagenet-vit-b16"], data, seed=0, rank=0, world_size=1, batch_size=3)
    x, y = next(stream)
    assert x.shape == (3, 3, 224, 224) and x.dtype == torch.float32 and abs(float(x.mean())) < 2


def test_a_batch_depends_on_its_step_alone_and_not_on_who_reads(imagenet: Path) -> None:
    data = load_imagenet(imagenet, classes=3)
    state = torch.random.get_rng_state()
    alone = drawn(data, loaders=0, count=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    for x, again in zip(alone, drawn(data, loaders=2, count=5), strict=True):
        assert torch.equal(x, again)
    assert torch.equal(drawn(data, loaders=0, start=4, count=1)[0], alone[4])
    assert not torch.equal(alone[0], alone[3])  # the same epoch's order would repeat after three steps


def test_an_image_that_cannot_be_read_is_named(imagenet: Path) -> None:
    bad = imagenet / "train" / CLASSES[1] / f"{CLASSES[1]}_0.JPEG"
    bad.write_bytes(b"no image")
    data = load_imagenet(imagenet, classes=3)
    for loaders in (0, 1):
        with pytest.raises(DataError, match=rf"{bad.name} cannot be read as an image.*--on-bad-image skip"):
            drawn(data, loaders)


def test_an_image_that_cannot_be_read_may_be_passed_over(imagenet: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = imagenet / "val" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])  # torn
    data = load_imagenet(imagenet, classes=3).read_by(Reading(on_bad_image="skip"))
    with caplog.at_level(logging.WARNING, logger="abtrain"):
        for _ in range(2):
            labels = [y for _, batch in data.test.in_order(4) for y in batch.tolist()]
    assert labels == [0, 1, 1, 1, 2, 2]
    assert [record.message.split()[7] for record in caplog.records] == [str(bad)] * 2


@pytest.mark.parametrize("loaders", [0, 2])
def test_a_worker_reads_only_its_own_part_of_the_test_set(loaders: int, imagenet: Path) -> None:
    data = load_imagenet(imagenet, classes=3).read_by(Reading(loaders=loaders))
    whole = [batch for batch, _ in data.test.in_order(1)]
    # The images of worker 0's part cannot be read.
    for file in sorted((imagenet / "val").rglob("*.JPEG"))[::2]:
        file.write_bytes(b"no image")
    mine = [batch for batch, _ in data.test.in_order(1, part=1, parts=2)]
    assert len(mine) == 3 and all(map(torch.equal, mine, whole[1::2]))
    with pytest.raises(DataError, match="cannot be read as an image"):
        next(data.test.in_order(1, part=0, parts=2))


def test_nothing_but_bad_images_ends(tmp_path: Path) -> None:
    (tmp_path / "a.JPEG").write_bytes(b"")
    images = Images(((str(tmp_path / "a.JPEG"), 0),), random=False, reading=Reading(on_bad_image="skip"))
    with pytest.raises(DataError, match="100 consecutive images cannot be read"):
        next(images.in_order(1))


def test_imagenet_that_is_missing_or_incomplete(imagenet: Path) -> None:
    with pytest.raises(DataError, match="--data FOLDER"):
        load_imagenet(None)
    with pytest.raises(DataError, match=r"nowhere/train cannot be read"):
        load_imagenet(imagenet / "nowhere")
    with pytest.raises(DataError, match="has 3 classes instead of 1,000"):
        load_imagenet(imagenet)
    for file in (imagenet / "train" / CLASSES[2]).iterdir():
        file.unlink()
    with pytest.raises(DataError, match=f"train is incomplete.*{CLASSES[2]}"):
        load_imagenet(imagenet, classes=3)
    (imagenet / "val" / CLASSES[2]).rename(imagenet / "val" / "other")
    with pytest.raises(DataError, match="train and val differ in 2 classes"):
        load_imagenet(imagenet, classes=3)


@pytest.mark.parametrize(("name", "files"), [("CIFAR10", 5), ("CIFAR100", 1)])
def test_cifar_in_its_authors_files(name: str, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, name, monkeypatch)
    data = load_cifar(tmp_path, name)
    assert isinstance(data.train, Split) and isinstance(data.test, Split)
    assert data.train.x.shape == (8 * files, 3, 32, 32) and data.train.x.dtype == torch.uint8
    assert len(data.test) == 8 and data.test.y.dtype == torch.int64


def test_cifar_that_is_missing_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="--data FOLDER with cifar-10-batches-py"):
        find_cifar(None, "CIFAR10")
    with pytest.raises(DataError, match=r"cifar-10-batches-py lacks data_batch_1, "):
        find_cifar(tmp_path, "CIFAR10")
    place = write_cifar(tmp_path, "CIFAR10", monkeypatch)
    raw = (place / "data_batch_3").read_bytes()
    (place / "data_batch_3").write_bytes(raw[:-1] + b"x")
    with pytest.raises(DataError, match=r"differ from the published ones \(data_batch_3\)"):
        find_cifar(tmp_path, "CIFAR10")
    (place / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_3:"):
        find_cifar(tmp_path, "CIFAR10")


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchvision.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'abtrain\[vision\]'"):
        find_cifar(tmp_path, "CIFAR10")


def test_shift_by_four_moves_colour_images() -> None:
    images = torch.zeros(200, 3, 12, 12, dtype=torch.uint8)
    images[:, 1, 6, 6] = 9
    moved = shift_by_four(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    _, channels, rows, _ = moved.nonzero(as_tuple=True)
    assert set(channels.tolist()) == {1} and set(rows.tolist()) == set(range(2, 11))


def test_evaluate_reads_files(imagenet: Path) -> None:
    data = load_imagenet(imagenet, classes=3)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    scores = evaluate(model, TASKS["imagenet-resnet50"], data, batch_size=4)
    assert scores["top1"] is not None and 0 <= scores["top1"] <= 100
