"""Finds and checks small data sets, and loads them into memory as tensors.

- digits: scikit-learn's handwritten digits, 1797 images of 8 x 8.
- Fashion-MNIST: 70 000 images of 28 x 28 in IDX files, as Zalando publishes them.
- pysrc: the bytes of the Python standard library's sources. They differ slightly between versions of Python, so only
  runs of one version are comparable.
- Random tokens: nothing can be learnt from them, but a step costs what it would on text.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import os
import sysconfig
import tempfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from abtrain.commands.tasks.samples import Data, Split
from abtrain.errors import DataError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_FASHION_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_HOW_TO_GET_FASHION_MNIST = (
    "install Debian's package with `apt install dataset-fashion-mnist`, or pass --data FOLDER with the four "
    "IDX files (gzipped or not) of https://github.com/zalandoresearch/fashion-mnist"
)
_FETCH_AGAIN = f"Fetch it again: {_HOW_TO_GET_FASHION_MNIST}"

_PYSRC_SHARE_NEEDED = 0.9
_PYSRC_HELD_OUT_EVERY = 20
# Standard library modules that CPython 3.11 to 3.14 all have under these names.
_PYSRC_MODULES = {
    "": (
        "abc argparse ast base64 bisect bz2 cProfile calendar cmd code codecs codeop colorsys compileall "
        "configparser contextlib copy copyreg csv dataclasses difflib dis doctest enum filecmp fileinput "
        "fnmatch fractions ftplib functools genericpath getopt getpass gettext glob graphlib gzip hashlib "
        "heapq hmac imaplib inspect io ipaddress linecache locale lzma mailbox mimetypes modulefinder netrc "
        "ntpath numbers opcode operator optparse os pdb pickle pickletools pkgutil platform plistlib poplib "
        "posixpath pprint profile pstats pty py_compile pyclbr pydoc queue quopri random reprlib "
        "rlcompleter runpy sched secrets selectors shelve shlex shutil signal site smtplib socket "
        "socketserver ssl stat statistics stringprep subprocess symtable tabnanny tarfile tempfile textwrap "
        "threading timeit token tokenize trace traceback tracemalloc types typing uuid warnings wave "
        "weakref webbrowser zipapp zipimport"
    ),
    "asyncio": (
        "base_events base_futures base_subprocess base_tasks coroutines events exceptions format_helpers "
        "futures locks proactor_events protocols queues runners selector_events sslproto staggered streams "
        "subprocess taskgroups tasks timeouts transports trsock unix_events windows_events windows_utils"
    ),
    "collections": "__init__",
    "concurrent/futures": "__init__ process thread",
    "ctypes": "__init__ util wintypes",
    "email": (
        "__init__ base64mime charset contentmanager encoders errors feedparser generator header "
        "headerregistry iterators message parser policy quoprimime utils"
    ),
    "html": "__init__ parser",
    "http": "__init__ client cookiejar cookies server",
    "importlib": "__init__ abc util",
    "json": "__init__ decoder encoder scanner tool",
    "logging": "__init__ config handlers",
    "multiprocessing": (
        "connection context forkserver heap managers pool popen_fork popen_forkserver popen_spawn_posix "
        "popen_spawn_win32 process queues reduction resource_sharer resource_tracker shared_memory "
        "sharedctypes spawn synchronize util"
    ),
    "re": "__init__",
    "sqlite3": "__init__ dbapi2 dump",
    "unittest": "__init__ async_case case loader main mock result runner signals suite util",
    "urllib": "error parse request response robotparser",
    "wsgiref": "handlers headers simple_server types util validate",
    "xml/dom": "__init__ domreg expatbuilder minicompat minidom pulldom xmlbuilder",
    "xml/etree": "ElementInclude ElementPath ElementTree __init__",
    "xml/sax": "__init__ expatreader handler saxutils xmlreader",
    "xmlrpc": "client server",
}
PYSRC_FILES = sorted(
    f"{package}/{module}.py".lstrip("/") for package, modules in _PYSRC_MODULES.items() for module in modules.split()
)


def check_digits(folder: Path | None) -> None:
    """Raises DataError if scikit-learn, which contains the digits, is not installed. `folder` is not used."""
    if importlib.util.find_spec("sklearn") is None:
        raise DataError("the digits are part of scikit-learn, which is not installed: pip install 'abtrain[data]'")


def load_digits(folder: Path | None) -> Data:
    """Loads the digits: pixels as float32 (N, 64) from 0 to 1, labels as int64 (N,). `folder` is not used.

    The test set is a fixed fifth of the samples, with the same proportions of the classes.

    Raises:
        DataError: scikit-learn is not installed.
    """
    check_digits(folder)
    # scikit-learn takes two seconds to import, and only this task needs it.
    from sklearn.datasets import load_digits as read_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = read_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x = (torch.from_numpy(part).float() for part in parts[:2])
    train_y, test_y = (torch.from_numpy(part).long() for part in parts[2:])
    return Data(Split(train_x, train_y), Split(test_x, test_y))


def find_fashion_mnist(folder: Path | None) -> Path:
    """Finds the four files of Fashion-MNIST in `folder`; if it is None, in Debian's folder or the download cache.

    If neither of these two folders exists, the files are downloaded to the cache.

    Returns:
        The folder with the files.

    Raises:
        DataError: files are missing and cannot be downloaded. The message says how to get them.
    """
    if folder is not None:
        _require_fashion_mnist(folder)
        return folder
    cached = _cache_folder() / "fashion-mnist"
    for candidate in (DEBIAN_FASHION_MNIST, cached):
        if candidate.is_dir():
            _require_fashion_mnist(candidate)
            return candidate
    _download_fashion_mnist(cached)
    return cached


def load_fashion_mnist(folder: Path | None) -> Data:
    """Loads Fashion-MNIST as uint8 images (N, 1, 28, 28) and int64 labels in 0..9, with its standard split.

    Raises:
        DataError: files are missing, truncated, or contain other data.
    """
    found = find_fashion_mnist(folder)
    splits = {}
    for split, (images_name, labels_name) in _FASHION_MNIST_FILES.items():
        images = read_idx(_idx_file(found, images_name), dimensions=3)
        labels = read_idx(_idx_file(found, labels_name), dimensions=1)
        if images.shape[1:] != (28, 28) or int(labels.max()) > 9:
            raise DataError(
                f"{found} contains another data set: {images_name} has shape {tuple(images.shape)} and {labels_name} "
                f"has labels up to {int(labels.max())}, but Fashion-MNIST has images of 28 x 28 pixels and labels up "
                f"to 9. {_FETCH_AGAIN}"
            )
        splits[split] = Split(images.unsqueeze(1), labels.long())
    return Data(splits["train"], splits["test"])


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Reads an IDX file of unsigned bytes, gzipped or plain, as a uint8 tensor of the shape in its header.

    An IDX file consists of two zero bytes, the type (8 for unsigned bytes), the number of dimensions, the size of each
    dimension as a big-endian 32-bit number, and the values in C order.

    Raises:
        DataError: the file cannot be read, or is not an IDX file of bytes with this number of dimensions.
    """
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. {_FETCH_AGAIN}") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(
            f"{path} is not an IDX file of bytes with {dimensions} dimensions: its first bytes are "
            f"{content[:4].hex() or 'missing'} instead of 000008{dimensions:02x}. {_FETCH_AGAIN}"
        )
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    values = len(content) - header
    if values != math.prod(shape) or values == 0:
        raise DataError(f"{path} contains {values} values, but its header says {math.prod(shape)}. {_FETCH_AGAIN}")
    # torch warns about tensors over read-only memory, such as bytes.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)


