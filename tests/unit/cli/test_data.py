"""Every kind of data is read, and bad data are named."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.cli import data
from offramp.core.errors import InvalidInput, MissingExtra

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three 6x8 images, each of one grey."""
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((6, 8, 3), 100 * number + i, np.uint8)).save(tmp_path / "pets" / name / f"{i}.png")
    return tmp_path / "pets"


@pytest.fixture
def texts() -> data.Texts:
    return data.words(["a good film", "a bad film"], size=50)


def arrays(path: Path, **held: np.ndarray) -> str:
    np.savez(path / "a.npz", **held)
    return str(path / "a.npz")


class TestImageFolder:
    def test_classes_in_order(self, folder: Path) -> None:
        records = data.read(str(folder))
        assert records.classes == ("cat", "dog")
        assert records.labels is not None and records.labels.tolist() == [0, 0, 0, 1, 1, 1]
        image, label = records[4]
        assert image.shape == (3, 6, 8) and label == 1
        assert torch.allclose(image, torch.full((3, 6, 8), 101 / 255))

    def test_prepared(self, folder: Path) -> None:
        wanted = data.Images((4, 4), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), crop=0.9)
        image, _ = data.read(str(folder), images=wanted)[5]
        assert image.shape == (3, 4, 4)
        assert torch.allclose(image, torch.full((3, 4, 4), (102 / 255 - 0.5) / 0.25), atol=1e-5)

    def test_grey(self, folder: Path) -> None:
        image, _ = data.read(str(folder), images=data.Images(channels=1))[1]
        assert image.shape == (1, 6, 8)

    def test_splits(self, folder: Path) -> None:
        (folder.parent / "all").mkdir()
        folder.rename(folder.parent / "all" / "train")
        with pytest.raises(InvalidInput, match="choose one with --split"):
            data.read(str(folder.parent / "all"))
        assert len(data.read(str(folder.parent / "all"), split="train")) == 6
        with pytest.raises(InvalidInput, match="no split 'tset'; it holds: train"):
            data.read(str(folder.parent / "all"), split="tset")

    def test_given_classes_fix_the_numbers(self, folder: Path) -> None:
        records = data.read(str(folder), classes=("ant", "cat", "dog"))
        assert records.labels is not None and records.labels.tolist() == [1, 1, 1, 2, 2, 2]
        with pytest.raises(InvalidInput, match="unknown label 'cat'"):
            data.read(str(folder), classes=("ant", "dog"))

    def test_unreadable_image_is_named(self, folder: Path) -> None:
        (folder / "dog" / "1.png").write_bytes(b"not an image")
        records = data.read(str(folder))
        with pytest.raises(InvalidInput, match=r"dog/1\.png is not a readable image"):
            list(records.loader(6))

    def test_truncated_image_is_named(self, folder: Path) -> None:
        file = folder / "dog" / "2.png"
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file)
        file.write_bytes(file.read_bytes()[:2000])
        with pytest.raises(InvalidInput, match=r"dog/2\.png is not a readable image"):
            data.read(str(folder))[5]

    def test_empty(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match="holds no images"):
            data.read(str(tmp_path))

    def test_flat_folder_has_no_labels(self, folder: Path) -> None:
        with pytest.raises(InvalidInput, match="no class folders"):
            data.read(str(folder / "cat"))
        records = data.read(str(folder / "cat"), labels_needed=False)
        assert records.labels is None
        assert isinstance(next(iter(records.loader(2))), torch.Tensor)

    def test_different_sizes(self, folder: Path) -> None:
        Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(folder / "cat" / "0.png")
        with pytest.raises(InvalidInput, match="--image-size"):
            list(data.read(str(folder)).loader(6))


