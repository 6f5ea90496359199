"""Opening model directories: layouts, identity, the cache of hashes, and hostile or broken ones."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import tiny

from loreg.checkpoint import Checkpoint, FileStamp
from loreg.errors import BadInput, NotFound

MODEL = tiny.model()
NAMES = list(MODEL)


class Memory:
    """A LeafCache in a dict, which counts."""

    def __init__(self) -> None:
        self.leaves: dict[FileStamp, str] = {}
        self.hits = 0

    def get(self, stamp: FileStamp) -> str | None:
        self.hits += stamp in self.leaves
        return self.leaves.get(stamp)

    def put(self, stamp: FileStamp, leaves: str) -> None:
        self.leaves[stamp] = leaves


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once; otherwise a test would wait two seconds for its own."""
    monkeypatch.setattr("loreg.checkpoint._SETTLED_NS", -(10**12))


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    change(document["weight_map"])
    path.write_text(json.dumps(document))


def sharded(folder: Path) -> Path:
    return tiny.write_model(folder, MODEL, shards=[NAMES[:3], NAMES[3:]])


def test_a_file_a_directory_and_shards_are_the_same_weights(tmp_path: Path) -> None:
    single = tiny.write_model(tmp_path / "single", MODEL)
    manifests = [
        Checkpoint.open(path).manifest()
        for path in (single, single / "model.safetensors", sharded(tmp_path / "shards"))
    ]
    assert manifests[0] == manifests[1] == manifests[2]
    assert manifests[0].nbytes == sum(len(tensor.data) for tensor in MODEL.values())


def test_a_lone_file_of_another_name_is_the_model(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "base", MODEL)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert [shard.name for shard in Checkpoint.open(folder).shards] == ["weights.safetensors"]


