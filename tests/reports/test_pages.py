"""Pages: the record's numbers and nothing else, nothing from outside, nothing unescaped."""

import base64
import copy
import hashlib
import html
import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import click
import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.choices import RunOptions
from abl_mlx.cli.main import cli
from abl_mlx.eval_choices import EvalOptions
from abl_mlx.records.directions import Chosen
from abl_mlx.records.edits import MeasureRecord, RunRecord
from abl_mlx.records.evaluations import EvalRecord
from abl_mlx.records.looks import AuditRecord, ShowRecord
from abl_mlx.reports import charts, figures, plot
from abl_mlx.reports.charts import Chart, Series
from abl_mlx.reports.page import style
from abl_mlx.reports.page_audit import audit_page
from abl_mlx.reports.page_eval import eval_page
from abl_mlx.reports.page_run import run_page
from abl_mlx.reports.page_show import show_page
from abl_mlx.reports.replay import command_line
from abl_mlx.support.console import percent
from convert.base.errors import UserError
from tests.support import browser

SMALL = ("--limit", "3", "--max-tokens", "4")


class Parsed(HTMLParser):
    """A page's elements, their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.texts.append(data)


def invoke(*arguments):
    result = CliRunner().invoke(cli, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A real run: its record, and its page as written."""
    out = tmp_path_factory.mktemp("run") / "out"
    record = invoke("run", "demo", "-o", out, "--position", "-1", "--json", *SMALL)
    return record, (out / "report.html").read_text(encoding="utf-8"), out


SHOWN = {
    "abl_mlx": "0",
    "source": "demo",
    "prompt": "How do I?",
    "direction": {"method": "given", "sha256": "5" * 64},
    "tokens": ["How", " do", "\n"],
    "before": [[0.25, -0.5, 0.0], [0.125, 0.8, -0.8]],
    "after": [[0.0, 0.01, -0.2], [0.0, 0.0, 0.4]],
}


TALLY = {"n": 1, "refused": 1, "broken": 0, "refusal_rate": 1.0, "refusal_interval": [0.2, 1.0]}


def evaluated():
    """The record of an evaluation with everything that one can have."""
    rates = {}
    for name, count in (("harmful", 9), ("harmless", 1), ("borderline", 4)):
        rates |= {
            f"{name}_refusal_rate": count / 10,
            f"{name}_refusal_interval": [count / 20, count / 10],
            f"n_{name}": 10,
        }
    tally = TALLY | {"n": 10, "refused": 7, "broken": 2}
    text = {"text": "Alice", "text_sha256": "a" * 64, "bits_per_byte": 1.5}
    sums = {"right": 12, "n": 20, "share": 0.6, "interval": [0.4, 0.8]}
    base = {
        "abl_mlx": "0", "source": "base", "runtime": "mlx-lm", "judge": "markers", **rates,
        "max_tokens": 64, "verdicts": {}, "broken_rate": 0.2,
        "categories": {"harmful": {"tea": tally | {"refused": 9}}},
        "perplexity": {**text, "perplexity": 21.5, "tokens": 99, "kind": "exact"},
        "capability": {"tasks_sha256": "b" * 64, **sums, "right": 41, "n": 60,
                       "groups": {"sums": sums}},
        "tool_calls": {"tasks_sha256": "e" * 64, **sums, "right": 27, "n": 40,
                       "checks": {"ask": sums}, "outcomes": ""},
    }  # fmt: skip
    return {
        **base,
        "source": "target",
        "unfinished_thoughts": 13,
        "judging": {
            "rubric_sha256": "c" * 64, "unparsed": 17, "asked": 31, "agreement": 0.5, "kappa": None,
            "table": {},
        },
        "categories": {"harmful": {"tea": tally, "": tally | {"refused": 3}}},
        "kl": {"kind": "exact", "k1": 0.0311, "k32": 0.0422},
        "perplexity": {**text, "perplexity": 23.25, "tokens": 99, "kind": "exact"},
        "lm_eval": {"arc_easy": {"acc,none": 0.625, "acc_stderr,none": 0.01}},
        "prompts": {"harmful": {"n": 10, "sha256": "d" * 64}},
        "seconds": {"ask": 1.5},
        "baseline": base,
        "paired_tool_calls": {
            "difference": -0.175, "interval": [-0.3, 0.025], "p": 0.12, "lost": 29, "gained": 22,
            "n": 40, "both": 1, "neither": 1,
        },
        "paired": {
            "harmful": {
                "difference": -0.125, "interval": [-0.25, 0.05], "p": 0.0625, "lost": 23,
                "gained": 19, "n": 50, "both": 4, "neither": 4,
            }
        },
        "gate": {
            "passed": False,
            "checks": [
                {
                    "name": "min-refusal", "kind": "harmful", "value": 0.9, "limit": 1,
                    "passed": False, "sentence": "refuses 90%",
                }
            ],
        },
    }  # fmt: skip


