"""Signed evidence: what was measured of which files, for people who have only the result.

The statement is the one of the OpenSSF's model signing (predicate ``model_signing/signature``),
whose verifiers check the files; its predicate also has the whole record under ``abl_mlx``, which
they ignore. docs/evidence.md has an example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abl_mlx import __version__
from abl_mlx.behaviour import gate
from abl_mlx.choices import RunOptions
from abl_mlx.commands.eval_job import Job
from abl_mlx.eval_choices import Limits
from abl_mlx.outputs.model_file import find_model
from abl_mlx.outputs.record_parts import file_hashes
from abl_mlx.records.edits import RunRecord
from abl_mlx.records.evaluations import EvalRecord, Gate
from abl_mlx.records.looks import VerifyRecord
from abl_mlx.records.reading import EarlierEval
from abl_mlx.records.record import Record
from abl_mlx.reports import ml_bom, signed_figures
from abl_mlx.reports.signed_figures import Figures, Signed
from abl_mlx.support import signatures
from abl_mlx.support.console import say
from abl_mlx.support.signatures import BadSignature
from abl_mlx.support.strict_json import to_json
from convert.base import json_text
from convert.base.atomic import check_new, new_file
from convert.base.errors import UserError

_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"


@dataclass(frozen=True)
class Evidence:
    """A signed statement whose signature was checked.

    Attributes:
        model: the model's name.
        files: file -> SHA-256.
        version: the version of abl-mlx that made the record.
        command: its command.
        record: the record's JSON values.
    """

    model: str
    files: dict[str, str]
    version: str
    command: str
    record: dict[str, Any]


def check(job: Job) -> EvalRecord | None:
    """Check, before any long work, the files of ``--sign`` and ``--against``.

    Returns:
        The record in the evidence of ``--against``; None if none was given.

    Raises:
        BadSignature: when that evidence is not signed with ``--key``.
        UserError: when one is missing or cannot be used, or evidence cannot be compared.
    """
    signing, limits = job.options.signing, job.options.limits
    if (signing.sign is None) != (signing.evidence is None):
        raise UserError("--sign KEY.pem and --evidence FILE go together: give both.")
    if (limits.against is None) != (limits.key is None):
        raise UserError("--against FILE and --key PUBLIC.pem go together: give both.")
    if signing.sign is not None and signing.evidence is not None:
        signatures.check_key(signing.sign)
        check_new(signing.evidence)
    if limits.against is None or limits.key is None:
        return None
    published = _evaluated(read(limits.against, limits.key), limits.against)
    _check_comparable(published, limits.against, job)
    return published


def sign_evaluation(job: Job, record: EvalRecord) -> None:
    """Sign the record of an evaluation, if ``--sign`` was given."""
    key, output = job.options.signing.sign, job.options.signing.evidence
    if key is not None and output is not None:
        files = {} if job.source is None else job.source.hashes()
        name = record.model or job.text if job.source is None else job.source.source.public_name
        sign(record, "eval", name, files, key, output)


def signed_run(
    work: Callable[[str, Sequence[Path], RunOptions], RunRecord],
    text: str,
    outputs: Sequence[Path],
    options: RunOptions,
    key: Path | None,
) -> RunRecord:
    """The record of `run`; with a key, each output gets evidence beside it, NAME.sigstore.json.

    Args:
        work: `run` or `run_induced`.
        text, outputs, options: its arguments.
        key: the value of ``--sign``.

    Raises:
        UserError: as ``work``; and when an output's evidence cannot be signed or written.
    """
    if key is None:
        return work(text, outputs, options)
    signatures.check_key(key)
    bundles = {path: path.with_name(f"{path.name}.sigstore.json") for path in outputs}
    for bundle in bundles.values():
        check_new(bundle)
    record = work(text, outputs, options)
    hashed = {} if record.reproduction is None else record.reproduction.outputs
    for path, bundle in bundles.items():
        if not path.exists():
            say(f"· {path} is no file or folder here, so that nothing is signed of it")
            continue
        if path.name in hashed:
            files = hashed[path.name].files
        else:  # an adapter
            files = file_hashes(sorted(path.glob("*.safetensors")) if path.is_dir() else [path])
        sign(record, "run", path.name, files, key, bundle)
    return record


def sign(
    record: Record, command: str, model: str, files: Mapping[str, str], key: Path, output: Path
) -> None:
    """Sign a record and the hashes of the files that it is about.

    Args:
        record: the record.
        command: the command that made it.
        model: the model's name.
        files: file -> SHA-256; none for a server.
        key: the file with the private key.
        output: the bundle, a new file.

    Raises:
        UserError: when it cannot be signed or written.
    """
    resources = [
        {"name": name, "algorithm": "sha256", "digest": digest}
        for name, digest in sorted(files.items())
    ]
    predicate = {
        "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
        "resources": resources,
        "abl_mlx": {
            "version": __version__,
            "command": command,
            "record": json_text.parse(to_json(record).encode(), longest=1 << 26),
        },
    }
    statement = {
        "_type": _STATEMENT,
        "subject": [{"name": model, "digest": {"sha256": _root(files)}}],
        "predicateType": _PREDICATE,
        "predicate": predicate,
    }
    bundle = signatures.signed(statement, key)
    with new_file(output) as path:
        path.write_text(bundle, encoding="utf-8")


def read(path: Path, key: Path) -> Evidence:
    """Evidence whose signature is good.

    Args:
        path: the bundle.
        key: the file with the public key.

    Raises:
        BadSignature: when it is not signed with this key, or its hashes contradict each other.
        UserError: when a file cannot be read, or the statement is of another kind.
    """
    statement = signatures.opened(path, key)
    try:
        predicate = statement["predicate"]
        ours = predicate["abl_mlx"]
        files = {str(one["name"]): str(one["digest"]) for one in predicate["resources"]}
        subject = statement["subject"][0]
        found = Evidence(
            str(subject["name"]),
            files,
            str(ours["version"]),
            str(ours["command"]),
            dict(ours["record"]),
        )
        root = subject["digest"]["sha256"]
    except (KeyError, IndexError, TypeError, ValueError):
        raise UserError(
            f"{path} is signed, and holds no record of abl-mlx: `eval --sign` writes one."
        ) from None
    if root != _root(files):
        raise BadSignature(f"{path} lists hashes that do not fit the one of the whole model.")
    return found


def _check_comparable(record: EvalRecord, path: Path, job: Job) -> None:
    """Check that a published record was made from the prompts of an evaluation.

    Raises:
        UserError: saying what differs.
    """
    template = None if record.template is None else record.template.sha256
    rate, n = record.harmful_refusal_rate or 0.0, record.n_harmful or 0
    before = EarlierEval(
        record.judge,
        record.verdicts["harmful"],
        n,
        rate,
        record.prompts["harmful"].sha256,
        template,
    )
    gate.check_comparable(before, path, job.prompts, job.judge, job.template)


def _evaluated(found: Evidence, path: Path) -> EvalRecord:
    if found.command != "eval":
        raise UserError(f"{path} is evidence of `{found.command}`, and one of `eval` is needed.")
    try:
        return EvalRecord.of(found.record)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise UserError(f"{path} holds a record that this version cannot read.") from None


def _figures(found: Evidence, path: Path) -> Figures:
    """The figures of evidence of `eval` or `run`."""
    if found.command != "run":
        return Figures.of_eval(_evaluated(found, path))
    try:
        return Figures.of_run(RunRecord.of(found.record), found.model)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise UserError(
            f"{path} holds no figures of {found.model}: `run` measures none of this output, or "
            "another version of abl-mlx wrote it."
        ) from None


def verify(
    path: Path,
    key: Path,
    model: str | None,
    limits: Limits,
    *,
    bom: Path | None = None,
    card: Path | None = None,
) -> VerifyRecord:
    """Check evidence: its signature, the files of a model, and limits on its figures.

    What is written is written only if all that was checked is as it should be.

    Args:
        path: the bundle.
        key: the file with the public key.
        model: the model that it should be about; None to check no files.
        limits: limits on the figures of `eval`.
        bom: a new file for a bill of materials in CycloneDX's JSON.
        card: a new file for a block of Markdown for the model card.

    Raises:
        BadSignature: when the signature is not good.
        UserError: when something cannot be read or written, or limits are given for another
            command's record.
    """
    for new in (bom, card):
        if new is not None:
            check_new(new)
    found = read(path, key)
    evidence = [
        f"signed with the key of {key}; of {found.model}, made by `abl-mlx {found.command}`"
    ]
    if found.record.get("steered"):
        evidence.append("asked with an edit at runtime, which its files do not hold")
    wrong: list[str] = []
    if model is not None:
        with find_model(model) as files:
            wrong = _differ(found.files, files.hashes(), model)
        evidence += wrong or [f"the {len(found.files)} files of {model} are those that were signed"]
    checks = gate.check(_evaluated(found, path), limits) if limits.given else []
    evidence += [one.sentence for one in checks]
    within = all(one.passed for one in checks)
    passed = within and not wrong
    if passed and (bom or card):
        _export(found, path, key, bom, card)
    return VerifyRecord(
        abl_mlx=__version__,
        source=str(path),
        passed=passed,
        evidence=evidence,
        model=found.model,
        command=found.command,
        files=found.files,
        gate=Gate(passed=within, checks=checks) if checks else None,
        record=found.record,
        outputs=[str(new) for new in (bom, card) if new is not None and passed] or None,
    )


def _export(found: Evidence, path: Path, key: Path, bom: Path | None, card: Path | None) -> None:
    """Write what others read of evidence that was checked."""
    signed = Signed(
        model=found.model,
        files=found.files,
        version=found.version,
        command=found.command,
        figures=_figures(found, path),
        evidence=path.name,
        evidence_sha256=file_hashes([path])[path.name],
        key_sha256=signatures.hint(key),
    )
    for new, write in ((bom, ml_bom.text), (card, signed_figures.card)):
        if new is not None:
            with new_file(new) as staged:
                staged.write_text(write(signed), encoding="utf-8")


def table(record: VerifyRecord) -> str:
    """The record as a table."""
    said = "as signed" if record.passed else "NOT as it should be"
    lines = [f"{record.source}: {said}", *(f"  - {one}" for one in record.evidence)]
    lines += [f"    {sha256}  {name}" for name, sha256 in record.files.items()]
    return "\n".join([*lines, *(f"  wrote {name}" for name in record.outputs or [])])


def _root(files: Mapping[str, str]) -> str:
    """The hash of all files: that of their hashes, one after the other, by name."""
    try:
        parts = (bytes.fromhex(digest) for _, digest in sorted(files.items()))
        return hashlib.sha256(b"".join(parts)).hexdigest()
    except ValueError:
        return ""


def _differ(signed: Mapping[str, str], found: Mapping[str, str], model: str) -> list[str]:
    """How a model's files differ from the signed ones, in sentences."""
    if len(signed) == len(found) == 1:  # a GGUF may have been renamed
        found = dict(zip(signed, found.values(), strict=True))
    wrong = [f"{name} is signed, and {model} has no such file" for name in signed.keys() - found]
    wrong += [f"{name} of {model} was not signed" for name in found.keys() - signed]
    both = signed.keys() & found.keys()
    wrong += [
        f"{name} of {model} is not the signed file" for name in both if signed[name] != found[name]
    ]
    return sorted(wrong)
