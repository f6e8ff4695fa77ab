"""Where data sets come from: a folder of the user's, a Debian package, torchvision's download, an image folder."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

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
BITS_PER_SAMPLE, WHITE = 258, 262  # tags of TIFF files
LISTED = 20  # unreadable files that a message names


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
    """``folder/train/<class>/*`` and ``folder/val/<class>/*``, resized (short side) and centre-cropped to a square.

    Every image becomes RGB of 8 bits, see :class:`Reader`.
    """
    reader = Reader(options.image_size)
    train, test = folders(options, reader)
    problems: list[str] = []
    (train_x, train_y), (test_x, test_y) = (_stacked(part, options.image_size, problems) for part in (train, test))
    if problems:
        more = f"\n       and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise UserError(f"data.folder '{options.folder}': files that cannot be read as images: {len(problems)}; "
                        "convert, replace or remove them:\n       " + "\n       ".join(problems[:LISTED]) + more)
    notes = (*reader.notes(), *_left_out(train), *_left_out(test))
    return Raw(train_x, train_y, test_x, test_y, train.classes, options.folder, notes)


def folders(options, loader=None) -> tuple:
    """The training and the test images of an image folder, listed and not yet read.

    Args:
        options: ``params.data``.
        loader: opens a file; None: nothing will be opened.

    Returns:
        Two of torchvision's ``ImageFolder``; hidden files and folders (``.ipynb_checkpoints``) are none of theirs.

    Raises:
        UserError: a folder, a class or a key of params.yaml is missing, or there are too many images.
    """
    if options.folder is None or options.image_size is None:
        raise UserError("params.yaml: data set image_folder needs data.folder (with train/<class>/ and val/<class>/) "
                        "and data.image_size (pixels)")
    try:
        train, test = (_listed(Path(options.folder) / part, options.image_size, loader) for part in ("train", "val"))
    except (OSError, RuntimeError) as problem:
        raise UserError(f"data.folder '{options.folder}': {problem}. Expected train/<class>/ and "
                        "val/<class>/") from None
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(f"data.folder '{options.folder}': train/ and val/ have different classes "
                        f"({', '.join(odd[:5])}); labels would mean different things. Give both the same class folders")
    needed = (len(train) + len(test)) * 3 * options.image_size**2 / 2**30
    if needed > MEMORY_LIMIT_GIB:
        raise UserError(f"data.folder '{options.folder}': {len(train) + len(test)} images of {options.image_size} "
                        f"pixels need {needed:.0f} GiB, the limit is {MEMORY_LIMIT_GIB}; lower data.image_size or use "
                        "fewer images")
    return train, test


def _listed(root: Path, size: int, loader):
    from hobs_rspar.networks import torchvision_models

    torchvision_models()
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
    from torchvision.transforms import v2

    class Visible(ImageFolder):
        def find_classes(self, directory):
            names = sorted(folder.name for folder in Path(directory).iterdir()
                           if folder.is_dir() and not folder.name.startswith("."))
            if not names:
                raise FileNotFoundError(f"{directory} holds no folder, and each class needs one")
            return names, {name: number for number, name in enumerate(names)}

    def counts(path: str) -> bool:
        hidden = any(part.startswith(".") for part in Path(path).relative_to(root).parts)
        return not hidden and has_file_allowed_extension(path, IMG_EXTENSIONS)

    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    transform = v2.Compose([v2.PILToTensor(), v2.Resize(round(size / 0.875), antialias=True), v2.CenterCrop(size)])
    return Visible(root, transform, loader=loader, is_valid_file=counts)


def _stacked(images, size: int, problems: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """All images [N, 3, size, size] as uint8 and their labels; files that cannot be read are added to ``problems``."""
    pixels = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for index, (path, _) in enumerate(images.samples):  # decoding is a file at a time
        try:
            pixels[index] = images[index][0]
        except Exception as problem:  # decoders of damaged files raise what they like; every file is to be named
            problems.append(f"{path}: {str(problem).strip() or type(problem).__name__}")
    return pixels, torch.tensor(images.targets)


def _left_out(images) -> tuple[str, ...]:
    """A sentence about files that are no images by their ending."""
    known = {path for path, _ in images.samples}
    others = [path for path in Path(images.root).rglob("*") if path.is_file() and str(path) not in known]
    names = ", ".join(sorted({path.suffix or path.name for path in others})[:5])
    return (f"files in {images.root} left out (hidden, or no images by their ending: {names}): "
            f"{len(others)}",) if others else ()


class Reader:
    """Opens image files as 8-bit RGB, upright, and counts what had to be decided.

    Grey of 16 bits (or 12) is scaled so that the largest number its format can hold becomes 255; the camera's
    orientation is applied; what is transparent shows white; of several pages, the first is taken. Integers of 32 bits
    and floating-point numbers have no largest value that stands for white: they are refused.

    Args:
        size: edge of the images that are made, in pixels.
    """

    def __init__(self, size: int):
        self.size, self.seen = size, Counter()

    def __call__(self, path: str) -> Image.Image:
        """The image at ``path``.

        Raises:
            ValueError: its numbers have no known white.
            OSError: it is damaged.
        """
        with Image.open(path) as image:
            white = _white(image)
            self.seen["in grey of more than 8 bits, scaled to 8"] += white > 0
            self.seen["smaller than data.image_size, enlarged"] += min(image.size) < self.size
            self.seen["of several pages, of which the first was taken"] += getattr(image, "n_frames", 1) > 1
            upright = ImageOps.exif_transpose(image)
            if white:
                return _eight_bits(upright, white).convert("RGB")
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            layer = upright.convert("RGBA")
            self.seen["with transparent pixels, which became white"] += layer.getchannel("A").getextrema()[0] < 255
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")

    def notes(self) -> list[str]:
        """A sentence for everything that was decided, with the number of images."""
        return [f"images {what}: {count}" for what, count in self.seen.items() if count]


def _white(image: Image.Image) -> int:
    """The number that stands for white in grey of more than 8 bits; 0 for images that Pillow converts rightly."""
    if image.mode.startswith("I;16"):
        tags = image.tag_v2 if image.format == "TIFF" else {}
        if tags.get(WHITE) == 0:  # Pillow inverts such images of 8 bits, and not these
            raise ValueError("grey of 16 bits in which 0 is white; invert it (photometric interpretation 1)")
        return 2**tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # formats of at most 16 bits, widened by Pillow
        return 2**16 - 1
    if image.mode in ("I", "F"):
        kind = "signed or 32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"mode {image.mode} ({kind}), of which no value is known to be white; allowed are 1, 8 and "
                         "16 bits, grey or colour: scale it to 16 bits")
    return 0


def _eight_bits(image: Image.Image, white: int) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.rint(values * (255 / white)).clip(0, 255).astype(np.uint8))
