"""Statements that are signed with a local key, as Sigstore bundles.

A bundle (https://github.com/sigstore/protobuf-specs, v0.3) holds an in-toto statement in a DSSE
envelope (https://github.com/secure-systems-lab/dsse) and the hash of the public key, as the
package model-signing of the OpenSSF writes it. The elliptic curve mathematics is OpenSSL's: its
program is on every Mac and Linux machine, so that no package is needed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.base import json_text
from convert.base.errors import UserError
from convert.base.schema import Refused

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD = "application/vnd.in-toto+json"

#: Longest bundle that is read, in bytes.
_LONGEST = 1 << 26

# Length of a public key in DER -> the hash that is signed: P-256, P-384 and P-521.
_HASHES = {91: "-sha256", 120: "-sha384", 158: "-sha512"}

_MAKE = "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one"


class BadSignature(UserError):
    """What is said to be signed is not signed with this key, or was changed since."""


def check_key(key: Path) -> None:
    """Check that a private key can sign.

    Raises:
        UserError: when it cannot be read, or is not on one of the curves.
    """
    _hash_of(_public(key), key)


def hint(key: Path) -> str:
    """The SHA-256 of a public key in PEM, which a bundle names it by.

    Raises:
        UserError: when it cannot be read.
    """
    return hashlib.sha256(_public(key, public=True)).hexdigest()


def signed(statement: Mapping[str, Any], key: Path) -> str:
    """A bundle, as JSON, with this statement.

    Args:
        statement: an in-toto statement.
        key: the file with the private key, PEM.

    Raises:
        UserError: when the key cannot sign.
    """
    public = _public(key)
    payload = json.dumps(statement, ensure_ascii=False, allow_nan=False).encode()
    signature = _openssl(
        ["dgst", _hash_of(public, key), "-sign", str(key)], _encoded(payload), f"{key} cannot sign"
    )
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD,
        "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
    }
    material = {"publicKey": {"hint": hashlib.sha256(public).hexdigest()}, "tlogEntries": []}
    bundle = {"mediaType": BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope}
    return json.dumps(bundle, indent=2) + "\n"


def opened(path: Path, key: Path) -> dict[str, Any]:
    """The statement of a bundle whose signature was checked.

    Args:
        path: the bundle.
        key: the file with the public key, PEM.

    Raises:
        BadSignature: when it is not signed with this key, or not at all.
        UserError: when one of the files cannot be read.
    """
    public = _public(key, public=True)
    try:
        data = path.read_bytes()[: _LONGEST + 1]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        envelope = json_text.parse(data, longest=_LONGEST)["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        known = envelope["payloadType"] == PAYLOAD
    except (Refused, KeyError, IndexError, TypeError, ValueError, binascii.Error):
        known = False
    if not known:
        raise BadSignature(f"{path} holds no signed statement: it is no Sigstore bundle of one.")
    if not _verifies(payload, signature, public, key):
        raise BadSignature(
            f"{path} is not signed with the key of {key}, or was changed since: do not trust it."
        )
    found = json_text.parse(payload, longest=_LONGEST)
    assert isinstance(found, dict)
    return found


def _encoded(payload: bytes) -> bytes:
    """The bytes that are signed: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d " % (len(PAYLOAD), PAYLOAD.encode(), len(payload)) + payload


def _verifies(payload: bytes, signature: bytes, public: bytes, key: Path) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "public.pem"), Path(folder, "signature")
        for file, data in zip(files, (public, signature), strict=True):
            file.write_bytes(data)
        command = ["dgst", _hash_of(public, key), "-verify", str(files[0])]
        return _run([*command, "-signature", str(files[1])], _encoded(payload)).returncode == 0


def _public(key: Path, *, public: bool = False) -> bytes:
    """The public key in PEM, from the file of a private one, or of a public one."""
    if not key.is_file():
        raise UserError(f"{key} is no file: name the {'public' if public else 'private'} key.")
    what = "public" if public else "private"
    command = ["pkey", *(["-pubin"] if public else []), "-in", str(key), "-pubout"]
    return _openssl(command, b"", f"{key} holds no {what} key in PEM ({_MAKE})")


def _hash_of(public: bytes, key: Path) -> str:
    der = base64.b64decode(b"".join(public.splitlines()[1:-1]))
    if len(der) not in _HASHES:
        raise UserError(f"{key} is no key on the curves P-256, P-384 or P-521: {_MAKE}.")
    return _HASHES[len(der)]


def _openssl(command: list[str], data: bytes, error: str) -> bytes:
    done = _run(command, data)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise UserError(f"{error}: {said[-1] if said else 'openssl failed'}.")
    return done.stdout


def _run(command: list[str], data: bytes) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["openssl", *command], input=data, capture_output=True, check=False)
    except FileNotFoundError:
        raise UserError("openssl is not on the PATH: install OpenSSL to sign and verify.") from None
