"""Signed figures of a model as a bill of materials: CycloneDX 1.6 with one model in it.

The schema is https://cyclonedx.org/schema/bom-1.6.schema.json. The entry under ``components`` can
be moved into a larger bill. The same evidence always gives the same bytes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from abl_mlx.behaviour.kept_refusals import words
from abl_mlx.records.evaluations import Divergence, RefusalsInMode
from abl_mlx.reports.signed_figures import Figures, Signed
from convert.base import escape

_SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"


def text(signed: Signed) -> str:
    """The bill of materials, as JSON."""
    tool = {"type": "application", "name": "abl-mlx", "version": signed.version}
    number = uuid.uuid5(uuid.NAMESPACE_URL, f"{signed.model}:{signed.evidence_sha256}")
    bill = {
        "$schema": _SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{number}",
        "version": 1,
        "metadata": {"tools": {"components": [tool]}},
        "components": [_model(signed)],
    }
    return escape.json_text(json.dumps(bill, indent=2, ensure_ascii=False)) + "\n"


def _model(signed: Signed) -> dict[str, Any]:
    """The entry of the model, with its files, figures and evidence."""
    figures = signed.figures
    found: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": signed.model,
        "externalReferences": [
            {
                "type": "attestation",
                "url": quote(signed.evidence),
                "comment": "a Sigstore bundle with the files' hashes and the whole record",
                "hashes": [_hash(signed.evidence_sha256)],
            }
        ],
        "modelCard": {
            "modelParameters": {"task": "text-generation"},
            "quantitativeAnalysis": {"performanceMetrics": list(_metrics(figures))},
        },
        "properties": [_property("abl-mlx:command", signed.command),
                       _property("abl-mlx:public-key:sha256", signed.key_sha256)],
    }  # fmt: skip
    if figures.prompts:
        found["modelCard"]["modelParameters"]["datasets"] = [
            {
                "type": "dataset",
                "name": f"{words(name)} prompts",
                "contents": {"properties": [_property("prompts", str(one.n)),
                                            _property("sha256", one.sha256)]},
            }
            for name, one in figures.prompts.items()
        ]  # fmt: skip
    if figures.edited and figures.other is not None:
        source = {"type": "machine-learning-model", "name": figures.other}
        found["pedigree"] = {"ancestors": [source | _files(figures.other_files)]}
    return found | _files(signed.files)


def _files(files: Mapping[str, str]) -> dict[str, Any]:
    """The files of a model as its parts."""
    parts = [
        {"type": "file", "name": name, "hashes": [_hash(sha256)]}
        for name, sha256 in sorted(files.items())
    ]
    return {"components": parts} if parts else {}


def _metrics(figures: Figures) -> Iterator[dict[str, Any]]:
    yield from _rates(figures.after, "")
    for mode, one in (figures.after.modes or {}).items():
        yield from _rates(one, f", thinking {mode}")
    if figures.kl is not None:
        yield from _divergence(figures.kl, figures.other)


def _rates(found: RefusalsInMode, mode: str) -> Iterator[dict[str, Any]]:
    for name, rate in found.rates.items():
        if rate.share is not None:
            low, high = rate.interval
            yield {
                "type": "refusal rate",
                "slice": f"{words(name)} prompts{mode}, n={rate.n}",
                "value": f"{rate.share:.4f}",
                "confidenceInterval": {"lowerBound": f"{low:.4f}", "upperBound": f"{high:.4f}"},
            }
    if found.broken_rate is not None:
        yield {
            "type": "rate of broken replies",
            "slice": f"harmful and harmless prompts{mode}",
            "value": f"{found.broken_rate:.4f}",
        }


def _divergence(kl: Divergence, other: str | None) -> Iterator[dict[str, Any]]:
    for what, value in (("the 1st token", kl.k1), ("32 tokens, a token", kl.k32)):
        yield {
            "type": f"KL divergence from {other}, nats over {what}",
            "slice": "harmless prompts",
            "value": f"{value:.4f}",
        }


def _hash(sha256: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": sha256}


def _property(name: str, value: str) -> dict[str, str]:
    return {"name": name, "value": value}