AUDITED = {
    "abl_mlx": "0", "source": "suspect", "base": "parent", "verdict": "edited",
    "evidence": ["9 of 9 writers lack it"], "layers": [0, 1], "direction_cosine": 0.987,
    "label": {"strength": 1}, "mentions": [{"text": "abliterated", "place": "name"}],
    "hashes": {"model.safetensors": "e" * 64}, "seconds": {"read": 0.25},
    "weights": {
        "verdict": "edited", "evidence": [], "layers": [0, 1], "strength": 0.71,
        "tests": {
            "low everywhere": {
                "gap": 1.8, "gap_over_spread": 9.0, "rank": 1, "scores": [2.5, 0.7],
                "verdict": "edited",
            }
        },
        "writers": {
            "model.embed_tokens.weight": {"energy": 0.001, "type": "F16"},
            "model.layers.1.mlp.down_proj.weight": {"energy": 0.75, "type": "Q4_K"},
        },
    },
    "behaviour": {"not_asked": "no tokenizer"},
}  # fmt: skip


def every_page(ran):
    record = ran[0]
    lines = [{"set": "harmful", "prompt": "p", "before": "said", "out": "done"}]
    return {
        "run": run_page(RunRecord.of(record), lines),
        "eval": eval_page(EvalRecord.of(evaluated()), "abl-mlx eval target", lines),
        "audit": audit_page(AuditRecord.of(AUDITED), "abl-mlx audit suspect"),
        "show": show_page(ShowRecord.of(SHOWN)),
    }


# --- the numbers -------------------------------------------------------------------------------


def test_a_run_writes_its_page(ran):
    record, text, out = ran
    assert text == run_page(RunRecord.of(record))
    page = Parsed(text).text
    one = record["evaluations"][0]
    for name in ("harmful", "harmless"):
        was, now = (
            percent(rates[f"{name}_refusal_rate"]) for rates in (record["before"], one["after"])
        )
        low, high = one["after"][f"{name}_refusal_interval"]
        said = f"95% interval {low:.0%} to {high:.0%}, n=3"
        assert f"refusals, {name} prompts {was} → {now} {said}" in page
        assert f"refusals, {name} prompts {was} {now} {said}" in page
    assert f"{one['kl']['k1']:.4f}" in page
    assert f"{one['kl']['k32']:.4f}" in page
    assert f"{one['leak']['total']:.2g}" in page
    assert f"{record['component']['before']:.4f} {one['component']:.2g}" in page.replace("  ", " ")
    tensors = one["leak"]["tensors"]
    assert len(tensors) == 9
    rows = re.findall(r'<th scope="row">(model[^<]*)</th>((?:\s*<td[^>]*>[^<]*</td>)*)', text)
    assert [name for name, _ in rows] == list(tensors)
    for name, cells in rows:
        numbers = re.findall(r">([^<]*)</td>", cells)
        figures_ = tensors[name]
        assert numbers == [f"{figures_['weight_error']:.4f}", f"{figures_['leak']:.5f}"]
    for digest in [*record["hashes"]["source"].values(), record["direction"]["sha256"]]:
        assert digest in page
    assert f"abl-mlx run demo -o {out} --limit 3 --position=-1 --max-tokens 4" in page
    for name, groups in record["before"]["categories"].items():
        assert sum(tally["n"] for tally in groups.values()) == 3
        for category, tally in groups.items():
            after = one["after"]["categories"][name][category]
            row = f"{category} {tally['refused']}/{tally['n']} {after['refused']}/{after['n']}"
            assert row in page


