"""Train a small sparse autoencoder on a model's states, and write it as SAELens does.

    python examples/train_sae.py FOLDER [MODEL [LAYER [HARMFUL HARMLESS]]]   # demo, last but one
    abl-mlx measure demo -o feature.safetensors --sae FOLDER

It is a TopK autoencoder (Gao et al. 2024, arXiv 2406.04093): x − b_dec is encoded, the K largest
activations are kept, and the decoder's rows are added up with them. It is trained in seconds on
the prompts alone, so it only serves as an example: published ones read billions of tokens.
"""

# %% The states of every token of the prompts after one layer
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

import abl_mlx
from abl_mlx.models import capture

FEATURES, K, STEPS, BATCH = 256, 8, 200, 128

folder = Path(sys.argv[1])
name = sys.argv[2] if len(sys.argv) > 2 else "demo"
model = abl_mlx.load(name)
layer = range(len(model.chat.layers))[int(sys.argv[3]) if len(sys.argv) > 3 else -2]
prompts = abl_mlx.load_prompts(*sys.argv[4:6], model=model)
parts = []
for question in (*prompts.harmful.train.prompts, *prompts.harmless.train.prompts):
    tokens = model.encode(question)
    # The first token's state is the same for every prompt, and often hundreds of times longer.
    parts.append(capture.full(model.chat, [tokens], range(1 - len(tokens), 0))[0, layer])
    mx.eval(parts[-1])
states = mx.concatenate(parts)
print(f"{states.shape[0]} states of {states.shape[1]} dimensions after layer {layer}")


# %% The autoencoder
class TopK(nn.Module):
    """x̂ = b_dec + Σ a_f W_dec[f], with the K largest a_f = ReLU((x − b_dec) W_enc + b_enc)."""

    def __init__(self, states):
        super().__init__()
        rows = mx.random.normal((FEATURES, states.shape[1]))
        self.W_dec = rows / mx.sqrt((rows * rows).sum(axis=1, keepdims=True))
        self.W_enc = self.W_dec.T
        self.b_enc = mx.zeros(FEATURES)
        self.b_dec = states.mean(axis=0)

    def __call__(self, x):
        active = nn.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        least = mx.stop_gradient(mx.sort(active, axis=-1)[:, -K, None])
        return mx.where(active >= least, active, 0.0) @ self.W_dec + self.b_dec


# %% Train it to reconstruct the states
mx.random.seed(0)
autoencoder = TopK(states)
optimizer = optim.Adam(learning_rate=2e-3)
variance = ((states - states.mean(axis=0)) ** 2).sum(axis=1).mean()


def lost(autoencoder, x):
    """The share of the variance that is not reconstructed."""
    return ((autoencoder(x) - x) ** 2).sum(axis=1).mean() / variance


step = nn.value_and_grad(autoencoder, lost)
for number in range(STEPS):
    batch = states[mx.random.randint(0, states.shape[0], (BATCH,))]
    loss, gradients = step(autoencoder, batch)
    optimizer.update(autoencoder, gradients)
    mx.eval(autoencoder.parameters(), optimizer.state)
    if number % 100 == 99:
        print(f"step {number + 1}: {loss.item():.3f} of the variance is lost")

# %% Write it
folder.mkdir(parents=True)
config = {
    "architecture": "topk",
    "k": K,
    "d_in": states.shape[1],
    "d_sae": FEATURES,
    "dtype": "float32",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"model_name": name, "hook_name": f"blocks.{layer}.hook_resid_post"},
}
(folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n")
mx.save_safetensors(str(folder / "sae_weights.safetensors"), dict(autoencoder.parameters()))
print(f"wrote {folder}")
