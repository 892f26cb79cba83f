"""docs/gguf-writers.md: the residual writers of every architecture of GGUF files."""

from __future__ import annotations

from convert.architectures.table import REFUSED, STREAMS


def _shown(gain: str) -> str:
    names = " or ".join(f"`{one}`" for one in gain.rstrip("?").split("|"))
    return f"({names} in files with experts)" if gain.endswith("?") else names


def document() -> str:
    """The whole of docs/gguf-writers.md."""
    groups: dict[tuple[str, str, str, bool], list[str]] = {}
    for name, facts in STREAMS.items():
        key = (
            ", ".join(f"`{one}`" for one in (*facts.embeddings, *facts.writers)),
            "; ".join(
                f"{' · '.join(_shown(gain) for gain in gains)} behind `{writer}`"
                for writer, gains in facts.writers.items()
                if gains
            ),
            facts.note,
            facts.proved,
        )
        groups.setdefault(key, []).append(name)
    lines = [
        "# Residual writers of GGUF files",
        "",
        "Which tensors `abl-mlx` edits in a GGUF file of each architecture, as far as the file has",
        "them, with their biases. A *gain* is a norm's weight that stands between the tensor and",
        "the residual stream and is folded into the edit. Biases of these tensors are edited with",
        "them; blocks with `nextn` tensors (multi-token prediction) are not part of the forward",
        "pass and stay as they are, but for `--mtp`: then the same tensors are edited there, with",
        "`nextn.eh_proj`, which starts such a block's stream, and `nextn.embed_tokens`, its copy",
        "of the embedding. What an image or sound encoder (mmproj) feeds into the stream is not in",
        "the file and not edited.",
        "",
        "*Proved* means that `tests/convert/test_gguf_writers.py` removes a random direction "
        "from these",
        "tensors of a random model of that architecture in llama.cpp itself, and finds nothing of",
        "it left in the final hidden state.",
        "",
        "Generated: `python -m tools.regenerate`.",
        "",
        "| Architecture | Writers | Gains | Proved | Note |",
        "|---|---|---|---|---|",
    ]
    for (writers, gains, note, proved), names in groups.items():
        shown = ", ".join(f"`{name}`" for name in sorted(names))
        cells = (shown, writers, gains, "yes" if proved else "no", note)
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Refused",
        "",
        "Other architectures, and files with tensors of unknown use, are refused as well;",
        "`--tensors REGEX` names the tensors to edit in any file, without gains.",
        "",
        "| Architecture | Reason |",
        "|---|---|",
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        shown = ", ".join(f"`{name}`" for name in sorted(names))
        lines.append(f"| {shown} | {reason[0].upper()}{reason[1:]} |")
    return "\n".join(lines) + "\n"
