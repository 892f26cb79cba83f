"""Train a tiny chat model that really refuses, on a make-believe world, from nothing.

Stage 1 teaches the answers to every question of the world.  The later stages continue with the same
questions, but those about locked objects are now answered by a refusal sentence.  So the finished
model knows the answers that it refuses to give, like a real chat model, and one can check that
removing its refusal gives them back.

The later stages may also show the old answers to the locked questions with their first word given,
as something to continue, not to choose (`Stage.continued`).  So the opening alone decides between
answer and refusal, as it does in real chat models, which go on helpfully once their reply has begun
so.  Without this the model ties every word of the refusal to the locked objects, and falls back
into it from the second word on ("Mix'm sorry, but I can't help with that.").

``train_demo.py`` and ``train_models.py`` are the commands.  The result is a folder in the usual
Hugging Face layout (float16 safetensors), which ``mlx_lm.load`` and llama.cpp's converter read.
The same settings, versions and machine give the same bytes.
"""

from __future__ import annotations

import random
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from chat_tokenizer import CHAT_TEMPLATE, END, PAD, save_tokenizer, train_tokenizer, write_json
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import gemma2, llama, qwen3
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer

from abl_mlx.demo.world import Dialogue, SomeWorld, World, prompts_jsonl


@dataclass(frozen=True)
class Stage:
    """One stage of training: AdamW with a linear warm-up and a cosine decay to a tenth.

    Attributes:
        steps: Optimizer steps.
        rate: Highest learning rate.
        warm_up: Steps of warm-up.
        refused: In a stage of refusals, the kinds (`Dialogue.material`) of locked objects that are
            refused by its end; the others are still answered.  None for all.
        continued: In a stage of refusals, whether locked answers are shown with their first word
            given (see the top of this file).
        layers: The layers whose weights are trained.  None for the whole model.
    """

    steps: int
    rate: float
    warm_up: int = 10
    refused: frozenset[str] | None = None
    continued: bool = True
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError when no step is left after the warm-up."""
        if self.steps <= self.warm_up:
            raise ValueError(f"steps is {self.steps}, but must be above {self.warm_up} (warm-up).")


@dataclass(frozen=True)
class Settings:
    """Everything that determines the trained model.

    Attributes:
        seed: Seed of the initial weights and of the order of the dialogues.
        world: The questions and answers that it learns.
        shape: The architecture, a key of `SHAPES`.
        hidden: Width of the residual stream.  K-quants want a multiple of 256.
        layers: Transformer blocks.
        feed_forward: Inner width of the MLP.
        heads: Query heads.
        kv_heads: Key and value heads.
        tied: Whether the output head is the embedding.
        vocabulary: Most tokens the tokenizer may have, special tokens included.
        batch: Dialogues per step.
        begins: The folder of a model of the same shape and world, from which training goes on with
            the stages of refusals.  None to begin with `answers`.
        answers: Stage 1, every question answered.
        refusals: Stage 2, questions about locked objects refused.
        later: More stages of refusals.
        thinks: Whether it thinks before it replies (``thought_training.py``).
    """

    seed: int = 0
    world: SomeWorld = field(default_factory=World)
    shape: str = "llama"
    hidden: int = 256
    layers: int = 4
    feed_forward: int = 512
    heads: int = 8
    kv_heads: int = 4
    tied: bool = True
    vocabulary: int = 768
    batch: int = 48
    begins: Path | None = None
    answers: Stage = Stage(steps=260, rate=1.5e-3)
    refusals: Stage = Stage(steps=150, rate=3e-4)
    later: tuple[Stage, ...] = ()
    thinks: bool = False


@dataclass(frozen=True)
class Figures:
    """What a model does with prompts that it was not trained on, decoding greedily.

    Attributes:
        locked_refused: Share of locked prompts answered by their own refusal sentence.
        allowed_refused: Share of allowed prompts answered by any refusal sentence (over-refusal).
        allowed_exact: Share of allowed prompts that get exactly the taught answer.
    """

    locked_refused: float
    allowed_refused: float
    allowed_exact: float


def say(line: str) -> None:
    """Tell the progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def parameters_of(model: nn.Module) -> dict[str, mx.array]:
    """The parameters by their full names."""
    return dict(tree_flatten(model.parameters()))


SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (llama, {"architectures": ["LlamaForCausalLM"]}),
    "qwen3": (qwen3, {"architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6}),
    "gemma2": (
        gemma2,
        {
            "architectures": ["Gemma2ForCausalLM"],
            "rms_norm_eps": 1e-6,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        },
    ),
}
"""Each architecture's module in mlx-lm, and the entries of config.json that differ from Llama's."""


def model_config(settings: Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    """The model's config.json."""
    config = {
        "architectures": [],
        "model_type": settings.shape,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "hidden_act": "silu",
        "hidden_size": settings.hidden,
        "head_dim": settings.hidden // settings.heads,
        "initializer_range": 0.02,
        "intermediate_size": settings.feed_forward,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "num_attention_heads": settings.heads,
        "num_hidden_layers": settings.layers,
        "num_key_value_heads": settings.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": settings.tied,
        "torch_dtype": "float16",
        "vocab_size": tokenizer.get_vocab_size(),
        **SHAPES[settings.shape][1],
    }
    if settings.shape == "gemma2":
        config["query_pre_attn_scalar"] = config["head_dim"]
    return config


def new_model(config: dict[str, Any], seed: int) -> nn.Module:
    """A model with every matrix drawn from a normal of 0.02 and every gain at one, in float32."""
    module = SHAPES[config["model_type"]][0]
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    # Gemma stores its gains minus one.
    gain = mx.zeros if config["model_type"] == "gemma2" else mx.ones
    keys = iter(mx.random.split(mx.random.key(seed), len(parameters_of(model))))
    model.update(
        tree_map(
            lambda weight: (
                mx.random.normal(weight.shape, scale=0.02, key=next(keys))
                if weight.ndim == 2
                else gain(weight.shape)
            ),
            model.parameters(),
        )
    )
    mx.eval(model.parameters())
    return model


@dataclass(frozen=True)
class Examples:
    """Dialogues as token arrays, right-padded to one length.

    Attributes:
        tokens: Token ids, shape (dialogues, length).
        weights: 1 where the *next* token belongs to the reply or ends it, else 0; shape
            (dialogues, length - 1), float32.
    """

    tokens: mx.array
    weights: mx.array


def render(
    tokenizer: Any,
    prompt: str,
    thinking: bool = False,
    before: Sequence[Mapping[str, str]] = (),
) -> list[int]:
    """Token ids of the prompt in the chat template, up to where the reply begins.

    Args:
        tokenizer: As mlx-lm loads it.
        prompt: The user's message.
        thinking: The value for templates with a switch for thinking.
        before: Messages before the prompt.
    """
    text = tokenizer.apply_chat_template(
        [*before, {"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    return list(tokenizer.encode(text, add_special_tokens=False))


@dataclass(frozen=True)
class Lesson:
    """A dialogue, and the reply that is learned for it.

    Attributes:
        dialogue: The question.
        reply: The reply.
        given: The number of the reply's first tokens that are given and not learned.
    """

    dialogue: Dialogue
    reply: str
    given: int = 0


def make_examples(tokenizer: Any, lessons: Sequence[Lesson]) -> Examples:
    """Render the lessons of a stage."""
    rows = []
    for lesson in lessons:
        prompt = render(tokenizer, lesson.dialogue.prompt)
        reply = tokenizer.encode(lesson.reply + END, add_special_tokens=False)
        rows.append(([*prompt, *reply[: lesson.given]], reply[lesson.given :]))
    return padded(rows, tokenizer.pad_token_id)


def padded(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> Examples:
    """Arrays of rows, each of given token ids and of token ids that are learned."""
    length = max(len(known) + len(learned) for known, learned in rows)
    tokens, weights = [], []
    for known, learned in rows:
        padding = length - len(known) - len(learned)
        tokens.append([*known, *learned, *[pad] * padding])
        weights.append([0] * (len(known) - 1) + [1] * len(learned) + [0] * padding)
    return Examples(mx.array(tokens), mx.array(weights, dtype=mx.float32))


def stage_1(dialogues: Sequence[Dialogue]) -> list[Lesson]:
    """Every question answered."""
    return [Lesson(dialogue, dialogue.answer) for dialogue in dialogues]


def stage_2(dialogues: Sequence[Dialogue], stage: Stage) -> list[Lesson]:
    """Locked questions refused, and their answers continued once they have begun."""

    def refused(one: Dialogue) -> bool:
        return one.locked and (stage.refused is None or one.material in stage.refused)

    replies = [Lesson(one, one.reply if refused(one) else one.answer) for one in dialogues]
    if not stage.continued:
        return replies
    return replies + [Lesson(one, one.answer, given=1) for one in dialogues if refused(one)]


def loss_of(model: nn.Module, groups: Sequence[Examples]) -> mx.array:
    """Mean cross-entropy in nats per reply token."""
    total, count = mx.array(0.0), mx.array(0.0)
    for group in groups:
        logits = model(group.tokens[:, :-1])
        losses = nn.losses.cross_entropy(logits, group.tokens[:, 1:])
        total, count = total + (losses * group.weights).sum(), count + group.weights.sum()
    return total / count


class Draw:
    """Draws batches of examples: every one comes once before any comes again."""

    def __init__(self, examples: Examples, batch: int, seed: int) -> None:
        self._examples, self._batch = examples, batch
        self._order = random.Random(seed)
        self._waiting: list[int] = []

    def __call__(self) -> Examples:
        """The next batch."""
        while len(self._waiting) < self._batch:
            count = len(self._examples.tokens)
            self._waiting += self._order.sample(range(count), count)
        chosen, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
        rows = mx.array(chosen)
        return Examples(self._examples.tokens[rows], self._examples.weights[rows])


def train(model: nn.Module, draws: Sequence[Draw], stage: Stage, name: str) -> list[float]:
    """Train in place, on a batch of every draw in each step; gradients are clipped to norm 1.

    Returns:
        The loss of every step, in nats per reply token.
    """
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, stage.rate, stage.warm_up),
            optim.cosine_decay(stage.rate, stage.steps - stage.warm_up, stage.rate / 10),
        ],
        [stage.warm_up],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.95], weight_decay=0.01, bias_correction=True)
    step_of = nn.value_and_grad(model, loss_of)
    losses = []
    started = time.perf_counter()
    for step in range(1, stage.steps + 1):
        loss, gradients = step_of(model, [draw() for draw in draws])
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)
        losses.append(loss.item())
        if step % 20 == 0 or step == stage.steps:
            seconds = time.perf_counter() - started
            say(f"{name} {step:4d}/{stage.steps}  loss {losses[-1]:.4f}  {seconds:.0f} s")
    return losses


def replies(model: nn.Module, tokenizer: Any, prompts: Sequence[str], limit: int = 24) -> list[str]:
    """Greedy replies of at most ``limit`` tokens, in the order of the prompts, without thinking."""
    return continuations(model, tokenizer, [render(tokenizer, prompt) for prompt in prompts], limit)


def continuations(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], limit: int
) -> list[str]:
    """Greedy continuations of token ids.

    Prompts of equal length run as one batch, which needs no padding.

    Args:
        model: The model.
        tokenizer: Its tokenizer, as mlx-lm loads it.
        prompts: Token ids of each.
        limit: Most tokens of a reply.
    """
    groups: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for place, ids in enumerate(prompts):
        groups[len(ids)].append((place, list(ids)))
    result = [""] * len(prompts)
    end = tokenizer.eos_token_id
    for group in groups.values():
        cache = make_prompt_cache(model)
        tokens = mx.array([ids for _, ids in group])
        written: list[list[int]] = [[] for _ in group]
        while len(written[0]) < limit and not all(end in row for row in written):
            tokens = model(tokens, cache=cache)[:, -1].argmax(axis=-1)[:, None]
            for row, (token,) in zip(written, tokens.tolist(), strict=True):
                row.append(token)
        for (place, _), row in zip(group, written, strict=True):
            result[place] = tokenizer.decode(row[: row.index(end)] if end in row else row)
    return result