def find_pysrc(folder: Path | None) -> Path:
    """Returns the folder of the running Python's standard library. Ignores `folder`.

    Raises:
        DataError: more than a tenth of the files that the task reads are missing.
    """
    library = Path(sysconfig.get_path("stdlib"))
    missing = [name for name in PYSRC_FILES if not (library / name).is_file()]
    if len(missing) > (1 - _PYSRC_SHARE_NEEDED) * len(PYSRC_FILES):
        raise DataError(
            f"{library} lacks {len(missing)} of {len(PYSRC_FILES)} standard library sources that this task reads, "
            f"such as {', '.join(missing[:5])}: use CPython 3.11 to 3.14, installed with its source files"
        )
    return library


def load_pysrc(folder: Path | None, context: int = 128) -> Data:
    """Loads the bytes of the standard library's sources as windows of `context` bytes that do not overlap.

    Every 20th file is in the test set. `folder` is not used.

    Returns:
        The data, with inputs and targets as uint8 (N, context). The target of each byte is the byte after it.

    Raises:
        DataError: more than a tenth of the files that the task reads are missing.
    """
    library = find_pysrc(folder)
    held_out = PYSRC_FILES[_PYSRC_HELD_OUT_EVERY - 1 :: _PYSRC_HELD_OUT_EVERY]
    trained = [name for name in PYSRC_FILES if name not in held_out]
    return Data(_windows(library, trained, context), _windows(library, held_out, context))


def _windows(library: Path, names: list[str], context: int) -> Split:
    text = b"".join((library / name).read_bytes() for name in names if (library / name).is_file())
    stream = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    count = (len(stream) - 1) // context
    x, y = stream[: count * context], stream[1 : count * context + 1]
    return Split(x.reshape(count, context), y.reshape(count, context))


def random_tokens(folder: Path | None, vocabulary: int, context: int, train: int = 4096, test: int = 16) -> Data:
    """Draws windows of tokens from 0 to `vocabulary`, the same in every process. Ignores `folder`.

    Returns:
        The data, with inputs and targets as int32 (train or test, context). The target of each token is the next one.
    """
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(vocabulary, (train + test, context + 1), generator=generator, dtype=torch.int32)
    x, y = windows[:, :-1], windows[:, 1:]
    return Data(Split(x[:train], y[:train]), Split(x[train:], y[train:]))


def _idx_file(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.is_file() else plain.with_name(f"{name}.gz")


def _require_fashion_mnist(folder: Path) -> None:
    names = [name for pair in _FASHION_MNIST_FILES.values() for name in pair]
    try:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder: {_HOW_TO_GET_FASHION_MNIST}")
        missing = [name for name in names if not _idx_file(folder, name).is_file()]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}. Name another folder with --data") from error
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}, each plain or as .gz: {_HOW_TO_GET_FASHION_MNIST}")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "abtrain"


def _download_fashion_mnist(target: Path) -> None:
    """Downloads the files with torchvision, and moves them to the folder `target` when all are complete."""
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        raise DataError(f"Fashion-MNIST was not found: {_HOW_TO_GET_FASHION_MNIST}") from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            FashionMNIST(scratch, download=True)
            downloaded = Path(scratch) / "FashionMNIST" / "raw"
            _require_fashion_mnist(downloaded)
            if not target.exists():  # another process may have been faster
                downloaded.rename(target)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"Fashion-MNIST was not found, and its download failed ({error}): {_HOW_TO_GET_FASHION_MNIST}"
        ) from error
