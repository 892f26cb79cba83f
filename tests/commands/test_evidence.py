"""`eval --sign`, `verify` and `eval --against`: what was measured, signed with a local key."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from abl_mlx.cli.main import cli
from abl_mlx.demo import MODEL_PATH
from abl_mlx.outputs.model_file import find_model
from tests.support.command import abl_mlx, fails

FEW = ("--limit", "10", "--max-tokens", "8")


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys, and signed evidence of the demo."""
    place = tmp_path_factory.mktemp("evidence")
    for name in ("key", "other"):
        command = ("ecparam", "-name", "prime256v1", "-genkey", "-noout")
        openssl(*command, "-out", place / f"{name}.pem")
        openssl("pkey", "-in", place / f"{name}.pem", "-pubout", "-out", place / f"{name}.pub")
    evidence = place / "demo.json"
    abl_mlx("eval", "demo", *FEW, "--sign", place / "key.pem", "--evidence", evidence)
    return place


def verified(place: Path, *arguments: object, key: str = "key") -> Any:
    command = ["verify", str(place / "demo.json"), "--key", str(place / f"{key}.pub")]
    return CliRunner().invoke(cli, [*command, *map(str, arguments)])


def test_evidence_holds_the_record_and_is_signed(place: Path, tmp_path: Path) -> None:
    found = verified(place, "--model", "demo", "--min-refusal", "0.9", "--json")
    assert found.exit_code == 0, found.stderr
    record = json.loads(found.stdout)
    assert record["passed"]
    with find_model("demo") as model:
        assert record["files"] == model.hashes()
    assert len(record["record"]["verdicts"]["harmful"]) == 10
    # OpenSSL by itself: the signature is of DSSE's encoding of the statement.
    envelope = json.loads((place / "demo.json").read_text())["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    head = b"DSSEv1 %d %s %d " % (len(kind), kind, len(payload))
    (tmp_path / "signed").write_bytes(head + payload)
    (tmp_path / "signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    check = ("dgst", "-sha256", "-verify", place / "key.pub", "-signature")
    openssl(*check, tmp_path / "signature", tmp_path / "signed")


def test_the_package_model_signing_verifies_the_files(place: Path) -> None:
    verifying = pytest.importorskip("model_signing.verifying")
    hashing = pytest.importorskip("model_signing.hashing")
    config = verifying.Config().use_elliptic_key_verifier(public_key=place / "key.pub")
    config = config.set_hashing_config(hashing.Config()).set_ignore_unsigned_files(True)
    config.verify(MODEL_PATH, place / "demo.json")


def test_what_is_not_as_signed_is_exit_code_3(place: Path, tmp_path: Path) -> None:
    assert "not signed with the key" in (found := verified(place, key="other")).stderr
    assert found.exit_code == 3
    bundle = json.loads((place / "demo.json").read_text())
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    forged = payload.replace(b'"harmful_refusal_rate": ', b'"harmful_refusal_rate": -')
    assert forged != payload
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(forged).decode()
    (tmp_path / "demo.json").write_text(json.dumps(bundle))
    key = ("--key", str(place / "key.pub"))
    for text in (json.dumps(bundle), "{}", "[1]", "no JSON"):
        (tmp_path / "forged.json").write_text(text)
        found = CliRunner().invoke(cli, ["verify", str(tmp_path / "forged.json"), *key])
        assert found.exit_code == 3, found.stderr
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in MODEL_PATH.iterdir():
        data = file.read_bytes()
        changed = file.suffix == ".safetensors"
        (copy / file.name).write_bytes(data[:-1] + b"\1" if changed else data)
    found = verified(place, "--model", copy, "--bom", tmp_path / "bom.json")
    assert found.exit_code == 3
    assert not (tmp_path / "bom.json").exists()
    assert "model.safetensors of" in found.stdout
    assert "is not the signed file" in found.stdout


def test_a_bill_of_materials_and_a_block_for_the_card(place: Path, tmp_path: Path) -> None:
    bom, card = tmp_path / "bom.json", tmp_path / "card.md"
    found = verified(place, "--bom", bom, "--card", card, "--min-refusal", "0.9")
    assert found.exit_code == 0, found.stderr
    assert f"wrote {bom}" in found.stdout
    record, bill = json.loads(verified(place, "--json").stdout), json.loads(bom.read_text())
    (model,) = bill["components"]
    files = {one["name"]: one["hashes"][0]["content"] for one in model["components"]}
    assert files == record["files"]
    evidence = hashlib.sha256((place / "demo.json").read_bytes()).hexdigest()
    assert model["externalReferences"][0]["hashes"] == [{"alg": "SHA-256", "content": evidence}]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    low, high = record["record"]["harmful_refusal_interval"]
    assert metrics[0] == {
        "type": "refusal rate",
        "slice": "harmful prompts, n=10",
        "value": "1.0000",
        "confidenceInterval": {"lowerBound": f"{low:.4f}", "upperBound": f"{high:.4f}"},
    }
    text = card.read_text()
    assert "| refusals, harmful prompts | 100% |" in text
    assert all(f"| `{name}` | `{sha256}` |" in text for name, sha256 in files.items())
    again = tmp_path / "again.json"
    verified(place, "--bom", again)
    assert again.read_bytes() == bom.read_bytes()
    taken = verified(place, "--bom", bom)
    assert (taken.exit_code, "already exists" in taken.stderr) == (1, True)


def test_the_bill_of_materials_follows_the_official_schema(place: Path, tmp_path: Path) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    verified(place, "--bom", tmp_path / "bom.json")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    bill = (tmp_path / "bom.json").read_text()
    assert validator.validate_str(bill) is None
    assert validator.validate_str(bill.replace('"slice"', '"part"')) is not None


def test_keys_and_flags_that_cannot_be_used(place: Path, tmp_path: Path) -> None:
    openssl("genrsa", "-out", tmp_path / "rsa.pem", "2048")
    sign = ("eval", "demo", *FEW, "--evidence", tmp_path / "e.json", "--sign")
    assert "is no key on the curves" in fails(*sign, tmp_path / "rsa.pem")
    assert "holds no private key in PEM" in fails(*sign, place / "key.pub")
    assert "go together" in fails("eval", "demo", *FEW, "--sign", place / "key.pem")
    assert not (tmp_path / "e.json").exists()


def test_another_model_at_the_same_place_is_noticed(
    place: Path, direction: Path, tmp_path: Path
) -> None:
    against = ("--against", place / "demo.json", "--key", place / "key.pub")
    same = abl_mlx("eval", "demo", *FEW, *against)
    assert {one["value"] for one in same["gate"]["checks"] if one["name"] == "against"} == {1.0}
    sign = ("--sign", place / "key.pem", "--evidence", tmp_path / "edited.json")
    command = ["eval", "demo", *FEW, *map(str, (*against, *sign)), "--direction", str(direction)]
    result = CliRunner().invoke(cli, [*command, "--json"])
    assert result.exit_code == 3, result.stderr
    checks = json.loads(result.stdout)["gate"]["checks"]
    (harmful,) = (one for one in checks if (one["name"], one["kind"]) == ("against", "harmful"))
    assert harmful["value"] < 0.01
    assert "answers 10 that it refuses" in harmful["sentence"]
    limit = ("--min-refusal", "0.5")
    key = ("--key", str(place / "key.pub"))
    found = CliRunner().invoke(cli, ["verify", str(tmp_path / "edited.json"), *key, *limit])
    assert found.exit_code == 3
    assert "NOT as it should be" in found.stdout
    other = CliRunner().invoke(cli, ["eval", "demo", "--limit", "8", *map(str, against)])
    assert "was made from other harmful prompts" in other.stderr


@pytest.mark.slow
def test_a_run_is_signed_beside_its_outputs(place: Path, direction: Path, tmp_path: Path) -> None:
    out = tmp_path / "edited.gguf"
    abl_mlx("run", "demo", "-o", out, "--limit", "4", "--sign", place / "key.pem")
    bundle = tmp_path / "edited.gguf.sigstore.json"
    bom, card = tmp_path / "bom.json", tmp_path / "card.md"
    written = ("--bom", bom, "--card", card)
    found = abl_mlx("verify", bundle, "--key", place / "key.pub", "--model", out, *written)
    assert found["command"] == "run"
    assert found["record"]["after"]["harmful_refusal_rate"] == 0
    (model,) = json.loads(bom.read_text())["components"]
    (base,) = model["pedigree"]["ancestors"]
    assert [one["hashes"][0]["content"] for one in base["components"]] == list(
        found["record"]["hashes"]["source"].values()
    )
    assert "| refusals, harmful prompts | 100% | 0% |" in card.read_text()
    assert "is evidence of `run`" in fails(
        "verify", bundle, "--key", place / "key.pub", "--min-refusal", "0.5"
    )
