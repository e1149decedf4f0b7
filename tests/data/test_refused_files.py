"""Data files that reach outside themselves, declare what they do not hold, or are damaged."""

import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from benchmarks.damage import damaged
from mpitrain.cli.main import main
from mpitrain.data import data_writer, digest, load
from mpitrain.data.image_import import import_images
from mpitrain.errors import UsageError
from mpitrain.records import contained_file

SHAPE = (700, 3, 5, 4)


def external_storage(file, folder):
    (folder / "secret").write_bytes(bytes(range(256)) * 200)
    del file["train/images"]
    file.create_dataset("train/images", SHAPE, np.uint8, external=[(str(folder / "secret"), 0, 42_000)])


def external_link(file, folder):
    with h5py.File(folder / "other.h5", "w") as other:
        other["images"] = np.zeros(SHAPE, np.uint8)
    del file["train/images"]
    file["train/images"] = h5py.ExternalLink(str(folder / "other.h5"), "/images")


def soft_link(file, folder):
    file.move("train/images", "images")
    file["train/images"] = h5py.SoftLink("/images")


def second_name(file, folder):
    file["more"] = file["train"]


def group_in_itself(file, folder):
    file["train/more"] = file["train"]


def virtual(file, folder):
    del file["train/images"]
    layout = h5py.VirtualLayout(SHAPE, np.uint8)
    layout[:] = h5py.VirtualSource(str(folder / "missing.h5"), "images", SHAPE)
    file.create_virtual_dataset("train/images", layout)


def huge_in_chunks(file, folder):
    for name, shape, dtype in (("images", (10**12, 3, 5, 4), np.uint8), ("labels", (10**12,), np.int64)):
        del file[f"train/{name}"]
        file.create_dataset(f"train/{name}", shape, dtype, chunks=(100, *shape[1:]))


def huge_and_compressed(file, folder):
    for name, shape, dtype in (("images", (10**12, 3, 5, 4), np.uint8), ("labels", (10**12,), np.int64)):
        del file[f"train/{name}"]
        file.create_dataset(f"train/{name}", shape, dtype, chunks=(100, *shape[1:]), compression="gzip")


def never_written(file, folder):
    del file["train/images"]
    file.create_dataset("train/images", SHAPE, np.uint8, chunks=(7, *SHAPE[1:]))


def written_in_part(file, folder):
    never_written(file, folder)
    file["train/images"][:300] = 1


def huge_attribute(file, folder):
    file.create_group("notes").attrs.create("all", np.zeros(2**22, np.int64))


def deep_groups(file, folder):
    file.create_group("/".join("g" * 300))


REFUSED = {
    external_storage: "keeps its elements in another file",
    external_link: "is a link to another place or file",
    soft_link: "is a link to another place or file",
    second_name: "under a second name",
    group_in_itself: "under a second name",
    virtual: "is a virtual array",
    huge_in_chunks: "more than the file can hold",
    huge_and_compressed: "more than the file can hold",
    never_written: "train/images' declares .* (not stored|more than the file can hold)",
    written_in_part: "train/images' declares .* (not stored|more than the file can hold)",
    huge_attribute: "has an attribute of",
    deep_groups: "too deeply nested",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_file_that_does_not_hold_its_contents_is_refused(data_file, lone, change):
    with h5py.File(data_file, "a", libver="latest" if change is huge_attribute else "earliest") as file:
        change(file, data_file.parent)
    with pytest.raises(UsageError, match=REFUSED[change]) as caught:
        load(str(data_file), world=lone)
    assert "some.h5" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"chunks": None}], ids=str)
def test_a_file_in_another_layout_is_read(data_file, lone, options):
    with h5py.File(data_file, "a") as file:
        images = file["train/images"][:]
        del file["train/images"]
        file.create_dataset("train/images", data=images, **options)
    found = load(str(data_file), world=lone)
    np.testing.assert_array_equal(found.train_images.select(np.arange(700)), images)


