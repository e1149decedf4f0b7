"""Imports of class folders of real image files."""

import argparse
import io
import os
import struct
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from mpitrain.cli.data import IMPORTERS, add_arguments, run
from mpitrain.data import load
from mpitrain.data.class_folders import places
from mpitrain.data.hdf5_format import create
from mpitrain.data.image_import import import_images
from mpitrain.errors import UsageError

RNG = np.random.default_rng(0)


def write(path: Path, *, size=(8, 6), mode="RGB", value=None) -> np.ndarray:
    """Write an image file of (W, H) and return its pixels."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = RNG.integers(256, size=shape, dtype=np.uint8) if value is None else np.full(shape, value, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def pack(folder: Path, archive: Path) -> Path:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(folder.rglob("*")):
                file.write(path, path.relative_to(folder.parent))
    else:
        with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as file:
            file.add(folder, folder.name)
    return archive


@pytest.fixture
def split_folder(tmp_path):
    """Return a folder with train/ and test/ of two classes and other files, and the pixels of each class in order."""
    folder = tmp_path / "pets"
    pixels = {
        (split, name): [write(folder / split / name / f"{k:03}.png") for k in range(n)]
        for split, n in (("train", 5), ("test", 2))
        for name in ("dog", "cat")
    }
    (folder / "README.txt").write_text("pets")
    (folder / "train" / "dog" / ".hidden.png").write_text("no image")
    return folder, pixels


@pytest.mark.parametrize("packing", ["folder", "pets.tar.gz", "pets.tar", "pets.zip"])
def test_imported_images_equal_their_sources(tmp_path, lone, split_folder, packing):
    folder, pixels = split_folder
    source = folder if packing == "folder" else pack(folder, tmp_path / packing)
    done = import_images(source, tmp_path / "pets.h5", progress=False)
    assert (done.n_train, done.n_test, done.shape, done.classes) == (10, 4, (3, 6, 8), ("cat", "dog"))

    data = load(str(tmp_path / "pets.h5"), world=lone)
    assert data.classes == ("cat", "dog")
    with h5py.File(tmp_path / "pets.h5") as file:
        for (split, name), expected in pixels.items():
            rows = np.flatnonzero(file[f"{split}/labels"][:] == data.classes.index(name))
            images = sorted(image.tobytes() for image in file[f"{split}/images"][:][rows])
            assert images == sorted(np.moveaxis(image, -1, 0).tobytes() for image in expected)
        train = file["train/images"][:] / 255.0
        np.testing.assert_allclose(file.attrs["mean"], train.mean(axis=(0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(file.attrs["std"], train.std(axis=(0, 2, 3)), rtol=1e-10)
    assert sorted(os.listdir(tmp_path)) == sorted({"pets", "pets.h5", source.name})  # no temporary file is left


def test_more_images_than_a_chunk_are_all_written(tmp_path):
    for k in range(600):
        write(tmp_path / "in" / f"class{k % 3}" / f"{k}.png", size=(4, 4), mode="L")
    done = import_images(tmp_path / "in", tmp_path / "out.h5", progress=False)
    assert (done.n_train, done.n_test, done.shape) == (540, 60, (1, 4, 4))  # all are grey
    with h5py.File(tmp_path / "out.h5") as file:
        assert (np.bincount(file["train/labels"][:]) == 180).all()
        assert (np.bincount(file["test/labels"][:]) == 20).all()
        assert len({image.tobytes() for split in ("train", "test") for image in file[split]["images"][:]}) == 600


def test_the_split_does_not_depend_on_the_order_of_an_archive(tmp_path):
    for k in range(40):
        write(tmp_path / "in" / f"class{k % 2}" / f"{k}.png")
    archive = tmp_path / "shuffled.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in RNG.permutation(sorted((tmp_path / "in").rglob("*.png"))):
            file.write(path, path.relative_to(tmp_path / "in"))
    tests = []
    for source in (tmp_path / "in", archive):
        import_images(source, tmp_path / "out.h5", test_fraction=0.25, progress=False)
        with h5py.File(tmp_path / "out.h5") as file:
            tests.append({image.tobytes() for image in file["test/images"][:]})
    assert tests[0] == tests[1]
    assert len(tests[0]) == 10


def test_images_are_resized_to_the_most_common_or_the_given_size(tmp_path):
    for k, size in enumerate([(8, 6), (8, 6), (16, 12), (3, 3)]):
        write(tmp_path / "in" / "a" / f"{k}.jpg", size=size, value=77)
    for size, shape in ((None, (3, 6, 8)), ((5, 7), (3, 5, 7))):
        import_images(tmp_path / "in", tmp_path / "out.h5", size=size, progress=False)
        with h5py.File(tmp_path / "out.h5") as file:
            assert file["train/images"].shape[1:] == shape
            assert (abs(file["train/images"][:].astype(int) - 77) <= 1).all()
            np.testing.assert_array_equal(file.attrs["std"] > 0, True)


def test_one_coloured_image_makes_all_images_coloured(tmp_path):
    write(tmp_path / "in" / "a" / "0.png", mode="L")
    write(tmp_path / "in" / "a" / "1.png", mode="RGB")
    assert import_images(tmp_path / "in", tmp_path / "out.h5", progress=False).shape == (3, 6, 8)


@pytest.mark.parametrize("damage", ["header", "body"])
def test_an_unreadable_image_is_reported_or_left_out(tmp_path, damage):
    for k in range(6):
        write(tmp_path / "in" / "a" / f"{k}.png", size=(30, 30))
    broken = tmp_path / "in" / "a" / "3.png"
    broken.write_bytes(b"rubbish" if damage == "header" else broken.read_bytes()[:1000])
    target = tmp_path / "out.h5"
    target.write_text("what was there before")
    with pytest.raises(UsageError, match=r"a/3.png cannot be decoded.*--skip-unreadable"):
        import_images(tmp_path / "in", target, progress=False)
    assert target.read_text() == "what was there before"
    assert sorted(os.listdir(tmp_path)) == ["in", "out.h5"]

    done = import_images(tmp_path / "in", target, test_fraction=0.34, skip_unreadable=True, progress=False)
    assert done.unreadable == ("a/3.png",)
    assert done.n_train + done.n_test == 5
    with h5py.File(target) as file:
        assert len(file["train/images"]) == len(file["train/labels"]) == done.n_train


def deep(folder):
    (folder / "a").mkdir(parents=True)
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(folder / "a" / "0.png")


SOURCES = {
    "empty": (lambda folder: folder.mkdir(), "holds no images"),
    "no class": (lambda folder: write(folder / "0.png"), "0.png is in no class folder"),
    "one image": (lambda folder: write(folder / "a" / "0.png"), "one image per class"),
    "class of the test set only": (
        lambda folder: [write(folder / "train" / "a" / "0.png"), write(folder / "test" / "b" / "0.png")],
        "class b is in test but not in train",
    ),
    "two test sets": (
        lambda folder: [write(folder / split / "a" / "0.png") for split in ("train", "test", "val")],
        "both test and val .*--test-set test",
    ),
    "16 bits": (deep, "more than 8 bits"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_an_unsuitable_source_is_refused(tmp_path, name):
    make, text = SOURCES[name]
    make(tmp_path / "in")
    with pytest.raises(UsageError, match=text):
        import_images(tmp_path / "in", tmp_path / "out.h5", progress=False)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("name", ["in.tar.gz", "in.tar", "in.zip"])
def test_a_damaged_archive_is_refused(tmp_path, split_folder, name):
    archive = pack(split_folder[0], tmp_path / name)
    whole = archive.read_bytes()
    for content in (whole[: len(whole) // 2], b"not an archive" * 100):
        archive.write_bytes(content)
        with pytest.raises(UsageError):
            import_images(archive, tmp_path / "out.h5", progress=False)
        assert not (tmp_path / "out.h5").exists()


def test_wrong_paths_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for source, target, text in (
        ("gone", "out.h5", "no .*gone: give a folder"),
        ("notes.txt", "out.h5", "neither a folder nor an archive"),
        (".", "out.txt", "cannot write"),
        (".", "gone/out.h5", "cannot write"),
    ):
        with pytest.raises(UsageError, match=text):
            import_images(tmp_path / source, tmp_path / target, progress=False)


@pytest.mark.parametrize(
    ("names", "labels", "tests"),
    [
        (["a/1", "b/1"], "ab", None),
        (["top/a/1", "top/b/1"], "ab", None),
        (["./a/1", "./b/x/1"], "ab", None),
        (["train/a/1", "train/b/1"], "ab", None),  # nothing to test with
        (["train/a/1", "val/a/1"], "aa", [False, True]),
        (["x/y/train/a/1", "x/y/test/a/1"], "aa", [False, True]),
        (["train/1", "other/1"], ["train", "other"], None),  # a class of that name
    ],
)
def test_paths_determine_class_and_split(names, labels, tests):
    found = places(names)
    assert [place.label for place in found] == list(labels)
    assert [place.is_test for place in found] == (tests or [None] * len(names))


def test_the_command_line_imports(tmp_path, split_folder, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = ["import", "images", str(split_folder[0]), str(tmp_path / "out.h5"), "--size", "4x5", "--quiet"]
    assert run(parser.parse_args(arguments)) == 0
    assert "10 training and 4 test images of 3x4x5, 2 classes" in capsys.readouterr().out
    assert "images" in IMPORTERS
    for option in (["--size", "x"], ["--size", "1x2x3"], ["--test-fraction", "1"]):
        with pytest.raises(SystemExit):
            parser.parse_args(["import", "images", "a", "b.h5", *option])


def test_the_progress_bar_goes_to_standard_error(tmp_path, split_folder, monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    import_images(split_folder[0], tmp_path / "out.h5")
    assert "decoding: 100%" in terminal.getvalue()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "VALID"), ("training", "Validation"), ("TRAIN", "testing"), ("train", "Dev"), ("train", "eval")],
)
def test_names_of_sets_are_recognised_in_any_case(train, test):
    found = places([f"{train}/a/1", f"{test}/a/2"])
    assert [(place.is_test, place.label) for place in found] == [(False, "a"), (True, "a")]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train/a/1", "valid/a/1", "test/a/1"], "both test and valid exist next to train.*--test-set test"),
        (["train/a/1", "Training/a/1", "test/a/1"], "both Training and train exist"),
        (["train/a/1", "test/a/1", "extra/a/1"], "extra exists next to train and test"),
        (["val/a/1", "test/a/1"], "test and val exist, but no train"),
        (["train/a/1", "unseen/a/1"], "unseen has the same class folders as train: .*--test-set unseen"),
    ],
)
def test_sets_that_are_not_clear_are_refused(names, words):
    with pytest.raises(UsageError, match=words):
        places(names)


def test_links_inside_are_followed_and_others_refused(tmp_path):
    for k in range(4):
        write(tmp_path / "in" / "a" / f"{k}.png")
        write(tmp_path / "in" / ".store" / f"{k}.png")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "in" / ".store")
    done = import_images(tmp_path / "in", tmp_path / "out.h5", progress=False)
    assert (done.classes, done.n_train + done.n_test) == (("a", "b"), 8)
    link = tmp_path / "in" / "a" / "link"
    for target, words in (
        (tmp_path / "in", "contains it"),
        (tmp_path, "out of the folder"),
        ("gone", "link to nothing"),
    ):
        link.symlink_to(target)
        with pytest.raises(UsageError, match=words):
            import_images(tmp_path / "in", tmp_path / "out.h5", progress=False)
        link.unlink()


def test_orientation_transparency_and_content_are_respected_and_counted(tmp_path, capsys):
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    upright = np.zeros((6, 8, 3), np.uint8)
    upright[:3] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the viewer rotates by 90 degrees clockwise
    stored = Image.fromarray(np.rot90(upright).copy())
    stored.save(folder / "turned.png", exif=exif)
    Image.fromarray(upright).save(folder / "no_suffix", format="PNG")
    Image.fromarray(np.zeros((6, 8, 4), np.uint8)).save(folder / "clear.png")  # transparent black
    (folder / "LICENSE").write_text("words")
    (folder / "list.csv").write_text("words")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["import", "images", str(tmp_path / "in"), str(tmp_path / "out.h5"), "--quiet"])) == 0
    line = capsys.readouterr().out
    assert "2 training and 1 test images of 3x6x8, 1 classes" in line
    for words in ("1 turned as EXIF says", "1 put on white", "2 files that are no images left out"):
        assert words in line
    with h5py.File(tmp_path / "out.h5") as file:
        found = sorted(image.tobytes() for split in ("train", "test") for image in file[f"{split}/images"][:])
    expected = [np.moveaxis(upright, -1, 0), np.moveaxis(upright, -1, 0), np.full((3, 6, 8), 255, np.uint8)]
    assert found == sorted(image.tobytes() for image in expected)


def test_five_thousand_classes_and_names_in_other_encodings(tmp_path, lone):
    names = [f"class {k:04}" for k in range(4999)] + [b"na\xefve".decode(errors="surrogateescape")]
    with h5py.File(tmp_path / "many.h5", "w") as file:
        create(file, classes=names, shape=(2,), n=(1, 1))
        for split in ("train", "test"):
            for array in file[split].values():
                array[:] = 0
        file.attrs["mean"], file.attrs["std"] = np.zeros(2), np.ones(2)
    assert load(str(tmp_path / "many.h5"), world=lone).classes == (*names[:-1], "na\\xefve")
    for name in names[-2:]:
        for k in range(2):
            write(tmp_path / "in" / name / f"{k}.png")
    assert import_images(tmp_path / "in", tmp_path / "out.h5", progress=False).n_train == 2
    assert sorted(load(str(tmp_path / "out.h5"), world=lone).classes) == ["class 4998", "na\\xefve"]


@pytest.mark.parametrize(("chosen", "rows"), [("valid", 3), ("test", 2)])
def test_one_of_several_test_sets_is_chosen_and_the_others_are_counted(tmp_path, chosen, rows, capsys):
    for split, n in (("train", 4), ("valid", 3), ("test", 2)):
        for k in range(n):
            write(tmp_path / "in" / split / "a" / f"{k}.png", size=(8, 6) if split == "train" else (9, 9))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = ["import", "images", str(tmp_path / "in"), str(tmp_path / "out.h5"), "--quiet", "--test-set", chosen]
    assert run(parser.parse_args(arguments)) == 0
    line = capsys.readouterr().out
    assert f"4 training and {rows} test images of 3x6x8, 1 classes, {rows} resized" in line
    assert f"{5 - rows} images of other test sets left out" in line


def test_a_test_set_of_another_name_is_chosen(tmp_path):
    for split in ("train", "unseen"):
        write(tmp_path / "in" / split / "a" / "0.png")
    done = import_images(tmp_path / "in", tmp_path / "out.h5", test_set="unseen", progress=False)
    assert (done.n_train, done.n_test, dict(done.left_out)) == (1, 1, {})
    with pytest.raises(UsageError, match="no folder gone for the test set: there are train, unseen"):
        import_images(tmp_path / "in", tmp_path / "out.h5", test_set="gone", progress=False)


def png_of_16_bits(path: Path, pixels: np.ndarray) -> None:
    """Write a colour image (H, W, 3) with 16 bits per channel, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def test_modes_are_converted_and_counted(tmp_path, capsys):
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    red, white = np.full((4, 4, 3), (255, 0, 0), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    Image.fromarray(np.full((4, 4, 4), (0, 255, 255, 0), np.uint8), "CMYK").save(folder / "print.tif")  # red ink
    png_of_16_bits(folder / "deep.png", np.full((4, 4, 3), (65535, 255, 0)))  # 255 of 65535 is 0 of 255
    palette = Image.fromarray(np.zeros((4, 4), np.uint8), "P")
    palette.putpalette([255, 0, 0])
    palette.save(folder / "solid.png")
    palette.save(folder / "clear.png", transparency=0)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["import", "images", str(tmp_path / "in"), str(tmp_path / "out.h5"), "--quiet"])) == 0
    line = capsys.readouterr().out
    for words in ("1 converted from CMYK", "1 reduced from 16 to 8 bits", "1 put on white"):
        assert words in line
    with h5py.File(tmp_path / "out.h5") as file:
        found = sorted(image.tobytes() for split in ("train", "test") for image in file[f"{split}/images"][:])
    assert found == sorted(np.moveaxis(image, -1, 0).tobytes() for image in (red, red, red, white))


