"""Before a model is loaded, its size is compared with the machine's memory."""

import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.choices import ApplyOptions
from abl_mlx.cli.main import cli
from abl_mlx.commands import measure_apply
from abl_mlx.inputs.sources import Source
from abl_mlx.models import chat_model, memory
from abl_mlx.models.memory import Memory
from abl_mlx.outputs.model_file import open_model
from convert.base.errors import UserError

GB = 10**9


@pytest.fixture
def folder(tmp_path):
    """A folder with 20 GB of weights, on a disk that keeps no zeros."""
    place = tmp_path / "big"
    place.mkdir()
    for part in (1, 2):
        with open(place / f"model-0000{part}-of-00002.safetensors", "wb") as stream:
            stream.truncate(10 * GB)
    (place / "tokenizer.json").write_text("{}")
    return open_model(Source("org/Big", place))


def test_a_model_larger_than_the_machine_is_refused_in_a_sentence(folder):
    says = r"Big has 20.0 GB of weights, but this machine has 16.0 GB"
    with pytest.raises(UserError, match=says):
        memory.check("Big", folder.size, memory=Memory(16 * GB, 9 * GB))
    assert not memory.fits(folder.size, Memory(16 * GB, None))


def test_no_memory_check_says_it_and_goes_on(folder, capsys):
    memory.check("Big", folder.size, asked=False, memory=Memory(16 * GB, 9 * GB))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "Big needs about 21.7 GB of memory; this machine has 16.0 GB, 9.0 GB of it free: expect it "
        "to be slow.\n"
    )


@pytest.mark.parametrize(("free", "slow"), [(30 * GB, False), (21 * GB, True), (None, False)])
def test_a_model_that_fits_is_told_what_it_takes(folder, free, slow, capsys):
    memory.check("Big", folder.size, memory=Memory(32 * GB, free))
    assert ("slow" in capsys.readouterr().err) == slow
    assert memory.fits(folder.size, Memory(32 * GB, free))


def test_small_models_go_without_saying(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    memory.check("small", open_model(Source("small", tmp_path)).size, memory=Memory(GB, GB))
    assert capsys.readouterr().err == ""


def test_all_parts_of_a_split_gguf_count(tmp_path):
    for part in (1, 2, 3):
        (tmp_path / f"m-0000{part}-of-00003.gguf").write_bytes(bytes(100))
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(bytes(7))
    assert open_model(Source("m", tmp_path / "m-00002-of-00003.gguf")).size == 300
    (tmp_path / "one.gguf").write_bytes(bytes(11))
    assert open_model(Source("one", tmp_path / "one.gguf")).size == 11


def test_the_machine_has_some_memory():
    here = memory.machine()
    assert 10**8 < here.total < 10**14
    assert here.free is None or 0 < here.free <= here.total


@pytest.fixture
def direction(tmp_path):
    path = tmp_path / "r.npy"
    np.save(path, np.random.default_rng(0).standard_normal(64).astype(np.float32))
    return path


@pytest.mark.parametrize("arch", ["gemma2", "qwen3_moe"])
def test_lazy_writes_the_same_bytes_and_never_loads(
    arch, tiny_folder, direction, tmp_path, monkeypatch
):
    source = str(tiny_folder(arch))
    measure_apply.apply(direction, source, [tmp_path / "held"], ApplyOptions())
    monkeypatch.setattr(chat_model, "load", None)  # to call it would fail
    measure_apply.apply(direction, source, [tmp_path / "lazy"], ApplyOptions.of(lazy=True))
    held, lazy = (tmp_path / name / "model.safetensors" for name in ("held", "lazy"))
    assert held.read_bytes() == lazy.read_bytes()
    assert held.read_bytes() != (tiny_folder(arch) / "model.safetensors").read_bytes()


def test_apply_is_lazy_unasked_where_the_model_does_not_fit(
    tiny_folder, direction, tmp_path, monkeypatch
):
    monkeypatch.setattr(chat_model, "load", None)
    monkeypatch.setattr(memory, "machine", lambda: Memory(100_000, None))
    measure_apply.apply(direction, str(tiny_folder("llama")), [tmp_path / "out"], ApplyOptions())
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("command", ["run", "measure", "eval"])
def test_commands_refuse_before_loading(command, folder, tmp_path, monkeypatch):
    """The folder holds zeros; no command gets so far as to see that."""
    (folder.source.path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(memory, "machine", lambda: Memory(16 * GB, None))
    # With these flags a model is not streamed.
    out = {
        "run": ["-o", tmp_path / "x", "--search", 5],
        "measure": ["-o", tmp_path / "x.safetensors", "--method", "som"],
    }
    words = [command, str(folder.source.path), *map(str, out.get(command, []))]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1
    assert "20.0 GB of weights, but this machine has 16.0 GB of memory" in result.output
    assert "--no-memory-check" in result.output
