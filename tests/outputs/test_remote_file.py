"""Models on Hugging Face of which parts are read, on a small Hugging Face on this machine."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.cli.main import cli
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import direction_file
from abl_mlx.inputs import mirror
from abl_mlx.inputs.hub import Reference
from convert.base.errors import UserError
from tests.models.test_writers import random_direction
from tests.support import hub_server
from tests.support.command import abl_mlx, fails
from tests.support.hub_environment import taken_for_the_hub
from tests.support.hub_server import Hub

PLAIN, EDITED, LAYER = "some/plain", "some/edited", "some/layer-2"
GGUF, GGUFS = "some/plain-GGUF", "Small-Q8_0.gguf"


def held(repository: str, folder: Path) -> dict[str, bytes]:
    return {f"{repository} {one.name}": one.read_bytes() for one in folder.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model, an edited one, and one in GGUF."""
    top = tmp_path_factory.mktemp("models")
    direction_file.save(top / "d.safetensors", direction_file.DirectionFile(random_direction(256)))
    abl_mlx("apply", top / "d.safetensors", "demo", "-o", top / "edited")
    part = "--layers", "2", "--no-embedding"
    abl_mlx("apply", top / "d.safetensors", "demo", "-o", top / "layer", *part)
    abl_mlx("convert", "demo", top / GGUFS, "--quantize", "Q8_0")
    for folder in (top / "edited", top / "layer"):
        for file in (folder / "README.md", folder / "abl.json"):
            file.unlink()
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace('"abl_mlx"', '"other"'))
    return {
        **held(PLAIN, MODEL_PATH),
        **held(EDITED, top / "edited"),
        **held(LAYER, top / "layer"),
        f"{GGUF} {GGUFS}": (top / GGUFS).read_bytes(),
    }


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    repositories: dict[str, list[str]] = {}
    for name in files:
        repository, file = name.split(" ", 1)
        repositories.setdefault(repository, []).append(file)
    with hub_server.serve(Hub(repositories, dict(files))) as state:
        taken_for_the_hub(state.url, tmp_path, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield state


def spans(hub: Hub) -> int:
    """Bytes that the hub was asked for."""
    ranges = [wanted for _, wanted, _, status in hub.asked if status == 206 and wanted]
    ends = [one.removeprefix("bytes=").split("-") for one in ranges]
    return sum(1 + int(end) - int(start) for start, end in ends)


def test_an_edit_is_seen_in_parts_which_are_kept_for_the_next_time(hub: Hub) -> None:
    found = abl_mlx("audit", f"hf:{EDITED}", "--fail-on", "not-edited")
    assert found["weights"]["verdict"] == "edited"
    (part,) = found["parts_read"]
    assert part["read"] == spans(hub)
    assert part["kept"] == 0
    assert part["share"] == part["read"] / part["total"] < 0.3
    file = hub.files[f"{EDITED} model.safetensors"]
    assert found["hashes"] == {"model.safetensors": hashlib.sha256(file).hexdigest()}
    hub.asked.clear()
    again = abl_mlx("audit", f"hf:{EDITED}")
    assert (again["weights"], hub.asked) == (found["weights"], [])
    assert again["parts_read"][0] | {"read": 0} == part | {"read": 0, "kept": part["read"]}


def test_against_a_base_on_this_machine_or_there(hub: Hub) -> None:
    for base in ("demo", f"hf:{PLAIN}"):
        found = abl_mlx("audit", f"hf:{EDITED}", "--base", base)
        assert found["weights"]["verdict"] == "edited"
        assert found["weights"]["strength"] == pytest.approx(1, abs=0.01)
    assert [one["model"] for one in found["parts_read"]] == [EDITED, PLAIN]
    same = abl_mlx("audit", "demo", "--base", f"hf:{PLAIN}")
    assert same["verdict"] == "not edited"
    assert "the first 16 rows of every residual writer are the same" in same["evidence"][0]


def test_a_downloaded_model_is_not_read_in_parts(hub: Hub) -> None:
    import huggingface_hub

    huggingface_hub.snapshot_download(PLAIN)
    found = abl_mlx("audit", PLAIN, "--base", "demo")
    assert found["verdict"] == "not edited"
    assert "parts_read" not in found
    assert not hub.asked


def test_an_edit_is_learned_from_its_writers(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "edit.safetensors"
    found = abl_mlx("learn", "demo", f"hf:{EDITED}", "-o", out)
    assert (found["verdict"], found["rank"], found["strength"]) == ("edited", 1, 1)
    learned = np.asarray(direction_file.read(out).selected)
    true = np.asarray(random_direction(256))
    assert abs(float((learned @ true.T).item())) > 0.9999
    assert found["parts_read"][0]["share"] < 0.5
    assert "others" not in found


def test_of_writers_that_are_the_base_s_own_only_first_rows_are_read(hub: Hub) -> None:
    whole = abl_mlx("learn", f"hf:{PLAIN}", f"hf:{EDITED}")["parts_read"]
    found = abl_mlx("learn", f"hf:{PLAIN}", f"hf:{LAYER}")
    assert (found["verdict"], found["layers"], found["strength"]) == ("edited", [2], 1)
    assert found["recipe"]["embedding"] is False
    edited = {name for name, one in found["writers"].items() if one["edited"]}
    assert edited == {
        f"model.layers.2.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    shares = [one["share"] for one in found["parts_read"]]
    assert max(shares) < 0.5 * min(one["share"] for one in whole)


def opened(repository: str = GGUF) -> mirror.Mirror:
    return mirror.Mirror(Reference(repository))


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub: Hub) -> None:
    hub.stores = True
    found = opened()
    found.need({GGUFS: [(0, 100), (5000, 6000)]})
    found.need({GGUFS: [(50, 200), (9000, 9001)]})
    held = found.path(GGUFS).read_bytes()
    whole = hub.files[f"{GGUF} {GGUFS}"]
    assert (held[:200], held[5000:6000], held[9000]) == (whole[:200], whole[5000:6000], whole[9000])
    assert held[300:5000] == bytes(4700)
    hosted = [token for path, _, token, _ in hub.asked if not path.startswith("/storage")]
    stored = [token for path, _, token, _ in hub.asked if path.startswith("/storage")]
    assert hosted
    assert all(hosted)
    assert not any(stored)
    assert len(hosted) <= 2 < len(stored)
    assert spans(hub) == found.fetched == 100 + 1000 + 100 + 1


def test_a_server_that_asks_to_wait_is_waited_for(hub: Hub) -> None:
    hub.busy = 2
    opened().fetch(GGUFS)
    hub.busy, hub.retry_after = 1 << 30, "3600"
    with pytest.raises(UserError, match=r"asks to wait 3600 seconds.*what was read is kept"):
        opened(PLAIN).fetch("model.safetensors")
    hub.retry_after = "0"
    with pytest.raises(UserError, match=r"could not be read \(HTTP 429\)"):
        opened(PLAIN).fetch("model.safetensors")


def test_servers_that_cannot_be_used_end_in_one_sentence(hub: Hub) -> None:
    hub.ranges = False
    with pytest.raises(UserError, match=r"does not send parts of Small-Q8_0.gguf: download"):
        opened().need({GGUFS: [(0, 10)]})
    hub.ranges = True
    hub.repositories["someone/gated"] = hub.repositories[PLAIN]
    assert "asks for a licence to be accepted" in fails("audit", "hf:someone/gated")
    assert "check the spelling" in fails("audit", "hf:some/missing")
    hub.repositories["some/pictures"] = ["model.bin"]
    assert "has no model*.safetensors" in fails("audit", "hf:some/pictures")
    hub.repositories["some/outside"] = ["../../model.safetensors"]
    assert "is malformed" in fails("audit", "hf:some/outside")
    hub.files["some/damaged x-Q8_0.gguf"] = bytes(3 << 20)
    hub.repositories["some/damaged"] = ["x-Q8_0.gguf"]
    assert "is no readable GGUF file" in fails("audit", "some/damaged:Q8_0")


def test_a_connection_that_ends_early_is_taken_up_where_it_ended(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, cut = hub.part, set()

    def cutting(repository: str, file: str, start: int, end: int) -> bytes:
        if end in cut:
            return part(repository, file, start, end)
        cut.add(end)
        return part(repository, file, start, end)[:5000] + hub_server.CUT

    monkeypatch.setattr(hub, "part", cutting)
    found = opened()
    assert found.fetch(GGUFS).read_bytes() == hub.files[f"{GGUF} {GGUFS}"]
    assert [wanted for _, wanted, _, _ in hub.asked] == [
        f"bytes=5000-{len(found.path(GGUFS).read_bytes()) - 1}"
    ]
    assert found.fetched == hub.size(GGUF, GGUFS)


def test_a_list_gives_a_table(hub: Hub, tmp_path: Path) -> None:
    listed, out = tmp_path / "models.txt", tmp_path / "verdicts.csv"
    listed.write_text(f"# three\nhf:{EDITED}\n\n{GGUF}:Q8_0\nhf:some/missing\n")
    command = ["audit", "--list", str(listed), "--base", "demo"]
    result = CliRunner().invoke(cli, [*command, "--csv", str(out)])
    assert result.exit_code == 1
    rows = list(csv.DictReader(out.open()))
    assert [row["verdict"] for row in rows] == ["edited", "not edited", "error"]
    assert float(rows[0]["strength"]) == pytest.approx(1, abs=0.01)
    assert "check the spelling" in rows[2]["evidence"]
    result = CliRunner().invoke(cli, [*command, "--fail-on", "edited", "--json"])
    assert result.exit_code == 3
    assert [one.get("verdict") for one in json.loads(result.stdout)["audits"]] == [
        "edited", "not edited", None,
    ]  # fmt: skip
    assert CliRunner().invoke(cli, ["audit"]).exit_code == 2


def test_spans() -> None:
    assert mirror.merged([(5, 9), (0, 2), (2, 3), (8, 12)]) == [(0, 3), (5, 12)]
    random = np.random.default_rng(0)
    for _ in range(200):
        spans = [sorted(map(int, random.integers(0, 30, 2))) for _ in range(6)]
        wanted, have = (mirror.merged(map(tuple, some)) for some in (spans[:3], spans[3:]))  # type: ignore[arg-type]
        missing = {n for start, end in mirror.without(wanted, have) for n in range(start, end)}
        in_want, in_have = ({n for a, b in some for n in range(a, b)} for some in (wanted, have))
        assert missing == in_want - in_have
