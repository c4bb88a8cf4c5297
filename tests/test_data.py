"""Data: what `load` returns, and that no unsound file gets through."""

import codecs
import gzip
import pickle
import shutil
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from effnb.lab.measure import data
from effnb.lab.measure.data import files, sets
from effnb.lab.measure.data.kinds import stratified
from effnb.nas import nanobench, nb201

ROOT = Path(__file__).resolve().parents[1]
IMAGES = {"digits": (1437, 360, (1, 8, 8)), "fashion-mnist-10k": (10000, 2000, (1, 28, 28))}
OPTIONAL = [name for name in data.NAMES if data.available(name) and name not in (*IMAGES, "photos", "python-topics")]


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """An EFFNB_DATA folder that is the only place searched."""
    monkeypatch.setenv("EFFNB_DATA", str(tmp_path))
    monkeypatch.setattr(files, "CHECKOUT", tmp_path / "nowhere")
    monkeypatch.setattr(files, "SYSTEM", tmp_path / "nowhere")
    return tmp_path


def put(folder: Path, relative: str, raw: bytes, monkeypatch) -> None:
    """Write a stand-in file and make its bytes the expected ones."""
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    content = gzip.decompress(raw) if relative.endswith(".gz") else raw
    monkeypatch.setitem(files.SHA256, relative, files.digest(content))


# ---- what comes back -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", IMAGES)
def test_images_have_the_promised_form(name):
    d = data.load(name)
    n_train, n_test, shape = IMAGES[name]
    assert d.x_train.shape == (n_train, *shape) and d.x_test.shape == (n_test, *shape)
    assert d.x_train.dtype == d.x_test.dtype == torch.float32 and d.y_train.dtype == d.y_test.dtype == torch.int64
    assert d.x_train.min() == 0 and d.x_train.max() == 1 and d.x_train.is_contiguous()
    assert len(d.classes) == 10 and d.licence and d.source and len(d.sha256) == 64
    counts = d.y_test.bincount(minlength=10)
    assert counts.max() - counts.min() <= (0 if name == "fashion-mnist-10k" else 2)


def test_loading_twice_gives_equal_tensors_that_share_nothing():
    a, b = data.load("digits"), data.load("digits")
    assert torch.equal(a.x_train, b.x_train) and torch.equal(a.y_test, b.y_test)
    a.x_train.zero_()
    assert b.x_train.sum() > 0


def test_digits_are_scikit_learns_each_once():
    from sklearn.datasets import load_digits

    d, pixels = data.load("digits"), load_digits().images / 16
    ours = torch.cat([d.x_train, d.x_test]).squeeze(1).flatten(1).numpy()
    assert sorted(map(bytes, ours)) == sorted(map(bytes, pixels.reshape(-1, 64).astype(np.float32)))


def test_photos_are_grey_and_without_labels():
    d = data.load("photos")
    assert d.x_train.shape == d.x_test.shape == (427, 640) and d.x_train.dtype == torch.float32
    assert d.x_train.min() >= 0 and d.x_train.max() <= 1 and not torch.equal(d.x_train, d.x_test)
    assert d.y_train is None
    with pytest.raises(ValueError, match="must have labels"):
        d.split(1)


def test_text_is_ascii_prose():
    t = data.load("python-topics").text
    assert t.isascii() and 150_000 < len(t) < 250_000 and t.endswith(".\n")
    assert len(set(t.splitlines())) == t.count("\n")
    assert sum(c.isalpha() or c == " " for c in t) > 0.9 * len(t)


def test_describe_says_the_same_wherever_the_file_lies(tmp_path, monkeypatch):
    here = data.load("python-topics").describe()
    shutil.copy(ROOT / "data/python-topics.txt", tmp_path)
    monkeypatch.setenv("EFFNB_DATA", str(tmp_path))
    assert data.load("python-topics").describe() == here
    assert str(tmp_path) not in repr(data.load("python-topics"))