def zip_of(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name twice
        for k, name in enumerate(names):
            content = io.BytesIO()
            Image.fromarray(np.full((4, 4, 3), k, np.uint8)).save(content, format="PNG")
            archive.writestr(name, b"" if name.endswith(("/", "\\")) else content.getvalue())
    return path


@pytest.mark.parametrize(
    ("names", "classes", "left_out"),
    [
        (["/data/a/0.png", "/data/a/1.png", "/data/b/0.png", "/data/b/1.png"], ("a", "b"), {}),
        (["C:\\in\\a\\0.png", "C:\\in\\a\\1.png", "C:\\in\\b\\0.png", "C:\\in\\b\\1.png"], ("a", "b"), {}),
        (["in\\", "in\\a\\", "in\\a\\0.png", "in\\a\\1.png"], ("a",), {}),
        (["a/0.png", "a/1.png", "__MACOSX/a/._0.png", "a/.thumb.png"], ("a",), {"hidden files": 2}),
    ],
    ids=["absolute", "drive", "backslashes", "hidden"],
)
def test_unusual_names_in_an_archive_are_read(tmp_path, names, classes, left_out):
    done = import_images(zip_of(tmp_path / "in.zip", names), tmp_path / "out.h5", progress=False)
    n_images = sum(not name.endswith(("/", "\\")) for name in names) - sum(left_out.values())
    assert (done.classes, done.n_train + done.n_test, dict(done.left_out)) == (classes, n_images, left_out)


def test_names_that_are_not_utf_8_keep_their_images_apart(tmp_path):
    archive = zip_of(tmp_path / "in.zip", ["kind1/0.png", "kind1/1.png", "kind2/0.png", "kind2/1.png"])
    archive.write_bytes(archive.read_bytes().replace(b"kind", b"kin\xe9"))
    done = import_images(archive, tmp_path / "out.h5", progress=False)
    assert (len(done.classes), done.n_train, done.n_test) == (2, 2, 2)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a/0.png", "../b/0.png"], r"\.\./b/0\.png leads out of the archive: pack"),
        (["a/0.png", "a\\..\\..\\b\\0.png"], "leads out of the archive"),
        (["a/0.png", "a/1.png", "a/0.png"], r"a/0\.png is in the archive more than once"),
        (["a/0.png", "./a/0.png"], "more than once"),
        (["a/", "b/"], "holds no images"),
    ],
    ids=["parent", "parent by backslashes", "twice", "twice by another name", "folders only"],
)
def test_archives_that_are_not_clear_are_refused(tmp_path, names, words):
    archive = zip_of(tmp_path / "in.zip", names)
    with pytest.raises(UsageError, match=words) as error:
        import_images(archive, tmp_path / "out.h5", progress=False)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["in.zip"]
