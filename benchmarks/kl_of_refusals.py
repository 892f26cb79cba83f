"""How much of an edit's KL is that harmless prompts are no longer refused: for docs/real-models.md.

    python benchmarks/kl_of_refusals.py MODEL.gguf 15:0.9 14:0.9 14:0.8

Each LAYER:STRENGTH removes the difference of means after that layer, at the prompts' last token, at
runtime. On the validation prompts it prints the share of the model's own refusals that are left
(as `--search` reads them), the KL at the first reply token of harmless prompts, and the KL of two
events: that the reply opens with a token that opens refusals of this model, or not. That is the
smallest KL of any edit that changes the probability of such openings as much.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from abl_mlx.choices import Measuring  # noqa: E402
from abl_mlx.commands import prompt_choice  # noqa: E402
from abl_mlx.directions import measuring  # noqa: E402
from abl_mlx.edits.edit import Edit  # noqa: E402
from abl_mlx.edits.steering import ablation  # noqa: E402
from abl_mlx.inputs import prompts  # noqa: E402
from abl_mlx.models.distributions import kl_divergence, normalized  # noqa: E402
from abl_mlx.models.logits import first_reply_token  # noqa: E402
from abl_mlx.outputs.model_file import find_gguf  # noqa: E402
from abl_mlx.search.screening import Screen  # noqa: E402


def events(log_probabilities: mx.array, openings: mx.array) -> mx.array:
    """Log-probabilities that a reply opens with one of some tokens, and not: (N, V) -> (N, 2)."""
    inside = mx.logsumexp(log_probabilities[:, openings], axis=-1)
    return normalized(mx.stack([inside, mx.log1p(-mx.exp(inside))], axis=-1))


def main() -> None:
    """Measure the directions and try the edits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("edits", nargs="+", metavar="LAYER:STRENGTH")
    given = parser.parse_args()
    with find_gguf(given.model) as model:
        chat = model.load()
        writers = model.find_writers(chat, None)
        sets = prompt_choice.encoded(chat, prompts.load_sets(None, None, 0), Measuring())[None]
        train, validation = sets.train, sets.validation
        found = measuring.measure(chat, train["harmful"].tokens, train["harmless"].tokens, [-1])
        harmful, harmless = validation["harmful"].tokens, validation["harmless"].tokens
        screen = Screen(chat, writers, harmful, harmless)
        screen.read_refusals()
        first = sorted({said[0] for said in screen.said or () if said})
        openings = mx.array(first)
        print("refusals open with", [chat.tokenizer.decode([token]) for token in first])
        base = first_reply_token(chat, harmless)
        opens = mx.exp(events(base, openings))[:, 0].mean().item()
        print(f"harmless prompts open so with a probability of {opens:.1%}")
        print("layer:strength  own refusals left  they open so      KL  KL of the two events")
        for name in given.edits:
            layer, strength = name.split(":")
            edit = Edit(found.for_edit(int(layer), -1), float(strength))
            with ablation(writers, edit):
                after = first_reply_token(chat, harmless)
            two = events(base, openings), events(after, openings)
            print(
                f"{name:>14}  {screen.score(edit).refused:17.1%}"
                f"  {mx.exp(two[1])[:, 0].mean().item():12.1%}"
                f"  {kl_divergence(base, after).mean().item():6.4f}"
                f"  {kl_divergence(*two).mean().item():.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
