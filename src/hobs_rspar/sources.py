"""Where data sets come from: a folder of the user's, a Debian package, torchvision's download, an image folder."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

from hobs_rspar.data import Raw
from hobs_rspar.errors import UserError

# SHA-256 of the uncompressed files: sources compress differently, the content is the same.
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                   "Ankle boot"]
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = "usr/share/datasets/fashion-mnist"
MEMORY_LIMIT_GIB = 8


def read(dataset: str, options) -> Raw:
    """All images of a data set.

    Args:
        dataset: a name of ``config.DATASETS``.
        options: ``params.data``; ``folder`` is looked at first.

    Raises:
        UserError: no source has the files, or a file is missing, truncated or has the wrong checksum.
    """
    if dataset == "fashion_mnist":
        return fashion_mnist(options.folder)
    if dataset == "image_folder":
        return image_folder(options)
    return cifar(dataset, options.folder)


def fashion_mnist(folder: str | None) -> Raw:
    """Fashion-MNIST (Xiao et al. 2017, MIT licence) from the first source that has it."""
    if folder is not None:
        return _read_fashion_mnist(Path(folder), f"data.folder '{folder}'")
    installed = Path("/") / DEBIAN_FOLDER
    if installed.is_dir():
        return _read_fashion_mnist(installed, f"Debian package {DEBIAN_PACKAGE}")
    with tempfile.TemporaryDirectory() as scratch:
        tried = []
        for name, fetch in ((f"Debian package {DEBIAN_PACKAGE}", _from_debian), ("torchvision", _from_torchvision)):
            try:
                found = fetch(Path(scratch))
            except (OSError, RuntimeError, subprocess.SubprocessError) as problem:
                tried.append(f"{name}: {str(problem).strip() or type(problem).__name__}")
                continue
            return _read_fashion_mnist(found, name)
    raise UserError("Fashion-MNIST could not be fetched. Tried " + "; ".join(tried) + ". Download its four files and "
                    "set data.folder in params.yaml to their folder")


def _from_debian(scratch: Path) -> Path:
    """Fetches and unpacks the Debian package without root and without installing it."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise OSError("apt-get or dpkg-deb is not here")
    lists = scratch / "lists"
    (lists / "partial").mkdir(parents=True)
    apt = ["apt-get", "-qq", "-o", f"Dir::State::Lists={lists}", "-o", "APT::Sandbox::User=root",
           "-o", "Debug::NoLocking=1"]
    for command in ([*apt, "update"], [*apt, "download", DEBIAN_PACKAGE]):
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:  # an update that fails for a foreign source is no harm; the download counts
        raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "apt-get download failed")
    package = next(scratch.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(package), str(scratch / "unpacked")], check=True, capture_output=True)
    return scratch / "unpacked" / DEBIAN_FOLDER


def _from_torchvision(scratch: Path) -> Path:
    from hobs_rspar.networks import torchvision_models

    torchvision_models()  # makes the package importable with a CPU-only PyTorch
    from torchvision.datasets import FashionMNIST

    FashionMNIST(str(scratch), download=True)
    return scratch / "FashionMNIST" / "raw"


def _read_fashion_mnist(folder: Path, source: str) -> Raw:
    train_x, train_y, test_x, test_y = (_idx(folder, name, expected) for name, expected in FASHION_MNIST.items())
    return Raw(train_x[:, None], train_y.long(), test_x[:, None], test_y.long(), FASHION_CLASSES, source)


def _idx(folder: Path, name: str, expected: str) -> torch.Tensor:
    """One file in MNIST's idx format (4 bytes: 0, 0, type, dimensions; sizes as big-endian int32; data)."""
    path = next((file for file in (folder / f"{name}.gz", folder / name) if file.is_file()), None)
    if path is None:
        raise UserError(f"{folder}/{name}.gz not found; data.folder must hold {', '.join(FASHION_MNIST)} (.gz or not)")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as problem:
        raise UserError(f"{path} is truncated or no gzip file ({problem}); fetch it again") from None
    seen = hashlib.sha256(content).hexdigest()
    if seen != expected:
        raise UserError(f"{path}: SHA-256 of the content is {seen[:16]}..., expected {expected[:16]}...; the file is "
                        "damaged or of another version; fetch it again")
    dimensions = content[3]
    shape = np.frombuffer(content, ">i4", dimensions, 4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())


def cifar(dataset: str, folder: str | None) -> Raw:
    """CIFAR-10 or CIFAR-100 in torchvision's layout; torchvision checks the files' MD5 sums before it reads them."""
    from hobs_rspar.networks import torchvision_models

    torchvision_models()
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
    root = folder or "data/downloads"
    try:
        train, test = (kind(root, train=train, download=folder is None) for train in (True, False))
    except (RuntimeError, OSError) as problem:
        raise UserError(f"{dataset} not found or damaged in '{root}' ({problem}). Set data.folder in params.yaml to "
                        f"the folder that holds '{kind.base_folder}'") from None
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test)]
    return Raw(pixels[0], torch.tensor(train.targets), pixels[1], torch.tensor(test.targets), train.classes, root)


def image_folder(options) -> Raw:
    """``folder/train/<class>/*`` and ``folder/val/<class>/*``, resized (short side) and centre-cropped to a square."""
    from hobs_rspar.networks import torchvision_models

    torchvision_models()
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    if options.folder is None or options.image_size is None:
        raise UserError("params.yaml: data set image_folder needs data.folder (with train/<class>/ and val/<class>/) "
                        "and data.image_size (pixels)")
    size = options.image_size
    transform = v2.Compose([v2.PILToTensor(), v2.Resize(round(size / 0.875), antialias=True), v2.CenterCrop(size)])
    try:
        train, test = (ImageFolder(Path(options.folder) / part, transform) for part in ("train", "val"))
    except (FileNotFoundError, RuntimeError) as problem:
        raise UserError(f"data.folder '{options.folder}': {problem}. Expected train/<class>/ and "
                        "val/<class>/") from None
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(f"data.folder '{options.folder}': train/ and val/ have different classes "
                        f"({', '.join(odd[:5])}); labels would mean different things. Give both the same class folders")
    needed = (len(train) + len(test)) * 3 * size * size / 2**30
    if needed > MEMORY_LIMIT_GIB:
        raise UserError(f"data.folder '{options.folder}': {len(train) + len(test)} images of {size} pixels need "
                        f"{needed:.0f} GiB, the limit is {MEMORY_LIMIT_GIB}; lower data.image_size or use fewer images")
    (train_x, train_y), (test_x, test_y) = (_stacked(part, size) for part in (train, test))
    return Raw(train_x, train_y, test_x, test_y, train.classes, options.folder)


def _stacked(images, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for index, (path, _) in enumerate(images.samples):  # decoding is a file at a time
        try:
            pixels[index] = images[index][0].expand(3, -1, -1)
        except OSError as problem:
            raise UserError(f"{path} cannot be read as an image ({problem}); replace or remove it") from None
    return pixels, torch.tensor(images.targets)
