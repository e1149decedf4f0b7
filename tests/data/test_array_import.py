"""Imports of MNIST and CIFAR from files in their original formats, and hostile files."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpitrain.cli.main import main
from mpitrain.data import load, plain_pickle

RNG = np.random.default_rng(0)
MNIST = {("train", "images"): "train-images-idx3-ubyte", ("train", "labels"): "train-labels-idx1-ubyte"}
MNIST |= {("test", "images"): "t10k-images-idx3-ubyte", ("test", "labels"): "t10k-labels-idx1-ubyte"}
N = {"train": 30, "test": 7}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, *, packed: bool = False) -> dict[tuple[str, str], np.ndarray]:
    folder.mkdir()
    arrays = {}
    for (split, kind), name in MNIST.items():
        shape = (N[split], 5, 4) if kind == "images" else (N[split],)
        arrays[split, kind] = RNG.integers(256 if kind == "images" else 10, size=shape).astype(np.uint8)
        content = idx(arrays[split, kind])
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return arrays


def imported(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {f"{split}/{kind}": file[split][kind][:] for split in N for kind in ("images", "labels")}


@pytest.mark.parametrize("form", ["plain", "gz", "archive"])
def test_mnist_has_the_pixels_and_labels_of_its_files(tmp_path, lone, form):
    arrays = write_mnist(tmp_path / "mnist", packed=form != "plain")
    source = tmp_path / "mnist"
    if form == "archive":
        with tarfile.open(tmp_path / "mnist.tar", "w") as archive:
            archive.add(source, "MNIST/raw")
        source = tmp_path / "mnist.tar"
    assert main(["data", "import", "mnist", str(source), str(tmp_path / "m.h5")]) == 0
    found = imported(tmp_path / "m.h5")
    for split in N:
        np.testing.assert_array_equal(found[f"{split}/images"][:, 0], arrays[split, "images"])
        np.testing.assert_array_equal(found[f"{split}/labels"], arrays[split, "labels"])
    data = load(str(tmp_path / "m.h5"), world=lone)
    pixels = arrays["train", "images"] / 255
    assert (data.shape, data.n_train, data.n_test) == ((1, 5, 4), 30, 7)
    x, _ = data.batch(np.arange(30))
    np.testing.assert_allclose(x.numpy()[:, 0], (pixels - pixels.mean()) / pixels.std(), atol=1e-5)
    assert main(["data", "verify", str(tmp_path / "m.h5")]) == 0


def cut(folder):
    path = folder / MNIST["train", "images"]
    path.write_bytes(path.read_bytes()[:-1])


def longer(folder):
    path = folder / MNIST["test", "labels"]
    path.write_bytes(path.read_bytes() + b"x")


def huge(folder):
    (folder / MNIST["train", "images"]).write_bytes(struct.pack(">4I", 0x0803, 2**31, 2**31, 2**31))


def swapped(folder):
    (folder / MNIST["train", "images"]).write_bytes((folder / MNIST["train", "labels"]).read_bytes())


def missing(folder):
    (folder / MNIST["test", "labels"]).unlink()


def fewer_labels(folder):
    (folder / MNIST["train", "labels"]).write_bytes(idx(np.zeros(29, np.uint8)))


def both(folder):
    (folder / (MNIST["test", "labels"] + ".gz")).write_bytes(gzip.compress(idx(np.zeros(7, np.uint8))))


def no_gzip(folder):
    (folder / MNIST["test", "labels"]).rename(folder / (MNIST["test", "labels"] + ".gz"))


def bomb(folder):
    (folder / MNIST["test", "labels"]).unlink()
    content = idx(np.zeros(7, np.uint8)) + bytes(2**26)
    (folder / (MNIST["test", "labels"] + ".gz")).write_bytes(gzip.compress(content))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, "does not have the 600 bytes that it declares"),
        (longer, "does not have the 7 bytes"),
        (huge, "which is no set of small images"),
        (swapped, "is not an idx file of 3 dimensions"),
        (missing, "lacks the labels of the test set"),
        (fewer_labels, "has 30 images and 29 labels"),
        (both, "has test labels twice"),
        (no_gzip, "is damaged"),
        (bomb, "does not have the 7 bytes"),
    ],
)
def test_damaged_mnist_is_refused_in_one_line(tmp_path, capsys, damage, told):
    write_mnist(tmp_path / "mnist")
    damage(tmp_path / "mnist")
    assert main(["data", "import", "mnist", str(tmp_path / "mnist"), str(tmp_path / "m.h5")]) == 2
    output = capsys.readouterr().err
    assert (told in output, output.count("\n")) == (True, 1), output
    assert os.listdir(tmp_path) == ["mnist"]


def write_cifar(folder: Path, n_classes: int, form: str, protocol: int = 2) -> dict[str, np.ndarray]:
    """Write batches of CIFAR, and return pixels and labels in the order of the files."""
    folder.mkdir()
    batches = {f"data_batch_{k}": "train" for k in range(1, 6)} | {"test_batch": "test"}
    if n_classes == 100:
        batches = {"train": "train", "test": "test"}
    found: dict[str, list[np.ndarray]] = {f"{split}/{kind}": [] for split in N for kind in ("images", "labels")}
    for name, split in batches.items():
        images = RNG.integers(256, size=(4, 3, 32, 32)).astype(np.uint8)
        labels = RNG.integers(n_classes, size=4).astype(np.uint8)
        labels[0] = n_classes - 1
        found[f"{split}/images"].append(images)
        found[f"{split}/labels"].append(labels)
        rows = images.reshape(4, -1)
        if form == "binary":
            columns = [labels[:, None], rows] if n_classes == 10 else [labels[:, None] // 5, labels[:, None], rows]
            (folder / f"{name}.bin").write_bytes(np.concatenate(columns, axis=1).tobytes())
        else:
            key = b"labels" if n_classes == 10 else b"fine_labels"
            document = {b"data": rows, key: labels.tolist(), b"batch_label": b"a batch", b"filenames": [b"x.png"] * 4}
            (folder / name).write_bytes(pickle.dumps(document, protocol))
    names = [f"class {k}" for k in range(n_classes)]
    if form == "binary":
        (folder / ("batches.meta.txt" if n_classes == 10 else "fine_label_names.txt")).write_text("\n".join(names))
    else:
        key = "label_names" if n_classes == 10 else "fine_label_names"
        meta = pickle.dumps({key: names, "num_vis": 3072}, protocol)
        (folder / ("batches.meta" if n_classes == 10 else "meta")).write_bytes(meta)
    return {name: np.concatenate(parts) for name, parts in found.items()}


@pytest.mark.parametrize("form", ["binary", "python"])
@pytest.mark.parametrize("n_classes", [10, 100])
def test_cifar_has_the_pixels_labels_and_names_of_its_files(tmp_path, n_classes, form):
    expected = write_cifar(tmp_path / "cifar", n_classes, form)
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar", "cifar-batches")
    assert main(["data", "import", "cifar", str(tmp_path / "cifar.tar.gz"), str(tmp_path / "c.h5")]) == 0
    found = imported(tmp_path / "c.h5")
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    with h5py.File(tmp_path / "c.h5") as file:
        assert list(file.attrs["classes"]) == [f"class {k}" for k in range(n_classes)]


def python_2_pickle(images: np.ndarray, labels: list[int]) -> bytes:
    """Return a batch as cPickle of Python 2 has written it: texts are bytes, and arrays have the old module."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<I", len(value)) + value

    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    dtype = b"cnumpy\ndtype\nq\x02" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xff" * 1
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    shape = b"K" + bytes([len(images)]) + b"M" + struct.pack("<H", images.shape[1]) + b"\x86"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(images.tobytes()) + b"tb"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"](" + numbers + b"eu."