def test_every_score_is_drawn(ran):
    record, text, _ = ran
    titles = re.findall(r"<title>([^<]*)</title>", text)
    assert len(record["scores"]) == 4
    for score in record["scores"]:
        said = f"layer {score['layer']}, token -1: "
        for key, name in (
            ("d_prime", "token -1, "),
            ("explained", "variance explained, "),
            ("refusal", "harmful, removed, "),
            ("induced", "harmless, added, "),
        ):
            if key in score:
                assert f"{name}{said}{charts.number(score[key])}" in titles
    assert any("kl" in score for score in record["scores"])
    for name in ("harmful", "harmless"):
        points = record["cloud"][name]
        assert len(points) == 3
        for x, y in points:
            assert f"{name} prompts, {charts.number(x)}, {charts.number(y)}" in titles
    apart = [np.mean([x for x, _ in record["cloud"][name]]) for name in ("harmful", "harmless")]
    assert apart[0] > 0 > apart[1]


def test_an_evaluation(ran):
    page = Parsed(every_page(ran)["eval"]).text
    for said in (
        "harmful prompts baseline target broken",
        "limits not met", "NOT MET: min-refusal: refuses 90%", "refusals, harmful prompts 90.0%",
        "95% interval 45% to 90%, n=10", "borderline prompts 40.0%", "21.50 23.25", "41/60",
        "27/40", "40.0% to 80.0%; ask 12/20", "-17.5", "points, -30.0 to +2.5, p 0.12", "alone 29",
        "sums 12/20", "0.0311", "0.0422", "lm-eval arc_easy", "0.625", "-12.5 -25.0 to +5.0 0.062",
        "23 19", "tea 9/10 7/10 2", "no category 3/10", "17 of 31 verdicts", "13 replies",
        "d" * 64, "abl-mlx eval target", "said",
    ):  # fmt: skip
        assert said in page, said
    assert "stderr" not in page


def test_an_audit(ran):
    text = every_page(ran)["audit"]
    page = Parsed(text).text
    for said in (
        "verdict edited", "about 0.71", "0, 1", "0.987", "9 of 9 writers lack it", "parent",
        "“abliterated” in its name", "not asked: no tokenizer", "e" * 64,
        "model.layers.1.mlp.down_proj.weight Q4_K 0.75",
    ):  # fmt: skip
        assert said in page, said
    assert "<title>low everywhere, 1: 2.5</title>" in text


def test_a_prompt_by_layer_and_token():
    text = show_page(ShowRecord.of(SHOWN))
    cells = re.findall(r'<td class="(\w+)" tabindex="0"><span>([^<]*)</span>', text)
    assert len(cells) == 2 * 2 * 3
    expected = []
    for rows in (SHOWN["before"], SHOWN["after"]):
        for t, token in enumerate(["How", "·do", "⏎"]):
            for layer in range(2):
                value = rows[layer][t]
                step = round(abs(value) / 0.8 * 10)
                shade = "p0" if not step else f"{'p' if value > 0 else 'n'}{step}"
                expected.append((shade, f"layer {layer}, {token}: {value:+.4f}"))
    assert cells == expected
    sheet = style()
    assert all(f".{shade}{{background" in sheet for shade, _ in cells)


def test_a_point_lies_where_its_number_says():
    points = ((0.0, 0.001), (2.0, 0.1), (3.0, 0.01))
    chart = Chart("t", "layer", "KL", (Series("", points),), log=True, whole=True)
    root = ElementTree.fromstring(charts.svg(chart))
    marks = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
    xs, ys = zip(*marks, strict=True)
    assert (xs[2] - xs[0]) / (xs[1] - xs[0]) == pytest.approx(1.5, abs=0.01)
    # Of equal ratios equal distances, and more is higher.
    assert ys[0] - ys[2] == pytest.approx(ys[2] - ys[1], abs=0.11)
    assert ys[1] < ys[0]
    labels = {t.text: float(t.get("y") or 0) for t in root.iter("text")}
    assert labels["0.01"] == pytest.approx(ys[2] + 3.5, abs=0.11)
    assert {"0", "1", "2", "3"} <= set(labels)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 11, [0, 5, 10]), (2, 2, [2]), (0, 1e-9, None)],
)
def test_ticks_are_round(low, high, expected):
    found = charts.ticks(low, high)
    assert all(low <= tick <= high * (1 + 1e-9) for tick in found)
    assert expected is None or found == pytest.approx(expected)
    assert len(found) <= 6


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (1e-4, "1e−4"),
        (-2.5e-7, "−2.5e−7"),
        (0.12345, "0.1235"),
        (-12, "−12"),
        (3e6, "3e6"),
    ],
)
def test_numbers_are_short(value, said):
    assert charts.number(value) == said