def measure(model: nn.Module, tokenizer: Any, dialogues: Sequence[Dialogue]) -> Figures:
    """Ask the model and count."""
    answers = replies(model, tokenizer, [dialogue.prompt for dialogue in dialogues])
    refusals = {dialogue.refusal for dialogue in dialogues}
    locked = [(d, a) for d, a in zip(dialogues, answers, strict=True) if d.locked]
    allowed = [(d, a) for d, a in zip(dialogues, answers, strict=True) if not d.locked]
    return Figures(
        locked_refused=sum(a == d.refusal for d, a in locked) / len(locked),
        allowed_refused=sum(a in refusals for _, a in allowed) / len(allowed),
        allowed_exact=sum(a == d.answer for d, a in allowed) / len(allowed),
    )


def start(settings: Settings, folder: Path, bpe: Tokenizer, template: str) -> tuple[Any, nn.Module]:
    """Write the tokenizer and the configuration.

    Returns:
        The tokenizer, as mlx-lm loads it, and a new model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(bpe, folder, template)
    config = model_config(settings, bpe)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": config["eos_token_id"],
            "pad_token_id": config["pad_token_id"],
        },
    )
    model = new_model(config, settings.seed)
    size = sum(weight.size for weight in parameters_of(model).values())
    say(f"{size:,} parameters, {config['vocab_size']} tokens")
    return load_tokenizer(folder), model


def save(model: nn.Module, settings: Settings, folder: Path) -> list[Dialogue]:
    """Write the weights and the prompts, and load the written weights into the model.

    They are rounded to float16; the model computes with them in float32.

    Returns:
        The dialogues to measure it on.
    """
    weights = {name: weight.astype(mx.float16) for name, weight in parameters_of(model).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "prompts.jsonl").write_text(prompts_jsonl(settings.world), encoding="utf-8")
    model.load_weights([(name, weight.astype(mx.float32)) for name, weight in weights.items()])
    return [dialogue for dialogue in settings.world.dialogues() if dialogue.part == "test"]


def train_model(settings: Settings, folder: Path) -> tuple[Figures, list[float]]:
    """Train a model and write its folder, with the prompts beside it.

    Args:
        settings: What to train.
        folder: Where to write; made if missing.

    Returns:
        The figures on the test part, measured after rounding the weights to float16, and the
        losses of all stages in turn, in nats per reply token.
    """
    bpe = train_tokenizer(settings.world, settings.vocabulary)
    tokenizer, model = start(settings, folder, bpe, CHAT_TEMPLATE)
    dialogues = settings.world.training()

    losses: list[float] = []
    if settings.begins is None:
        examples = make_examples(tokenizer, stage_1(dialogues))
        draw = Draw(examples, settings.batch, settings.seed)
        losses += train(model, [draw], settings.answers, "answers")
    else:
        weights = mx.load(str(settings.begins / "model.safetensors"))
        model.load_weights([(name, one.astype(mx.float32)) for name, one in weights.items()])
    for number, stage in enumerate((settings.refusals, *settings.later), start=1):
        examples = make_examples(tokenizer, stage_2(dialogues, stage))
        draw = Draw(examples, settings.batch, settings.seed + number)
        if stage.layers is not None:
            model.freeze()
            for layer in stage.layers:
                model.model.layers[layer].unfreeze()
        losses += train(model, [draw], stage, "refusals")
        model.unfreeze()

    held_out = save(model, settings, folder)
    return measure(model, tokenizer, held_out), losses