def test_a_batch_of_python_2_is_read():
    images = RNG.integers(256, size=(4, 3072)).astype(np.uint8)
    content = python_2_pickle(images, [3, 1, 4, 1])
    ours, theirs = plain_pickle.load(io.BytesIO(content)), pickle.loads(content, encoding="bytes")
    np.testing.assert_array_equal(ours[b"data"], images)
    np.testing.assert_array_equal(theirs[b"data"], images)
    assert ours[b"labels"] == theirs[b"labels"] == [3, 1, 4, 1]


@pytest.mark.parametrize("protocol", range(5))
def test_plain_data_of_every_protocol_are_read(protocol):
    value = {
        "numbers": [1, -2, 3000, 2**40, 0.5, True, None],
        "texts": ["a", "é"],
        "pair": (1, ("x",)),
        b"key": b"\xff",
    }
    value["again"] = value["texts"]
    if protocol < 2:
        del value[b"key"]  # bytes of these protocols are texts with a call around them
        value["numbers"][5] = 1
    assert plain_pickle.load(io.BytesIO(pickle.dumps(value, protocol))) == value


class Command:
    """An object whose pickle runs a command."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def hostile(folder: Path) -> dict[str, bytes]:
    images = np.zeros((2, 3072), np.uint8)
    batch = {b"data": images, b"labels": [1, 2]}
    return {
        "command": pickle.dumps(Command(os.system, f"touch {folder / 'ran'}"), 2),
        "command in a list": pickle.dumps({b"data": images, b"labels": [Command(os.mkdir, str(folder / "ran"))]}, 2),
        "numpy function": pickle.dumps(Command(np.load, "x.npy"), 4),
        "object array": pickle.dumps({b"data": np.array([[{}]], object), b"labels": [1]}, 2),
        "floats": pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}, 2),
        "Fortran order": pickle.dumps({b"data": np.asfortranarray(images), b"labels": [1, 2]}, 2),
        "huge shape": pickle.dumps(batch, 2).replace(b"K\x02M\x00\x0c\x86", b"J\xff\xff\xff\x7fM\x00\x0c\x86"),
        "huge length": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
        "huge memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "cut off": pickle.dumps(batch, 2)[:-700],
        "persistent id": b"\x80\x02Pname\n.",
        "no dictionary": pickle.dumps([1, 2], 2),
        "a label too many": pickle.dumps({b"data": images, b"labels": [1, 2, 3]}, 2),
        "labels that are no numbers": pickle.dumps({b"data": images, b"labels": ["a", "b"]}, 2),
        "nothing": b"",
        "extension": b"\x80\x02\x82\x01.",
    }


HOSTILE = list(hostile(Path("x")))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_in_one_line_and_runs_nothing(tmp_path, capsys, case):
    write_cifar(tmp_path / "cifar", 10, "python")
    (tmp_path / "cifar" / "data_batch_3").write_bytes(hostile(tmp_path)[case])
    assert main(["data", "import", "cifar", str(tmp_path / "cifar"), str(tmp_path / "c.h5")]) == 2
    output = capsys.readouterr().err
    assert ("data_batch_3 is refused" in output, output.count("\n")) == (True, 1), output
    assert os.listdir(tmp_path) == ["cifar"]


@pytest.mark.parametrize("place", [1, 3073, 3072 * 2])
def test_a_binary_batch_of_another_length_is_refused(tmp_path, capsys, place):
    write_cifar(tmp_path / "cifar", 10, "binary")
    path = tmp_path / "cifar" / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[: place - 1])
    code = main(["data", "import", "cifar", str(tmp_path / "cifar"), str(tmp_path / "c.h5")])
    assert (code, "not rows of 3073" in capsys.readouterr().err) == (2, True)


def test_a_folder_without_batches_is_refused(tmp_path, capsys):
    (tmp_path / "cifar").mkdir()
    assert main(["data", "import", "cifar", str(tmp_path / "cifar"), str(tmp_path / "c.h5")]) == 2
    assert "has no train batch" in capsys.readouterr().err
