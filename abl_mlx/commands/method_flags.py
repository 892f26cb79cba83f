"""Checks that the flags of a measurement go together with its method and with each other."""

from __future__ import annotations

from abl_mlx.choices import Measuring
from abl_mlx.commands import rome_choice
from abl_mlx.directions import methods
from abl_mlx.support.flags import first_given, not_together
from convert.base.errors import UserError

# Methods whose directions --protect does not know how to change.
_OWN_DIRECTIONS = (methods.ROME, "over-refusal")


def refuse(first: str, second: str) -> None:
    """Refuse two flags that do not go together."""
    raise UserError(not_together(first, second))


def refuse_given(first: str, *others: tuple[str, object]) -> None:
    """Refuse the first given of some flags, as of `first_given`, which do not go with another."""
    if (flag := first_given(others)) is not None:
        refuse(first, flag)


def check_method(how: Measuring) -> None:
    """Check that the flags of the measurement go together.

    Raises:
        UserError: naming two flags that do not.
    """

    finding = how.finding

    if finding.method == methods.ROME:
        rome_choice.check(how)
    method = methods.named(finding.method)
    by_rank = method.subspace or finding.across is not None
    if finding.rank is not None and not by_rank:
        raise UserError(
            f"--rank {finding.rank}: one direction is all that this method finds; add --method "
            f"{', '.join(methods.SUBSPACES)}, --across layers or --across positions."
        )
    if finding.per_layer and finding.across is not None:
        refuse("--per-layer", f"--across {finding.across}")
    if method.subspace and finding.across is not None:
        refuse(f"--method {method.name}", f"--across {finding.across}")
    if finding.per_layer and finding.layer is not None:
        refuse("--per-layer", "--layer")
    if finding.across == "layers" and finding.layer is not None:
        refuse("--across layers", "--layer")
    if finding.across == "positions" and finding.position is not None:
        refuse("--across positions", "--position")
    _check_effects(how)
    if method.each_layer and (finding.per_layer or finding.across is not None):
        refuse(f"--method {method.name}", "--per-layer or --across")
    between = finding.layer is not None and finding.layer != int(finding.layer)
    if between and (method.each_layer or not method.is_plain):
        refuse(f"--method {method.name}", "a --layer between two")
    if how.editing.pin is not None and (
        finding.per_layer or finding.across == "layers" or method.each_layer
    ):
        raise UserError(
            "--pin holds what one layer's directions have: leave --per-layer, --across layers and "
            "--method biprojected out."
        )
    if how.given.tensor is not None:
        raise UserError("--tensor names a tensor of --direction FILE: give that too.")
    if finding.borderline is not None and finding.method != "over-refusal":
        raise UserError("--borderline is used by --method over-refusal: add that.")
    if finding.method == "over-refusal":
        # What it keeps is the refusals of harmful prompts.
        refuse_given(
            "--method over-refusal",
            ("--keep", how.prompting.keep), ("--keep-system", how.prompting.keep_system),
        )  # fmt: skip


def _check_effects(how: Measuring) -> None:
    """Check flags of methods that need the loaded model, and of ``--protect``."""
    finding, method = how.finding, methods.named(how.finding.method)
    if not method.is_plain:
        refuse_given(
            f"--method {method.name}",
            ("--per-layer", finding.per_layer), (f"--across {finding.across}", finding.across),
            ("--pin", how.editing.pin), ("--norm rows", how.editing.norm == "rows"),
            (f"--kind {how.editing.kind}", how.editing.kind != "project"),
            (
                "--learn-strengths",
                how.searching.learn_strengths is not None and method.strength != 1,
            ),
        )  # fmt: skip
    if finding.protect is not None:
        refuse_given(
            "--protect",
            (f"--method {method.name}", bool(method.refine) or method.name in _OWN_DIRECTIONS),
            ("--keep", how.prompting.keep), ("--keep-system", how.prompting.keep_system),
            ("--search", how.searching.searches), ("--sae", finding.sae),
        )  # fmt: skip
