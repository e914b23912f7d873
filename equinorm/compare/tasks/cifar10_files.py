"""Reading CIFAR-10 in its two published forms without pickle.

The binary form: ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``, each a sequence of records of one byte for the class
and 3072 bytes for the pixels (red, green, blue; each row by row). The parquet form: ``train-*.parquet`` and ``test-*.parquet`` with the
columns ``img`` (a struct whose ``bytes`` are a PNG file) and ``label``.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from equinorm.compare.tasks.classifier import Samples

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

TRAINING_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILES = ("test_batch.bin",)
PIXELS = 3 * 32 * 32
RECORD = 1 + PIXELS
CLASSES = 10

HOW_TO_GET = (
    "Get cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it, or the parquet files of the dataset "
    "uoft-cs/cifar10 from https://huggingface.co; then name the folder with --data"
)


def load(folder: str | None) -> tuple[Samples, Samples]:
    """Training and test images, uint8 ``(N, 3, 32, 32)``, in the order of the files.

    Raises:
        ValueError: no folder named, files missing or damaged.
    """
    path = _folder(folder)
    if binary := _binary_files(path):
        return _read_binary(binary[0]), _read_binary(binary[1])
    training, test = _parquet_files(path)
    return _read_parquet(training), _read_parquet(test)


def sizes(folder: str | None) -> tuple[int, int]:
    """Number of training and test images, from a check of every file that does not read the images.

    Raises:
        ValueError: no folder named, files missing or damaged.
    """
    path = _folder(folder)
    if binary := _binary_files(path):
        return sum(map(_records, binary[0])), sum(map(_records, binary[1]))
    training, test = _parquet_files(path)
    return sum(_parquet(file).metadata.num_rows for file in training), sum(_parquet(file).metadata.num_rows for file in test)


def _folder(folder: str | None) -> Path:
    if folder is None:
        raise ValueError(f"the folder with CIFAR-10 is not named. {HOW_TO_GET}")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"there is no folder {folder}. {HOW_TO_GET}")
    return path


def _binary_files(folder: Path) -> tuple[list[Path], list[Path]] | None:
    for place in (folder, folder / "cifar-10-batches-bin"):
        training, test = ([place / name for name in names] for names in (TRAINING_FILES, TEST_FILES))
        missing = [file.name for file in training + test if not file.is_file()]
        if not missing:
            return training, test
        if len(missing) < len(training + test):
            raise ValueError(f"{place} lacks {', '.join(missing)}. {HOW_TO_GET}")
    return None


def _parquet_files(folder: Path) -> tuple[list[Path], list[Path]]:
    for place in (folder, folder / "plain_text"):
        training, test = sorted(place.glob("train-*.parquet")), sorted(place.glob("test-*.parquet"))
        if training and test:
            return training, test
        if training or test:
            raise ValueError(f"{place} lacks {'test' if training else 'train'}-*.parquet. {HOW_TO_GET}")
    raise ValueError(
        f"{folder} holds neither data_batch_1.bin to data_batch_5.bin and test_batch.bin nor train-*.parquet and test-*.parquet. "
        f"{HOW_TO_GET}"
    )


def _records(file: Path) -> int:
    size = file.stat().st_size
    if size == 0 or size % RECORD:
        raise ValueError(f"{file} is damaged: expected records of {RECORD} bytes, got a file of {size} bytes. {HOW_TO_GET}")
    labels = np.fromfile(file, np.uint8).reshape(-1, RECORD)[:, 0]
    _check_labels(file, labels)
    return len(labels)


def _check_labels(file: Path, labels: Any) -> None:
    if labels.min() < 0 or labels.max() >= CLASSES:
        wrong = next(label for label in labels if not 0 <= label < CLASSES)
        raise ValueError(f"{file} is damaged: expected classes from 0 to {CLASSES - 1}, got {wrong}. {HOW_TO_GET}")


def _read_binary(files: list[Path]) -> Samples:
    for file in files:
        _records(file)
    records = torch.from_numpy(np.concatenate([np.fromfile(file, np.uint8).reshape(-1, RECORD) for file in files]))  # (N, 3073)
    return Samples(records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].long())


def _parquet(file: Path) -> ParquetFile:
    try:
        import PIL  # noqa: F401 - decodes the images
        from pyarrow.lib import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ValueError(
            f'{file} is a parquet file, and {error.name} is not installed: pip install "equinorm[parquet]", or use the binary form'
        ) from error
    try:
        parquet = ParquetFile(file)
    except ArrowInvalid as error:
        raise ValueError(f"{file} is damaged: {error}. {HOW_TO_GET}") from error
    if parquet.metadata.num_rows == 0 or not {"img", "label"} <= set(parquet.schema_arrow.names):
        names = ", ".join(parquet.schema_arrow.names)
        raise ValueError(
            f"{file} is damaged: expected rows with the columns img and label, got {parquet.metadata.num_rows} rows with {names}. "
            f"{HOW_TO_GET}"
        )
    _check_labels(file, parquet.read(["label"])["label"].to_numpy())
    return parquet


def _read_parquet(files: list[Path]) -> Samples:
    from PIL import Image, UnidentifiedImageError

    images, labels = [], []
    for file in files:
        table = _parquet(file).read(["img", "label"])
        for row, entry in enumerate(table["img"].to_pylist()):
            try:
                image = np.asarray(Image.open(io.BytesIO(entry["bytes"])).convert("RGB"))  # (H, W, 3)
            except UnidentifiedImageError as error:
                raise ValueError(f"{file} is damaged: row {row} is not an image. {HOW_TO_GET}") from error
            if image.shape != (32, 32, 3):
                raise ValueError(
                    f"{file} is damaged: expected images of 32x32 pixels, got {image.shape[1]}x{image.shape[0]} in row {row}. {HOW_TO_GET}"
                )
            images.append(image)
        labels.append(table["label"].to_numpy())
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    return Samples(x, torch.from_numpy(np.concatenate(labels)).long())