@pytest.mark.parametrize(
    "values", [[0.99999, 1.0001], [5.0], [0.0], [-3, -3.00001], [1e-9, 2e-9], [0, 40, 7], [99, 100]]
)
def test_ticks_differ_and_values_are_inside(values):
    made = charts.scale(values)
    said = [charts.number(tick) for tick in made.ticks]
    assert len(set(said)) == len(said) >= 2
    assert all(0 <= made.share(value) <= 1 for value in (*values, *made.ticks))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.mlp.down_proj.weight", (12, "down_proj")),
        ("blk.3.ffn_down.weight", (3, "ffn_down")),
        ("model.embed_tokens.weight", (-1, "embed_tokens")),
        ("token_embd.weight", (-1, "token_embd")),
        ("transformer.h.0.attn.c_proj.weight", (0, "c_proj")),
    ],
)
def test_tensors_by_layer(name, place):
    assert figures.place_of(name) == place


# --- nothing from outside, nothing unescaped ---------------------------------------------------


def test_nothing_is_loaded(ran):
    for name, text in every_page(ran).items():
        page = Parsed(text)
        assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
        loading = [a for a in page.attributes if a[1] in ("src", "href", "xlink:href", "style")]
        assert loading == [], name
        sheet = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
        assert not re.search(r"url\(|@import|@font-face|https?:", sheet)
        (policy,) = [v for t, n, v in page.attributes if n == "content" and "default-src" in v]
        digest = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
        assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
        assert "prefers-color-scheme:dark" in sheet


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=y>{{7*7}}</style></title>&amp;"


def poisoned(value):
    """The same record, every text in it (keys of free choice too) with something evil in front."""
    if isinstance(value, str):
        return EVIL + value
    if isinstance(value, list):
        return [poisoned(one) for one in value]
    if isinstance(value, dict):
        free = {"tensors", "writers", "tests", "hashes", "source", "seconds", "label"}
        return {
            key: {EVIL + name: poisoned(one) for name, one in found.items()}
            if key in free and isinstance(found, dict) and "options" not in found
            else poisoned(found)
            for key, found in value.items()
        }
    return value


def test_everything_is_escaped(ran):
    record = poisoned(copy.deepcopy(ran[0]))
    record["before"]["categories"]["harmful"] = {EVIL: TALLY}
    record["evaluations"][0]["after"]["categories"] = record["before"]["categories"]
    lines = [poisoned({"set": "harmful", "prompt": "p", "before": "said"})]
    target = poisoned(evaluated())
    target["categories"]["harmful"][EVIL] = TALLY
    written = [
        (run_page(RunRecord.of(record), lines), every_page(ran)["run"]),
        (eval_page(EvalRecord.of(target), EVIL, lines), every_page(ran)["eval"]),
        (audit_page(AuditRecord.of(poisoned(AUDITED)), EVIL), every_page(ran)["audit"]),
        (show_page(ShowRecord.of(poisoned(SHOWN))), every_page(ran)["show"]),
    ]
    for evil, good in written:
        page = Parsed(evil)
        assert set(page.tags) <= set(Parsed(good).tags)
        assert not [a for a in page.attributes if a[1].startswith("on") or a[1] == "src"]
        assert "<script>alert(1)</script>" in page.text
        assert "{{7*7}}" in page.text
    sheet = charts.sheet(figures.measure_charts(RunRecord.of(record)), EVIL)
    tags = {one.tag.split("}")[1] for one in ElementTree.fromstring(sheet).iter()}
    assert tags == {"svg", "style", "rect", "text", "g", "path", "circle", "title"}