# ---- the digest ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A folder with images and the data file that was imported from it."""
    folder = tmp_path_factory.mktemp("imported")
    draw = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / "images" / label).mkdir(parents=True)
        for k in range(30):
            pixels = draw.integers(256, size=(8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{k}.png")
    import_images(folder / "images", folder / "data.h5", progress=False)
    return folder


def test_an_imported_file_has_its_digest(imported, lone, capsys):
    assert len(digest.verify(imported / "data.h5")) == 64
    assert load(str(imported / "data.h5"), world=lone, verify=True).n_train == 54
    assert main(["data", "verify", str(imported / "data.h5")]) == 0
    assert "its contents match its digest" in capsys.readouterr().out


def test_a_file_without_a_digest_is_not_verified(data_file, lone, capsys):
    assert load(str(data_file), world=lone).n_train == 700
    with pytest.raises(UsageError, match="has no digest"):
        load(str(data_file), world=lone, verify=True)
    assert main(["data", "verify", str(data_file)]) == 2


@pytest.mark.parametrize("seed", range(100))
def test_a_damaged_file_is_never_verified(imported, tmp_path, lone, seed):
    file = tmp_path / "data.h5"
    file.write_bytes(damaged((imported / "data.h5").read_bytes(), seed))
    with pytest.raises(UsageError) as caught:
        load(str(file), world=lone, verify=True)
    assert "\n" not in str(caught.value)


# ---- full disks ---------------------------------------------------------------------------------------------


def test_an_import_onto_a_full_disk_leaves_the_previous_file(imported, tmp_path):
    """A limit of the process replaces the disk: HDF5 may crash after a failed write, at the latest at the exit."""
    target = tmp_path / "data.h5"
    target.write_bytes(b"previous")
    script = (
        "import resource, sys\n"
        "from mpitrain.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, -1))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["data", "import", "images", str(imported / "images"), str(target), "--quiet"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr == f"mpitrain: error: cannot write {target} (File too large): choose a folder that can be written\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data.h5"]
    assert target.read_bytes() == b"previous"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("n_writes", [0, 1, 5])
def test_a_write_that_fails_at_any_moment_is_one_line(imported, tmp_path, monkeypatch, number, n_writes):
    class Failing:
        def __init__(self, file):
            self.file, self.left = file, n_writes

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.left -= 1
            if self.left < 0:
                raise OSError(number, os.strerror(number))
            return self.file.write(data)

    class FailingFile(contained_file.ContainedFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self._file = Failing(self._file)

    monkeypatch.setattr(data_writer, "ContainedFile", FailingFile)
    with pytest.raises(UsageError, match=rf"cannot write .*data.h5 \({os.strerror(number)}\)"):
        import_images(imported / "images", tmp_path / "data.h5", progress=False)
    assert not list(tmp_path.iterdir())


# ---- archives -----------------------------------------------------------------------------------------------


def test_a_member_that_is_no_image_is_not_read_whole(imported, tmp_path):
    """A zip bomb of 384 MiB in 400 kB: the import fails without the memory for it."""
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((imported / "images").rglob("*.png")):
            archive.write(file, file.relative_to(imported / "images").as_posix())
        with archive.open("cat/large.png", "w", force_zip64=True) as member:
            for _ in range(384):
                member.write(bytes(2**20))
    script = (
        "import resource, sys\n"
        "import mpitrain.cli.data, mpitrain.data.image_import, torch\n"
        "from mpitrain.cli.main import main\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "code = main(sys.argv[1:])\n"
        "print('growth', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
        "sys.exit(code)\n"
    )
    words = ["data", "import", "images", str(bomb), str(tmp_path / "data.h5"), "--quiet"]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cat/large.png" in done.stderr
    assert done.stderr.count("\n") == 1
    assert int(done.stdout.split()[-1]) < 128  # MiB, and the member has 384