class TestArrays:
    @pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 8, 3), (4, 3, 8, 8), (4, 1, 8, 8)])
    def test_layouts_of_images(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        records = data.read(arrays(tmp_path, x=x, y=np.arange(4)))
        channels = 3 if 3 in shape else 1
        image = records[2][0]
        assert records.kind == "image" and image.shape == (channels, 8, 8)
        expected = x[2] if shape[1] in (1, 3) else np.moveaxis(x[2], -1, 0) if len(shape) == 4 else x[2][None]
        assert torch.equal(image, torch.from_numpy(np.ascontiguousarray(expected)).float() / 255)

    def test_vectors(self, tmp_path: Path) -> None:
        records = data.read(arrays(tmp_path, x=np.ones((4, 5)), y=np.array([0, 1, 0, 2])))
        assert records.kind == "array" and records[0][0].dtype == torch.float32 and records.classes == ("0", "1", "2")

    def test_splits_and_keys(self, tmp_path: Path) -> None:
        spec = arrays(tmp_path, x_train=np.ones((4, 5)), y_train=np.zeros(4, int), x_test=np.ones((2, 5)), y_test=np.ones(2, int))
        assert len(data.read(spec, split="test")) == 2
        assert len(data.read(f"{spec}::x_train,y_train")) == 4
        with pytest.raises(InvalidInput, match="no array named x; it holds: x_train"):
            data.read(spec)
        with pytest.raises(InvalidInput, match="no array 'x_val'"):
            data.read(f"{spec}::x_val,y_train")

    def test_encoded_images(self, tmp_path: Path) -> None:
        files = []
        for i in range(3):
            Image.fromarray(np.full((4, 4, 3), 50 * i, np.uint8)).save(tmp_path / "one.png")
            files.append(np.frombuffer((tmp_path / "one.png").read_bytes(), np.uint8))
        off = np.cumsum([0, *map(len, files)])
        held = {"png_train": np.concatenate(files), "off_train": off, "y_train": np.arange(3), "classes": np.array(["a", "b", "c"])}
        records = data.read(arrays(tmp_path, **held), split="train")
        assert records.classes == ("a", "b", "c") and len(records) == 3
        assert torch.allclose(records[2][0], torch.full((3, 4, 4), 100 / 255))
        spoilt = held["png_train"].copy()
        spoilt[off[1] : off[2]] = 0
        with pytest.raises(InvalidInput, match="image 1 is not a readable image"):
            data.read(arrays(tmp_path, **{**held, "png_train": spoilt}), split="train")[1]
        with pytest.raises(InvalidInput, match="ascending"):
            data.read(arrays(tmp_path, **{**held, "off_train": off[::-1].copy()}), split="train")

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_not_a_number_is_named(self, tmp_path: Path, bad: float) -> None:
        x = np.zeros((5, 3), np.float32)
        x[3, 1] = bad
        with pytest.raises(InvalidInput, match="row 3 of 'x' holds NaN or infinity"):
            data.read(arrays(tmp_path, x=x, y=np.zeros(5, int)))

    def test_labels(self, tmp_path: Path) -> None:
        x = np.zeros((3, 2), np.float32)
        with pytest.raises(InvalidInput, match="row 1 has label -1"):
            data.read(arrays(tmp_path, x=x, y=np.array([0, -1, 0])))
        with pytest.raises(InvalidInput, match="3 items but 2 labels"):
            data.read(arrays(tmp_path, x=x, y=np.array([0, 1])))
        with pytest.raises(InvalidInput, match="row 2 has no label"):
            data.read(arrays(tmp_path, x=x, y=np.array([0, 1, np.nan])))
        with pytest.raises(InvalidInput, match="no labels named y"):
            data.read(arrays(tmp_path, x=x))
        records = data.read(arrays(tmp_path, x=x, y=np.array([0, 7, 1])))
        with pytest.raises(InvalidInput, match=r"row 1 has label 7, but the model answers with 5 classes"):
            records.check_labels(5)
        records.check_labels(8)

    def test_pickled_objects_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput, match="nothing is unpickled"):
            data.read(arrays(tmp_path, x=np.array([{}, {}], dtype=object), y=np.zeros(2, int)))

    def test_foreign_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.npz").write_bytes(b"hello")
        with pytest.raises(InvalidInput, match=r"not an .npz file"):
            data.read(str(tmp_path / "a.npz"))
        np.savez(tmp_path / "b.npz", x=np.zeros((3, 2), np.float32), y=np.arange(3))
        for kept in (30, 200, -20):
            (tmp_path / "a.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:kept])
            with pytest.raises(InvalidInput, match=r"truncated"):
                data.read(str(tmp_path / "a.npz"))


class TestTables:
    def test_tsv_keeps_quotes(self, tmp_path: Path, texts: data.Texts) -> None:
        (tmp_path / "t.tsv").write_text('label\ttext\n1\ta "good film\n0\ta bad film\n', encoding="utf-8")
        records = data.read(str(tmp_path / "t.tsv"), texts=texts)
        assert records.raw(0) == 'a "good film'
        inputs, labels = records.collate([records[0], records[1]])
        assert labels.tolist() == [1, 0]
        assert inputs["input_ids"].shape == (2, 5) and inputs["attention_mask"].tolist() == [[1] * 5, [1] * 4 + [0]]

    @pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
    def test_csv_compressed(self, tmp_path: Path, texts: data.Texts, suffix: str) -> None:
        content = b'review,class\n"good, very ""good""",pos\n"bad\nfilm",neg\n'
        content = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[suffix](content)
        (tmp_path / f"t.csv{suffix}").write_bytes(content)
        records = data.read(str(tmp_path / f"t.csv{suffix}"), texts=texts)
        assert records.raw(0) == 'good, very "good"' and records.classes == ("neg", "pos")
        assert records.labels is not None and records.labels.tolist() == [1, 0]

    def test_pairs(self, tmp_path: Path, texts: data.Texts) -> None:
        (tmp_path / "t.tsv").write_text("label\tpremise\thypothesis\n1\ta good film\ta film\n", encoding="utf-8")
        records = data.read(str(tmp_path / "t.tsv"), texts=texts)
        ids = records[0][0]["input_ids"].tolist()
        assert ids.count(3) == 1 and len(ids) == 1 + 3 + 1 + 2

    def test_columns_by_name(self, tmp_path: Path, texts: data.Texts) -> None:
        (tmp_path / "t.csv").write_text("words,mark\na film,3\n", encoding="utf-8")
        for options in ({"text_columns": ["words"], "label_column": "mark"}, {}):
            spec = str(tmp_path / "t.csv") + ("" if options else "::words,mark")
            assert data.read(spec, texts=texts, **options).labels.tolist() == [3]
        with pytest.raises(InvalidInput, match=r"no column named label .*; it has: words, mark"):
            data.read(str(tmp_path / "t.csv"), texts=texts)
        with pytest.raises(InvalidInput, match="no column 'word'; it has: words, mark"):
            data.read(f"{tmp_path}/t.csv::word,mark", texts=texts)

    def test_parquet(self, tmp_path: Path, texts: data.Texts) -> None:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"text": ["a film", "bad"], "label": [1, 0]}), tmp_path / "t.parquet")
        records = data.read(str(tmp_path / "t.parquet"), texts=texts)
        assert records.labels is not None and records.labels.tolist() == [1, 0]
        (tmp_path / "bad.parquet").write_bytes(b"hello")
        with pytest.raises(InvalidInput, match="not a Parquet file"):
            data.read(str(tmp_path / "bad.parquet"), texts=texts)

    def test_bad_rows(self, tmp_path: Path, texts: data.Texts) -> None:
        file = tmp_path / "t.tsv"
        for content, message in [
            ("label\ttext\n1\ta film\n0\n", "row 1 has 1 fields, the header has 2"),
            ("label\ttext\n1\t \n", "row 0 has no text in column 'text'"),
            ("label\ttext\n\ta film\n", "row 0 has no label"),
            ("label\ttext\n", "holds no items"),
            ("", "is empty"),
        ]:
            file.write_text(content, encoding="utf-8")
            with pytest.raises(InvalidInput, match=message):
                data.read(str(file), texts=texts)
        (tmp_path / "t.tsv.xz").write_bytes(lzma.compress(b"label\ttext\n1\tfilm\n")[:-20])
        with pytest.raises(InvalidInput, match="cannot be read"):
            data.read(str(tmp_path / "t.tsv.xz"), texts=texts)

    def test_needs_a_tokenizer(self, tmp_path: Path) -> None:
        (tmp_path / "t.tsv").write_text("label\ttext\n1\ta\n", encoding="utf-8")
        with pytest.raises(InvalidInput, match="--tokenizer"):
            data.read(str(tmp_path / "t.tsv"))