# ---- validation split ------------------------------------------------------------------------------------------------
def test_split_takes_a_stratified_part_of_train_and_leaves_test_alone():
    d = data.load("fashion-mnist-10k")
    s = d.split(1500, seed=3)
    assert s.y_val.bincount().tolist() == [150] * 10 and s.y_train.bincount().tolist() == [850] * 10
    assert torch.equal(s.x_test, d.x_test) and d.x_val is None
    whole = torch.cat([s.x_train, s.x_val]).flatten(1).double() @ torch.arange(784.0).double()
    assert torch.equal(
        whole.sort().values, (d.x_train.flatten(1).double() @ torch.arange(784.0).double()).sort().values
    )
    assert torch.equal(s.x_val, d.split(1500, seed=3).x_val) and not torch.equal(s.x_val, d.split(1500, seed=4).x_val)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=60), st.data())
def test_stratified_is_proportional_without_repeats(labels, more):
    y = torch.tensor(labels)
    n = more.draw(st.integers(1, len(labels)))
    index = stratified(y, n, seed=0)
    assert len(set(index.tolist())) == n
    share = y.bincount().double() * n / len(labels)
    assert (y[index].bincount(minlength=len(share)) - share).abs().max() <= 1


def test_split_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    data.load("digits").split(100)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("n_val", [0, -1, 1437])
def test_split_checks_its_size(n_val):
    with pytest.raises(ValueError, match=r"n_val must be in \[1, 1436\]"):
        data.load("digits").split(n_val)


def test_split_twice_is_refused():
    with pytest.raises(ValueError, match="no validation split yet"):
        data.load("digits").split(10).split(10)


# ---- unsound files ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damage", [lambda raw: raw[:-100], lambda raw: b"\0" + raw[1:], lambda raw: b""])
@pytest.mark.parametrize("relative", ["fashion-mnist-10k.npz", "python-topics.txt"])
def test_a_damaged_file_is_named_with_both_checksums(relative, damage, bare):
    raw = damage((ROOT / "data" / relative).read_bytes())
    (bare / relative).write_bytes(raw)
    with pytest.raises(data.DataError) as error:
        data.load(Path(relative).stem)
    message = str(error.value)
    assert str(bare / relative) in message and "EFFNB_DATA" in message
    assert files.SHA256[relative] in message and files.digest(raw) in message


def test_a_damaged_file_is_never_passed_over_for_a_sound_one(tmp_path, monkeypatch):
    (tmp_path / "python-topics.txt").write_text("short")
    monkeypatch.setenv("EFFNB_DATA", str(tmp_path))
    with pytest.raises(data.DataError, match="expected f1495462"):
        data.load("python-topics")


@pytest.mark.parametrize("name", [name for name in data.NAMES if data.ENTRIES[name].files])
def test_a_missing_file_is_named_with_checksum_places_and_remedy(name, bare):
    assert not data.available(name)
    with pytest.raises(data.DataError) as error:
        data.load(name)
    first = data.ENTRIES[name].files[0]
    assert first in str(error.value) and files.SHA256[first] in str(error.value) and str(bare) in str(error.value)
    assert f"effnb data fetch {name}" in str(error.value) or "part of the repository" in str(error.value)


def test_a_gzip_file_cut_short_is_an_error(bare, monkeypatch):
    raw = gzip.compress(bytes(5000))
    put(bare, files.FASHION[0], raw, monkeypatch)
    (bare / files.FASHION[0]).write_bytes(raw[:-9])
    with pytest.raises(data.DataError, match="cut short or corrupt"):
        data.load("fashion-mnist")


def test_another_version_of_digits_is_an_error(monkeypatch):
    monkeypatch.setitem(files.SHA256, "scikit-learn/digits", "0" * 64)
    with pytest.raises(data.DataError, match=r"scikit-learn/digits.*another version.*pip install"):
        data.load("digits")


def test_effnb_data_must_be_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFNB_DATA", str(tmp_path / "none"))
    with pytest.raises(data.DataError, match=r"EFFNB_DATA is .*none.*not a folder"):
        data.load("python-topics")


def test_a_relative_effnb_data_counts_from_the_checkout_too(monkeypatch, tmp_path):
    (tmp_path / "sets").mkdir()
    monkeypatch.setattr(files, "CHECKOUT", tmp_path)
    monkeypatch.setenv("EFFNB_DATA", "sets")
    assert files.folder() == tmp_path / "sets"