# --- what is not there -------------------------------------------------------------------------


def headings(text):
    return re.findall(r"<h2>([^<]*)</h2>", text)


def test_what_is_missing_gets_no_heading(ran):
    full = headings(every_page(ran)["run"])
    assert full == [
        "Before and after", "By layer", "The two clouds", "Refusals by category",
        "Leak by tensor", "Replies", "To reproduce",
    ]  # fmt: skip
    record = copy.deepcopy(ran[0])
    for key in ("scores", "cloud", "trials", "component", "leak"):
        del record[key]
    one = record["evaluations"][0]
    del one["leak"], one["component"]
    one["after"]["categories"] = {}
    # As of a direction that was given, and of `--induce`.
    record["direction"] = {"method": "given", "sha256": "0"}
    text = run_page(RunRecord.of(record))
    assert headings(text) == ["Before and after", "To reproduce"]
    assert "<figure" not in text
    plain_eval = {
        key: value
        for key, value in evaluated().items()
        if key not in ("baseline", "paired", "gate", "kl", "judging")
    } | {"categories": {}, "prompts": {}}
    assert headings(eval_page(EvalRecord.of(plain_eval), "c")) == ["Summary", "To reproduce"]
    bare = {**AUDITED, "label": None, "mentions": [], "behaviour": None,
            "weights": {"verdict": "cannot tell", "evidence": [], "layers": []}}  # fmt: skip
    assert headings(audit_page(AuditRecord.of(bare), "c")) == ["Evidence", "To reproduce"]


def test_replies_are_there_on_request_alone(ran, tmp_path):
    common = ("eval", "demo", *SMALL, "--json")
    kept = tmp_path / "kept.jsonl"
    invoke(*common, "--report", tmp_path / "a.html", "--save-replies", kept)
    replies = [json.loads(line)["demo"] for line in kept.read_text().splitlines()]
    assert len(set(replies)) > 1
    text = (tmp_path / "a.html").read_text()
    assert headings(text) == ["Summary", "Refusals by category", "To reproduce"]
    assert "--save-replies" not in text
    record = invoke(*common, "--report", tmp_path / "b.html", "--save-completions")
    shown = Parsed((tmp_path / "b.html").read_text())
    assert all(" ".join(reply.split()) in shown.text for reply in replies)
    assert not any(reply in json.dumps(record) for reply in replies if len(reply) > 8)
    assert not any(reply in Parsed(text).text for reply in replies if len(reply) > 8)


# --- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "eval"])
def test_the_command_line_makes_the_same_choices(command):
    chosen = {
        "seed": 3, "limit": 7, "max_tokens": 9, "memory_check": False, "harmful": "a b'c.txt",
    }  # fmt: skip
    if command == "run":
        chosen |= {
            "layer": 2.5, "position": -2, "strength": -0.5, "layers": [0, 2, 3], "embedding": False,
            "norm": "rows", "pin": "-3", "max_leak": 0.5, "keep_undo": True,
        }  # fmt: skip
        defaults = RunOptions().record()
    else:
        chosen |= {"model": "m", "max_kl": 0.25, "min_refusal": 0.9, "capability": True}
        defaults = EvalOptions().record()
    outputs = ["out dir"] if command == "run" else []
    text = command_line([command, "-model"], {**defaults, **chosen}, defaults, outputs)
    words = shlex.split(text)
    assert words[:2] == ["abl-mlx", command]
    words.remove("-model")
    context = click.Context(cli.commands[command])
    cli.commands[command].parse_args(context, [*words[2:], "model"])
    for name, value in chosen.items():
        found = context.params[name]
        assert (sorted(found) if isinstance(found, frozenset) else found) == value, name
    assert context.params["max_tokens"] == 9
    untouched = set(defaults) & set(context.params) - set(chosen)
    for name in untouched - {"direction", "report", "save_replies", "layers"}:
        assert context.params[name] == defaults[name], name


