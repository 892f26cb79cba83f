"""Records tiny autoencoders that the library SAELens writes, with the activations it computes.

    python tests/support/record_saelens.py        # in an environment with sae-lens and torch

tests/directions/test_sae.py reads the folders that this writes, tests/support/saelens/NAME with
cfg.json, sae_weights.safetensors and expected.json.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

for name in ("wandb",):  # logs training, which is not done here
    sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))

import sae_lens  # noqa: E402
import torch  # noqa: E402

WIDTH, FEATURES, STATES = 6, 10, 5
PLACE = Path(__file__).parent / "saelens"

CASES = {
    "standard": ("standard", {}),
    "standard_plain": ("standard", {"apply_b_dec_to_input": False}),
    "standard_layer_norm": ("standard", {"normalize_activations": "layer_norm"}),
    "standard_rescaled": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {"apply_b_dec_to_input": False}),
    "topk": ("topk", {"k": 3}),
    "topk_by_norm": ("topk", {"k": 3, "rescale_acts_by_decoder_norm": True}),
}


def main() -> None:
    torch.manual_seed(0)
    classes = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
    }
    for name, (architecture, how) in CASES.items():
        kind, config = classes[architecture]
        made = kind(config(d_in=WIDTH, d_sae=FEATURES, **how))
        made.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
        made.cfg.metadata.model_name = "made-up"
        with torch.no_grad():
            for key, tensor in made.named_parameters():
                tensor.copy_(torch.randn_like(tensor) * (0.4 if key.startswith("W_") else 0.2))
            if architecture == "jumprelu":
                made.threshold.abs_()
        states = torch.randn(STATES, WIDTH) * 2
        found = made.encode(states)
        folder = PLACE / name
        made.save_model(folder)
        expected = {
            "sae_lens": sae_lens.__version__,
            "states": states.tolist(),
            "activations": found.detach().tolist(),
        }
        (folder / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
