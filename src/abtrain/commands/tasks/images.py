"""Loads the image data of the paper: CIFAR into memory, and ImageNet from its files during training.

- CIFAR-10 and CIFAR-100 are in the authors' file format, which torchvision reads and verifies.
- ImageNet-2012 has one folder per class, `train/CLASS/*.JPEG` and `val/CLASS/*.JPEG`.
"""

from __future__ import annotations

import hashlib
import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from abtrain.commands.process import PASSED_ON, SIGNALS
from abtrain.commands.tasks.samples import Data, Reading, Samples, Split
from abtrain.errors import DataError

log = logging.getLogger("abtrain")

SIDE = 224
"""The width and height of an ImageNet sample in pixels."""
IMAGENET_CLASSES = 1000
_RESIZED = 256
_MOST_IN_A_ROW = 100
_PREFETCHED = 4
_OUTLASTS_SECONDS = 60  # longer than launchers give their workers to save


class Bad(NamedTuple):
    """An error message about an unreadable image. It is returned because an exception would lose the file's name."""

    message: str


@dataclass(frozen=True)
class Images(Samples):
    """Images that are read from their files in each epoch, for data sets that do not fit into memory.

    Samples are uint8 (3, 224, 224). Training samples are random crops, resized and possibly mirrored. Test samples are
    the centers of images. The random numbers for a sample depend only on seed, worker, step and index in the batch.
    """

    files: tuple[tuple[str, int], ...]
    random: bool
    reading: Reading = field(default_factory=Reading)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, tuple[str, ...]] | Bad:
        """Returns an image, its label, and messages about skipped files; `Bad` if reading fails.

        `key` is the index of the image, and the seed of its random crop.
        """
        index, draw = key
        skipped: list[str] = []
        for step in range(_MOST_IN_A_ROW):
            path, label = self.files[(index + step) % len(self.files)]
            try:
                return _sample(path, draw if self.random else None), label, tuple(skipped)
            except (OSError, ValueError, SyntaxError) as error:
                if self.reading.on_bad_image == "stop":
                    return Bad(
                        f"{path} cannot be read as an image: {error}. Replace it, or skip such files with "
                        "--on-bad-image skip"
                    )
                skipped.append(f"{path} ({error})")
        return Bad(
            f"{_MOST_IN_A_ROW} consecutive images cannot be read, the last of them {skipped[-1]}: check the folder "
            "that --data names"
        )

    def to(self, device: torch.device) -> Images:
        return replace(self, device=device)

    def read_by(self, reading: Reading) -> Images:
        return replace(self, reading=reading)

    def stream(self, plan: Iterator[tuple[int, list[int]]], seed: int, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
        keys = ([(i, _draw(seed, rank, step, place)) for place, i in enumerate(of)] for step, of in plan)
        return self._load(keys)

    def in_order(self, batch_size: int, part: int = 0, parts: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        starts = range(part * batch_size, len(self), parts * batch_size)
        return self._load([(i, 0) for i in range(start, min(start + batch_size, len(self)))] for start in starts)

    def _load(self, keys: Iterator[list[tuple[int, int]]]) -> Iterator[tuple[Tensor, Tensor]]:
        loaders = self.reading.loaders
        loader: DataLoader[Any] = DataLoader(
            self,
            batch_sampler=keys,
            num_workers=loaders,
            collate_fn=_collate,
            worker_init_fn=_outlast_requests if loaders else None,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=_PREFETCHED if loaders else None,
            # Without a generator the loader would draw from torch's global one, which would change the model's dropout.
            generator=torch.Generator(),
        )
        logged: set[str] = set()
        for x, y, notes in loader:
            for note in notes:
                if isinstance(note, Bad):
                    raise DataError(note.message)
                if note not in logged:
                    log.warning("skipped an image that cannot be read: %s", note)
                    logged.add(note)
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


def _outlast_requests(loader: int) -> None:
    """Keeps a loader process alive after a request to stop, until its worker has had time to save.

    A scheduler may send the request to all processes of a run, including loader processes.
    """
    for number in (*SIGNALS, PASSED_ON):
        signal.signal(number, lambda number, frame: signal.alarm(_OUTLASTS_SECONDS))


def _collate(samples: Sequence[Any]) -> tuple[Tensor, Tensor, list[Any]]:
    bad = [sample for sample in samples if isinstance(sample, Bad)]
    if bad:
        return torch.empty(0), torch.empty(0), bad[:1]
    notes = [note for _, _, skipped in samples for note in skipped]
    return torch.stack([x for x, _, _ in samples]), torch.tensor([y for _, y, _ in samples]), notes


def _draw(seed: int, rank: int, step: int, place: int) -> int:
    """Returns the seed of the random numbers for one sample."""
    digest = hashlib.blake2b(f"{seed}/{rank}/{step}/{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _sample(path: str, draw: int | None) -> Tensor:
    """Reads an image as uint8 (3, 224, 224): a random crop with the seed `draw`, or the center if it is None."""
    from PIL import Image
    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms import functional as VF

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if draw is None:
        image = VF.center_crop(VF.resize(image, _RESIZED), SIDE)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw)
            image = RandomResizedCrop(SIDE)(image)
            image = VF.hflip(image) if torch.rand(()) < 0.5 else image
    sample: Tensor = VF.pil_to_tensor(image)
    return sample


def find_imagenet(folder: Path | None, classes: int = IMAGENET_CLASSES) -> Path:
    """Checks that `folder` contains `train` and `val` with all classes. Returns `folder`.

    Args:
        folder: the folder that --data names.
        classes: the expected number of classes.

    Raises:
        DataError: `folder` is None or cannot be read, or the classes in it are not the expected ones.
    """
    how = f"pass --data FOLDER with train/CLASS/*.JPEG and val/CLASS/*.JPEG of ImageNet-2012, {classes:,} classes"
    if folder is None:
        raise DataError(f"ImageNet has no default folder: {how}")
    names = {}
    for part in ("train", "val"):
        try:
            names[part] = {entry.name for entry in (folder / part).iterdir() if entry.is_dir()}
        except OSError as error:
            raise DataError(f"{folder / part} cannot be read ({error}): {how}") from error
        if len(names[part]) != classes:
            raise DataError(f"{folder / part} has {len(names[part]):,} classes instead of {classes:,}: {how}")
    differing = sorted(names["train"] ^ names["val"])
    if differing:
        raise DataError(f"{folder}: train and val differ in {len(differing)} classes, such as {differing[0]}: {how}")
    return folder


def load_imagenet(folder: Path | None, classes: int = IMAGENET_CLASSES) -> Data:
    """Lists the image files of ImageNet-2012, which are read during training. The validation set is the test set.

    Raises:
        DataError: torchvision is missing, or folders are missing, incomplete, or have wrong classes.
    """
    found = find_imagenet(folder, classes)
    datasets = _torchvision_datasets()
    parts = []
    for part in ("train", "val"):
        try:
            listed = datasets.ImageFolder(str(found / part))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{found / part} is incomplete: {error}. Unpack ImageNet-2012 there again") from error
        parts.append(Images(tuple(listed.samples), random=part == "train"))
    return Data(*parts)


def find_cifar(folder: Path | None, name: str) -> Path:
    """Checks that `folder` contains all files of CIFAR-10 or CIFAR-100, with the published checksums. Returns `folder`.

    Args:
        folder: the folder that --data names.
        name: `CIFAR10` or `CIFAR100`, as in torchvision.

    Raises:
        DataError: `folder` is None, torchvision is missing, or files are missing or damaged.
    """
    kind = getattr(_torchvision_datasets(), name)
    how = f"pass --data FOLDER with {kind.base_folder}/ of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked"
    if folder is None:
        raise DataError(f"{name} has no default folder: {how}")
    from torchvision.datasets.utils import check_integrity

    files = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    place = folder / kind.base_folder
    missing = [file for file, _ in files if not (place / file).is_file()]
    if missing:
        raise DataError(f"{place} lacks {', '.join(missing)}: {how}")
    damaged = [file for file, digest in files if not check_integrity(str(place / file), digest)]
    if damaged:
        raise DataError(f"{place} has files that differ from the published ones ({', '.join(damaged)}): {how}")
    return folder


def load_cifar(folder: Path | None, name: str) -> Data:
    """Loads CIFAR-10 or CIFAR-100 as uint8 images (N, 3, 32, 32) and int64 labels, with its standard split.

    Raises the errors of `find_cifar`.
    """
    found, datasets = find_cifar(folder, name), _torchvision_datasets()
    splits = []
    for train in (True, False):
        part = getattr(datasets, name)(str(found), train=train)
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        splits.append(Split(images, torch.tensor(part.targets)))
    return Data(*splits)


def _torchvision_datasets() -> Any:
    try:
        import torchvision.datasets
    except ImportError as error:
        raise DataError(
            "torchvision, which reads the data of this task, is not installed: pip install 'abtrain[vision]'"
        ) from error
    return torchvision.datasets