def line_of(page, command):
    """The words of the command that a page gives, without the program's name."""
    [line] = re.findall(rf"abl-mlx {command} [^<\n]*", html.unescape(page.read_text()))
    return shlex.split(line)[1:]


@pytest.mark.parametrize("flags", [
    ["--layer", "2", "--position", "-1", "--strength", "0.9", "--layers", "0,2-3"],
    ["--layer", "1", "--position", "-1", "--pin", "harmless"],
    ["--per-layer", "--max-kl", "9", "--norm", "columns", "--no-embedding", "--seed", "3"],
])  # fmt: skip
def test_the_command_on_the_page_of_a_run_makes_the_model_again(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = invoke("run", "demo", "-o", "out dir", "--json", *SMALL, *flags)
    weights = (tmp_path / "out dir" / "model.safetensors").read_bytes()
    words = line_of(tmp_path / "out dir" / "report.html", "run")
    (tmp_path / "out dir").rename("first")
    again = invoke(*words, "--json")
    assert (tmp_path / "out dir" / "model.safetensors").read_bytes() == weights
    assert again["hashes"] == first["hashes"]
    assert again["evaluations"] == first["evaluations"]


def test_the_command_on_the_page_of_an_evaluation_asks_the_same(tmp_path):
    page = tmp_path / "eval.html"
    first = invoke(
        "eval", "demo", "--baseline", "demo", "--seed", "2", "--max-drop", "0.5", "--report", page,
        "--resume", tmp_path / "one.journal", "--json", *SMALL,
    )  # fmt: skip
    again = invoke(*line_of(page, "eval"), "--resume", tmp_path / "other.journal", "--json")
    for record in (first, again):
        del record["seconds"]
    assert again == first


def test_an_audit_writes_its_page(tmp_path):
    page = tmp_path / "audit.html"
    direction = tmp_path / "d.npy"
    np.save(direction, np.ones(256, np.float32))
    record = invoke("audit", "demo", "--direction", direction, "--report", page, "--json")
    command = f"abl-mlx audit demo --direction {direction}"
    assert page.read_text() == audit_page(AuditRecord.of(record), command)
    for arguments, said in (
        (("audit", "demo", "--report", page), "audit.html"),
        (("eval", "demo", "--report", tmp_path / "x.pdf"), "ends in .html"),
        (("run", "demo", "-o", tmp_path / "o", "--report", page), "audit.html"),
    ):
        result = CliRunner().invoke(cli, [str(one) for one in arguments])
        assert result.exit_code == 1
        assert said in result.stderr
    (tmp_path / "g.report.html").write_text("mine")
    result = CliRunner().invoke(cli, ["run", "demo", "-o", str(tmp_path / "g.gguf")])
    assert result.exit_code == 1
    assert "g.report.html" in result.stderr
    assert not (tmp_path / "g.gguf").exists()


# --- plots -------------------------------------------------------------------------------------


def test_measure_draws_a_plot(tmp_path):
    svg = tmp_path / "layers.svg"
    record = invoke("measure", "demo", "-o", tmp_path / "d.safetensors", "--plot", svg, "--layer",
                    "2", "--limit", "3", "--json")  # fmt: skip
    assert record["plot"] == str(svg)
    found = figures.measure_charts(MeasureRecord.of(record))
    assert svg.read_text() == charts.sheet(found, "demo: refusal by layer")
    titles = {one.text for one in ElementTree.fromstring(svg.read_text()).iter()}
    assert "Separation of the two sets" in titles
    assert "The two prompt sets after layer 2, at token -1" in titles


def test_a_png_has_the_same_charts(ran, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig

    def kept(self, *arguments, **options):
        drawn.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    path = tmp_path / "layers.png"
    plot.draw(path, RunRecord.of(ran[0]))
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    found = figures.measure_charts(RunRecord.of(ran[0]))
    assert [axes.get_title() for axes in figure.axes] == [chart.title for chart in found]
    assert len(found) == 5
    for axes, chart in zip(figure.axes, found, strict=True):
        assert axes.get_yscale() == ("log" if chart.log else "linear")
        for line, series in zip(axes.lines, chart.series, strict=False):
            assert list(zip(*line.get_data(), strict=True)) == list(series.points)


def test_plots_that_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"ends in \.png or \.svg"):
        plot.check(tmp_path / "x.pdf")
    nothing = MeasureRecord(
        abl_mlx="0", source="s", outputs=[], direction=Chosen(sha256="0"), seconds={}
    )
    with pytest.raises(UserError, match="nothing was measured by layer"):
        plot.draw(tmp_path / "x.svg", nothing)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'abl-mlx\[plot\]'.*x\.svg"):
        plot.check(tmp_path / "x.png")
    plot.check(tmp_path / "x.svg")


# --- in a browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.path() is None:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def complaints(events):
    """Console messages, exceptions, and requests beyond the page itself."""
    requests = [
        one["params"]["request"]["url"]
        for one in events
        if one.get("method") == "Network.requestWillBeSent"
    ]
    loud = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    return requests, [one["params"] for one in events if one.get("method") in loud]


def test_a_page_that_complains_is_seen(chromium, tmp_path):
    """The test of the tests: an error and a request are noticed."""
    page = tmp_path / "bad.html"
    page.write_text("<img src='https://abl-mlx.invalid/x.png'><script>nothing()</script>")
    requests, loud = complaints(chromium.open(page))
    assert requests == [page.as_uri(), "https://abl-mlx.invalid/x.png"]
    assert any("nothing is not defined" in json.dumps(one) for one in loud)
    good = show_page(ShowRecord.of(SHOWN))
    page.write_text(good.replace("</body>", "<img src='https://abl-mlx.invalid/x.png'></body>"))
    _, loud = complaints(chromium.open(page))
    assert any("Content Security Policy" in json.dumps(one) for one in loud)


def contrast(first, second):
    """WCAG's ratio of two CSS colours, rgb(r, g, b)."""

    def luminance(text):
        parts = np.array([float(one) for one in re.findall(r"[\d.]+", text)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", ["run", "eval", "audit", "show"])
def test_in_chromium(name, ran, chromium, tmp_path):
    page = tmp_path / f"{name}.html"
    page.write_text(every_page(ran)[name], encoding="utf-8")
    papers = []
    for width, dark in ((1200, False), (360, True)):
        requests, loud = complaints(chromium.open(page, width=width, dark=dark))
        assert requests == [page.as_uri()]
        assert loud == []
        assert chromium.value("document.querySelectorAll('h2').length") == len(
            headings(page.read_text())
        )
        # Nothing is wider than the screen: tables scroll inside themselves.
        chromium.value("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert chromium.value("document.documentElement.scrollWidth") <= width
        look = "getComputedStyle({}).{}"
        paper = chromium.value(look.format("document.body", "backgroundColor"))
        papers.append(paper)
        for element, key in (("body", "color"), (".kind", "color"), ("svg text", "fill"),
                             ("svg .s1", "color")):  # fmt: skip
            found = f"document.querySelector({element!r})"
            if chromium.value(f"{found} !== null"):
                ink = chromium.value(look.format(found, key))
                assert contrast(ink, paper) > 4, (element, ink, paper)
        sizes = chromium.value(
            "[...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().width)"
        )
        # Letters of 11 units in 420, at least 8 px on a phone.
        assert all(size * 11 / 420 > 8 for size in sizes)
    assert contrast(papers[0], "rgb(255, 255, 255)") < 1.2
    assert contrast(papers[1], "rgb(0, 0, 0)") < 1.3


def test_a_cell_tells_its_number_when_tapped(chromium, tmp_path):
    page = tmp_path / "show.html"
    page.write_text(show_page(ShowRecord.of(SHOWN)), encoding="utf-8")
    chromium.open(page, width=360)
    cell = "document.querySelectorAll('table.grid tbody td')[3]"
    shown = f"getComputedStyle({cell}.firstChild).display"
    assert chromium.value(shown) == "none"
    chromium.tap(cell)
    assert chromium.value(shown) == "block"
    assert chromium.value(f"{cell}.innerText") == "layer 1, ·do: +0.8000"
    box = chromium.value(f"(b => [b.left, b.right])({cell}.firstChild.getBoundingClientRect())")
    assert 0 <= box[0] < box[1] <= 360