@pytest.mark.parametrize("call", [data.load, data.available, data.fetch])
def test_an_unknown_name_is_refused_with_the_known_ones(call):
    with pytest.raises(ValueError, match=r"fashion-mnist-10k.*got 'mnist'"):
        call("mnist")


def test_an_option_that_a_set_lacks_is_refused():
    with pytest.raises(TypeError, match="split"):
        data.load("digits", split="full")


def test_only_the_embedded_files_lie_in_the_repository():
    tracked = subprocess.run(["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    known = {".gitattributes", ".gitignore", "README.md", "snippets.LICENSE"}
    found = {Path(t).name for t in tracked if not t.endswith(".py")} - known
    embedded = {file for name in files.EMBEDDED for file in data.ENTRIES[name].files}
    assert found == embedded and len(found) == 5
    readme = (ROOT / "data/README.md").read_text()
    assert all(files.SHA256[name] in readme for name in found)


def test_rated_snippets_hold_both_sets_and_plausible_ratings():
    table = data.load("rated-snippets").table
    assert table["set"].value_counts().to_dict() == {"movie": 10_605, "editorial": 5_190}
    assert table.rating.between(-4, 4).all() and (table.text.str.strip() == table.text).all() and table.text.all()
    movie = table[table["set"] == "movie"]
    words = movie.text.str.contains(r"\b(?:wonderful|delightful)\b"), movie.text.str.contains(r"\b(?:dull|boring)\b")
    assert movie.rating[words[0]].mean() > 1 > -1 > movie.rating[words[1]].mean()


def test_nano_bench_holds_the_sampled_cells_and_spreads():
    nano, widths = data.load("nano-bench").table, data.load("nano-width").table
    assert nano.edges.tolist() == nanobench.sample_cells() and len(widths) == 50
    accuracy = nano[[f"acc_seed{seed}" for seed in range(3)]]
    assert np.allclose(accuracy.mean(axis=1), nano.acc_mean, atol=1e-4) and accuracy.min().min() > 5
    assert (nano.connected == nano.edges.map(nb201.is_connected)).all()
    assert nano[nano.connected == 1].acc_mean.std() > 2
    for row in (nano.iloc[0], widths.iloc[7]):
        net = nanobench.build_net(row.edges, (row.width1, row.width2), row.depth)
        assert sum(p.numel() for p in net.parameters()) == row.params


def test_embedded_files_are_rebuilt_to_the_bit_from_the_originals():
    if not (files.SYSTEM / files.FASHION[0]).is_file() or sys.version_info[:3] != (3, 11, 7):
        pytest.skip("needs the Debian package dataset-fashion-mnist and Python 3.11.7")
    run = subprocess.run([sys.executable, ROOT / "data/make_embedded.py"], capture_output=True, text=True)
    assert run.returncode == 0 and "DIFFERENT" not in run.stdout, run.stdout + run.stderr


# ---- fetch -----------------------------------------------------------------------------------------------------------
def tiny_idx(shape: tuple[int, ...], seed: int) -> bytes:
    values = np.random.default_rng(seed).integers(0, 10, shape, dtype=np.uint8)
    return gzip.compress(struct.pack(f">BBBB{len(shape)}i", 0, 0, 8, len(shape), *shape) + values.tobytes())


@pytest.fixture
def mirror(bare, monkeypatch):
    """A stand-in for the download: four tiny files, whose checksums are the expected ones."""
    packed = {files.FASHION[k]: tiny_idx(s, k) for k, s in enumerate([(6, 28, 28), (6,), (3, 28, 28), (3,)])}
    for relative, raw in packed.items():
        monkeypatch.setitem(files.SHA256, relative, files.digest(gzip.decompress(raw)))

    def retrieve(url, known_hash, fname, path, **_):
        raw = next(raw for relative, raw in packed.items() if url.endswith(Path(relative).name))
        (Path(path) / fname).write_bytes(raw)

    monkeypatch.setattr("pooch.retrieve", retrieve)
    return packed


def test_fetch_puts_verified_files_where_load_finds_them(mirror, bare):
    assert data.fetch("fashion-mnist") == bare / "fashion-mnist"
    d = data.load("fashion-mnist")
    assert d.x_train.shape == (6, 1, 28, 28) and d.y_test.shape == (3,)
    assert sorted(p.name for p in bare.iterdir()) == ["fashion-mnist"]
    assert data.fetch("fashion-mnist") == bare / "fashion-mnist"


def test_fetch_writes_nothing_when_a_download_is_unsound(mirror, bare):
    mirror[files.FASHION[3]] = gzip.compress(b"something else")
    with pytest.raises(data.DataError, match=r"t10k-labels.*Nothing was written"):
        data.fetch("fashion-mnist")
    assert list(bare.iterdir()) == []


def test_fetch_without_a_network_is_a_clear_error(mirror, bare, monkeypatch):
    def fail(url, known_hash, fname, path, **_):
        (Path(path) / fname).write_bytes(b"1")
        raise OSError("no network")

    monkeypatch.setattr("pooch.retrieve", fail)
    with pytest.raises(data.DataError, match="could not be downloaded"):
        data.fetch("fashion-mnist")
    assert list(bare.iterdir()) == []


def test_fetch_tells_what_to_do_by_hand(bare):
    with pytest.raises(data.DataError, match=r"kimiyoung/planetoid(?s:.*)ind.cora.allx  SHA-256"):
        data.fetch("cora")
    assert data.fetch("digits").name == "datasets"


def test_fetch_needs_a_folder_to_write_to(bare, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(data.DataError, match="no folder to write to"):
        data.fetch("fashion-mnist")


# ---- graphs, sentences, tables ---------------------------------------------------------------------------------------
def old_pickle(value: object) -> bytes:
    """Pickle with the names that Python 2 and its numpy and scipy wrote."""
    raw = pickle.dumps(value, protocol=2)
    for new, old in ((b"numpy._core.", b"numpy.core."), (b"scipy.sparse._csr", b"scipy.sparse.csr")):
        raw = raw.replace(new, old)
    return raw


def write_tiny_cora(folder: Path, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """502 + 3 nodes; test ids 504, 502, 505: 503 occurs nowhere, as 15 ids of CiteSeer do not."""
    rng = np.random.default_rng(0)
    features, onehot = (
        rng.integers(0, 2, (505, 6)).astype(np.float32),
        np.eye(3, dtype=np.int32)[rng.integers(0, 3, 505)],
    )
    graph = defaultdict(list, {0: [1, 1, 0], 1: [0], 2: [502], 502: [2], 505: [1]})
    parts = {
        "x": csr_matrix(features[:2]), "tx": csr_matrix(features[502:]), "allx": csr_matrix(features[:502]),
        "y": onehot[:2], "ty": onehot[502:], "ally": onehot[:502], "graph": graph,
    }  # fmt: skip
    for part, value in parts.items():
        put(folder, f"planetoid/Cora/raw/ind.cora.{part}", old_pickle(value), monkeypatch)
    put(folder, "planetoid/Cora/raw/ind.cora.test.index", b"504\n502\n505\n", monkeypatch)
    return features, onehot


@pytest.mark.parametrize("split, n_train", [("public", 2), ("full", 3)])
def test_planetoid_reads_reorders_and_pads(split, n_train, bare, monkeypatch):
    # Python 3 writes bytes through this function, the real files do without it.
    monkeypatch.setitem(sets.ALLOWED, ("_codecs", "encode"), codecs.encode)
    features, onehot = write_tiny_cora(bare, monkeypatch)
    g = data.load("cora", split=split)
    assert g.x.shape == (506, 6) and g.padded.nonzero().flatten().tolist() == [503]
    assert g.edge_index.tolist() == [[0, 1, 1, 2, 502, 505], [1, 0, 505, 502, 2, 1]]
    assert g.test_mask.nonzero().flatten().tolist() == [502, 504, 505]
    # The files list the test rows in the order of test.index.
    assert np.array_equal(g.x[[504, 502, 505]], features[502:]) and not g.x[503].any()
    assert np.array_equal(g.y[[504, 502, 505]], onehot[502:].argmax(1))
    assert np.array_equal(g.x[:502], features[:502]) and g.val_mask.sum() == 500
    assert g.train_mask.sum() == n_train
    assert not (g.train_mask & (g.val_mask | g.test_mask)).any()


def test_a_pickle_may_not_run_code():
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('ran')",))

    for value in (Evil(), {"a": [Evil()]}, np.array([Evil()], dtype=object)):
        with pytest.raises(pickle.UnpicklingError, match="may not ask for"):
            sets.unpickle(old_pickle(value))


def test_an_unknown_split_is_refused():
    for name in ("cora", "pubmed-structure"):
        with pytest.raises(ValueError, match="split must be one of"):
            data.load(name, split="random")


def test_sentences_are_read_as_they_stand(bare, monkeypatch):
    put(bare, "text/trec.train.tsv", "0\thow é ?\n3\twho \u2028 is it\n".encode(), monkeypatch)
    put(bare, "text/trec.test.tsv", b"5\thow many\n", monkeypatch)
    d = data.load("trec")
    assert d.x_train == ["how é ?", "who \u2028 is it"] and d.y_train.tolist() == [0, 3] and d.x_test == ["how many"]


def test_sets_without_an_official_split_draw_one(bare, monkeypatch):
    put(bare, "text/mr.tsv", b"".join(b"%d\ts%d\n" % (k % 2, k) for k in range(40)), monkeypatch)
    d = data.load("mr", n_test=10, seed=1)
    assert len(d.x_train) == 30 and sorted(d.x_train + d.x_test) == sorted(f"s{k}" for k in range(40))
    assert d.y_test.bincount().tolist() == [5, 5] and all(
        int(s[1:]) % 2 == y for s, y in zip(d.x_test, d.y_test, strict=True)
    )
    assert d.x_test != data.load("mr", n_test=10, seed=2).x_test
    assert len(d.split(6).x_val) == 6
    with pytest.raises(ValueError, match="n_test must be in"):
        data.load("mr", n_test=40)


EXPECTED = {
    "fashion-mnist": "60,000 train / 10,000 test, (1, 28, 28), 10 classes",
    "cifar10": "10,000 train / 2,000 test, (3, 32, 32), 10 classes",
    "nas-bench-201": "15,625 architectures, 6,466 distinct, latency on 8 devices",
    "cora": "2,708 nodes, 5,278 edges, 1,433 features, 7 classes, split 140 / 500 / 1,000",
    "citeseer": "3,327 nodes, 4,552 edges, 3,703 features, 6 classes, split 120 / 500 / 1,000",
    "pubmed-structure": "19,717 nodes, 44,324 edges, no features, 3 classes, split 60 / 500 / 1,000",
    "trec": "5,452 train / 500 test, 6 classes",
    "sst2": "6,920 train / 872 validation / 1,821 test, 2 classes",
    "mr": "9,662 train / 1,000 test, 2 classes",
    "subj": "9,000 train / 1,000 test, 2 classes",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_optional_sets_have_their_known_sizes(name):
    if name not in OPTIONAL:
        pytest.skip(f"{name} is not here; {files.remedy(name)}")
    assert data.load(name).size() == EXPECTED[name]


def test_full_splits_and_padding_of_the_real_graphs():
    if not {"cora", "citeseer"} <= set(OPTIONAL):
        pytest.skip("Planetoid is not here")
    assert [int(data.load(n, split="full").train_mask.sum()) for n in ("cora", "citeseer")] == [1208, 1827]
    assert int(data.load("citeseer").padded.sum()) == 15 and not data.load("cora").padded.any()


def test_the_nas_table_has_the_published_optima_and_marks_missing_latencies():
    if "nas-bench-201" not in OPTIONAL:
        pytest.skip("NAS-Bench-201 is not here")
    t = data.load("nas-bench-201").table
    assert t.index.tolist() == list(range(15625)) and t["edges"].str.len().eq(6).all() and t["edges"].is_unique
    assert t[["cifar10_test", "cifar100_test", "imagenet16_120_test"]].max().round(2).tolist() == [94.37, 73.51, 47.31]
    assert t["latency_pixel3"].isna().sum() == 202 and t["latency_raspi4"].isna().sum() == 157
    assert t.drop(columns=["latency_pixel3", "latency_raspi4"]).notna().all(axis=None)


def test_every_loader_reads_only_files_of_the_table():
    read = {relative for entry in data.ENTRIES.values() for relative in entry.files}
    assert read == {key for key in files.SHA256 if not key.startswith("scikit-learn/")}
    assert set(sets.SENTENCE_CLASSES) == set(sets.CITED)