def test_side_files_are_all_but_weights_and_hidden_ones(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base")
    for name in ("tokenizer.model", "LICENSE", "pytorch_model.bin", "model.gguf", ".gitattributes", "loreg.json"):
        (folder / name).write_text(name)
    for name in ("code/modeling.py", ".cache/x.json", "onnx/model.ONNX"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    found = [str(path) for path in Checkpoint.open(folder).side_files()]
    assert found == ["LICENSE", "config.json", "tokenizer.model", "tokenizer_config.json", "code/modeling.py"]


def test_a_shard_of_an_unusual_name_is_no_side_file(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base")
    (folder / "model-00001-of-00002.safetensors").rename(folder / "part.one")
    edit_index(folder, lambda weights: weights.update(dict.fromkeys(NAMES[:3], "part.one")))
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.tensors) == set(NAMES)
    assert Path("part.one") not in checkpoint.side_files()


def test_odd_tensors_have_an_identity(tmp_path: Path) -> None:
    odd = {
        "größe.重み.weight": tiny.tensor("F32", [[1.0, 2.0]]),
        "scalar": tiny.tensor("BF16", 1.5),
        "nothing": tiny.tensor("F16", [[], []]),
        "no rows": tiny.Tensor("I64", (0, 7), b""),
        "conv": tiny.tensor("F32", [[[[1.0]]]]),
        "mask": tiny.tensor("BOOL", [True, False]),
    }
    checkpoint = Checkpoint.open(tiny.write_model(tmp_path / "base", odd))
    described = {tensor.name: (tensor.dtype, tensor.shape) for tensor in checkpoint.manifest().tensors}
    assert described == {name: (tensor.dtype, tensor.shape) for name, tensor in odd.items()}
    for name, tensor in odd.items():
        assert b"".join(bytes(chunk) for chunk in checkpoint.tensors[name].chunks(3)) == tensor.data


def test_the_cache_spares_a_second_reading(tmp_path: Path, settled: None) -> None:
    checkpoint, cache, read = Checkpoint.open(sharded(tmp_path / "base")), Memory(), list[int]()
    first = checkpoint.manifest(cache, read.append)
    assert sum(read) == checkpoint.nbytes and cache.hits == 0
    assert checkpoint.manifest(cache, read.append) == first
    assert sum(read) == checkpoint.nbytes and cache.hits == 2


def test_a_file_that_was_just_written_is_not_cached(tmp_path: Path) -> None:
    cache = Memory()
    Checkpoint.open(sharded(tmp_path / "base")).manifest(cache)
    assert not cache.leaves


@pytest.mark.parametrize("restore_mtime", [False, True])
def test_a_change_of_one_byte_is_seen_through_the_cache(tmp_path: Path, settled: None, restore_mtime: bool) -> None:
    folder, cache = tiny.write_model(tmp_path / "base", MODEL), Memory()
    before = Checkpoint.open(folder).manifest(cache)
    path, stat = folder / "model.safetensors", (folder / "model.safetensors").stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    if restore_mtime:  # what rsync, cp -p and tar do; the change time cannot be set
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_mtime_ns == stat.st_mtime_ns
    after = Checkpoint.open(folder).manifest(cache)
    assert cache.hits == 0
    assert [new.name for old, new in zip(before.tensors, after.tensors, strict=True) if old != new] == [
        "lm_head.weight"
    ]


def test_a_file_that_changes_while_it_is_hashed_is_refused(tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path / "base", MODEL) / "model.safetensors"
    checkpoint = Checkpoint.open(path.parent)
    data = path.read_bytes()

    def meddle(done: int) -> None:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    with pytest.raises(BadInput, match="was changed while it was read"):
        checkpoint.manifest(advance=meddle)
    with pytest.raises(BadInput, match="was changed while it was read"):
        checkpoint.check_unchanged()


@pytest.mark.parametrize("cut", [1, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tiny.write_model(tmp_path / "base", MODEL) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BadInput, match=r"truncated|not a safetensors file"):
        Checkpoint.open(path.parent)


def test_a_file_that_is_cut_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path / "base", MODEL) / "model.safetensors"
    checkpoint = Checkpoint.open(path.parent)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(BadInput, match="is truncated"):
        checkpoint.manifest()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w: w.update({"stranger": w[NAMES[0]]}), BadInput, "says that 'stranger' is in"),
        (lambda w: w.pop(NAMES[0]), BadInput, "does not list 'model.embed_tokens.weight'"),
        (lambda w: w.update({NAMES[0]: w[NAMES[-1]]}), BadInput, "says that 'model.embed_tokens.weight' is in"),
        (lambda w: w.update({NAMES[0]: "gone.safetensors"}), NotFound, "gone.safetensors cannot be read"),
        (lambda w: w.update({NAMES[0]: "../base/model-00001-of-00002.safetensors"}), BadInput, "bare file names"),
        (lambda w: w.update({NAMES[0]: "/etc/passwd"}), BadInput, "bare file names"),
        (lambda w: w.update({NAMES[0]: ".."}), BadInput, "bare file names"),
        (lambda w: w.update({NAMES[0]: ""}), BadInput, "bare file names, found ''"),
        (lambda w: w.update({NAMES[0]: "a\0b"}), BadInput, "cannot be the path of a file"),
        (lambda w: w.update({NAMES[0]: "x" * 300}), NotFound, "cannot be read"),
        (lambda w: w.update({NAMES[0]: 1}), BadInput, "a map from tensors to files"),
        (lambda w: w.clear(), BadInput, "holds no tensors"),
    ],
)
def test_an_index_that_lies_is_refused(
    tmp_path: Path, change: Callable[[dict[str, str]], object], error: type[Exception], message: str
) -> None:
    folder = sharded(tmp_path / "base")
    edit_index(folder, change)
    with pytest.raises(error, match=message):
        Checkpoint.open(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "base", MODEL, shards=[NAMES[:4], NAMES[3:]])
    with pytest.raises(BadInput, match=f"tensor '{NAMES[3]}' is in both"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}, "weight_map": {}}', "\xff"]
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(BadInput):
        Checkpoint.open(tmp_path)


def test_a_directory_without_safetensors_is_refused_naming_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holds no weights"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BadInput, match=r"holds pytorch_model.bin, expected model.safetensors .* save_pretrained"):
        Checkpoint.open(tmp_path)
    with pytest.raises(NotFound, match="does not exist"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="not a safetensors file"):
        Checkpoint.open(tmp_path / "pytorch_model.bin")


def test_a_model_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no tensors"):
        Checkpoint.open(tiny.write_model(tmp_path / "base", {}))


def test_a_directory_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base")
    path = folder / "model-00001-of-00002.safetensors"
    path.unlink()
    path.mkdir()
    with pytest.raises((BadInput, NotFound)):
        Checkpoint.open(folder)


def test_a_pipe_in_the_place_of_a_shard_is_refused_unopened(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "base")
    path = folder / "model-00002-of-00002.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BadInput, match=r"model-00002-of-00002\.safetensors is no regular file"), alarm(20):
        Checkpoint.open(folder)


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """An error in the place of a wait without end."""

    def raised(number: int, frame: object) -> NoReturn:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, raised)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, '{"vocab_size": ' + "9" * 5000 + "}", "{", ""])
def test_a_config_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    folder = tiny.write_model(tmp_path / "base", MODEL)
    (folder / "config.json").write_text(text)
    with pytest.raises(BadInput, match=r"config\.json cannot be read as JSON"):
        Checkpoint.open(folder).config()