class TestSavedDatasets:
    def test_text_and_splits(self, tmp_path: Path, texts: data.Texts) -> None:
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
        part = datasets.Dataset.from_dict({"text": ["a film", "bad"], "label": [1, 0]}, features=features)
        datasets.DatasetDict({"train": part}).save_to_disk(tmp_path / "d")
        records = data.read(str(tmp_path / "d"), split="train", texts=texts)
        assert records.classes == ("neg", "pos") and records.labels is not None and records.labels.tolist() == [1, 0]
        with pytest.raises(InvalidInput, match="it holds: train"):
            data.read(str(tmp_path / "d"), texts=texts)

    def test_images(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        pictures = [Image.fromarray(np.full((4, 4, 3), 10 * i, np.uint8)) for i in range(3)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 2]}, features=features).save_to_disk(tmp_path / "d")
        records = data.read(str(tmp_path / "d"))
        assert records.kind == "image" and torch.allclose(records[2][0], torch.full((3, 4, 4), 20 / 255))


class TestParts:
    def test_disjoint_and_complete(self, tmp_path: Path) -> None:
        records = data.read(arrays(tmp_path, x=np.arange(20.0).reshape(10, 2), y=np.arange(10)))
        rows = [set(records.part(a, b).rows.tolist()) for a, b in ((0, 0.6), (0.6, 0.8), (0.8, 1))]
        assert [len(r) for r in rows] == [6, 2, 2] and set.union(*rows) == set(range(10))
        part = records.part(0.6, 0.8)
        assert part.labels is not None and part.labels.tolist() == part.rows.tolist()
        assert records.part(0, 0.6, seed=1).rows.tolist() != records.part(0, 0.6).rows.tolist()
        for start, stop in ((0.5, 0.5), (-0.1, 0.5), (0.5, 1.5), (0.0, 0.01)):
            with pytest.raises(InvalidInput):
                records.part(start, stop)

    def test_missing_file_names_its_neighbours(self, tmp_path: Path) -> None:
        (tmp_path / "photos.npz").touch()
        with pytest.raises(InvalidInput, match=r"No file or folder at .*photo\.npz.*photos\.npz"):
            data.read(str(tmp_path / "photo.npz"))

    def test_unknown_kind(self, tmp_path: Path) -> None:
        (tmp_path / "a.doc").touch()
        with pytest.raises(InvalidInput, match="unknown kind of data"):
            data.read(str(tmp_path / "a.doc"))


class TestTokenizers:
    def test_file(self, tmp_path: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 3, "a": 0, "film": 1, "[UNK]": 2}, unk_token="[UNK]"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(str(tmp_path / "t.json"))
        texts = data.tokenizer(str(tmp_path / "t.json"), max_length=2)
        assert texts.tokenize(["a good film"])["input_ids"] == [[0, 2]] and texts.pad == {"input_ids": 3}
        (tmp_path / "bad.json").write_text(json.dumps({"x": 1}))
        with pytest.raises(InvalidInput, match="not a tokenizer file"):
            data.tokenizer(str(tmp_path / "bad.json"))
        with pytest.raises(InvalidInput, match="No tokenizer file"):
            data.tokenizer(str(tmp_path / "none.json"))

    def test_words_by_frequency(self) -> None:
        texts = data.words(["b a a", "a b c"], size=6, max_length=4)
        assert texts.tokenize(["a b c a a a"])["input_ids"] == [[1, 4, 5, 2]]


def test_missing_package_names_the_extra() -> None:
    with pytest.raises(MissingExtra, match=r"pip install 'offramp\[hf\]'"):
        data.optional("no_such_package_here", "hf", "Reading")
