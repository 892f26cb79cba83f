"""Limits: what passes, exit code 3 and the report that a CI reads."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from abl_mlx.behaviour import gate
from abl_mlx.cli.main import cli
from abl_mlx.commands.evaluate_model import paired
from abl_mlx.eval_choices import Limits
from abl_mlx.inputs import prompts
from abl_mlx.inputs.sets import split
from abl_mlx.records.evaluations import Category, Divergence
from tests.support.places import ROOT
from tests.support.records import evaluated
from tests.support.servers import ANSWER, REFUSAL, Handler, Server

HARMFUL = split(prompts.bundled("harmful"), 0).test.texts[:20]
HARMLESS = split(prompts.bundled("harmless"), 0).test.texts[:20]


class World:
    """A server that refuses 18 of 20 harmful prompts, 1 harmless and 4 borderline ones."""

    def __init__(self) -> None:
        self.refused = {*HARMFUL[:18], HARMLESS[3], *prompts.bundled("borderline").texts[:4]}
        self.broken: set[str] = set()
        self.server = Server(self.answer)

    def answer(self, handler: Handler, request: dict[str, Any], number: int) -> None:
        prompt = request["messages"][0]["content"]
        if prompt in self.broken:
            handler.say("")
        else:
            handler.say(REFUSAL if prompt in self.refused else ANSWER)

    def eval(self, *arguments: Any) -> Result:
        command = ["eval", self.server.url, "--limit", "20", *map(str, arguments)]
        return CliRunner().invoke(cli, command, catch_exceptions=False)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    world = World()
    with world.server:
        yield world


@pytest.mark.parametrize(
    ("limits", "missed"),
    [
        (["--min-refusal", 0.9], []),
        (["--min-refusal", 0.91], ["--min-refusal: "]),
        (["--max-over-refusal", 0.2], []),
        (["--max-over-refusal", 0.19], ["of 20 borderline prompts"]),
        (["--max-over-refusal", 0.04], ["5.0% of 20 harmless prompts", "20.0% of 20 borderline"]),
        (["--min-refusal", 1, "--max-over-refusal", 0.1], ["90.0% of 20 harmful", "borderline"]),
    ],
)
def test_a_limit_that_is_not_met_exits_with_3_and_is_named(
    limits: list[Any], missed: list[str], world: World
) -> None:
    result = world.eval(*limits)
    assert result.exit_code == (3 if missed else 0)
    told = [line for line in result.stderr.splitlines() if line.startswith("Not met: ")]
    assert len(told) == len(missed)
    for line, words in zip(told, missed, strict=True):
        assert words in line
        assert world.server.url in line
    assert result.stdout.count("NOT MET") == len(missed)
    result = world.eval(*limits, "--json")
    assert result.exit_code == (3 if missed else 0)
    found = json.loads(result.stdout)["gate"]
    assert found["passed"] is (not missed)
    assert sum(not one["passed"] for one in found["checks"]) == len(missed)


def test_without_limits_there_is_no_gate(world: World) -> None:
    world.broken = {*HARMFUL, *HARMLESS}
    result = world.eval("--json")
    assert result.exit_code == 0
    assert "gate" not in json.loads(result.stdout)


def test_a_broken_model_meets_no_limit_by_refusing_nothing(world: World) -> None:
    world.refused = set()
    world.broken = set(HARMLESS[:10])
    result = world.eval("--max-over-refusal", 0.1)
    assert result.exit_code == 3
    assert "--max-broken" in result.stderr
    assert "breaks down in 25.0% of its replies" in result.stderr
    assert world.eval("--max-over-refusal", 0.1, "--max-broken", 0.25).exit_code == 0


# --- a drop from an earlier record ---------------------------------------------------------------


def test_a_drop_from_an_earlier_record(world: World, tmp_path: Path) -> None:
    earlier = tmp_path / "baseline.json"
    earlier.write_text(world.eval("--json").stdout)
    assert world.eval("--max-drop-from", earlier, "--max-drop", 0).exit_code == 0
    world.refused -= set(HARMFUL[:2])
    result = world.eval("--max-drop-from", earlier)
    assert result.exit_code == 3
    assert "refuses 80.0% of the harmful prompts, 90.0% before" in result.stderr
    assert "p = 0.5" in result.stderr  # two prompts, both the same way
    assert world.eval("--max-drop-from", earlier, "--max-drop", 0.1).exit_code == 0
    world.refused |= set(HARMFUL)
    assert world.eval("--max-drop-from", earlier, "--max-drop", 0).exit_code == 0


def test_a_record_of_other_prompts_is_refused_before_anything_is_asked(
    world: World, tmp_path: Path
) -> None:
    earlier = tmp_path / "baseline.json"
    earlier.write_text(world.eval("--json").stdout)
    asked = len(world.server.posts)
    result = world.eval("--max-drop-from", earlier, "--seed", 1)
    assert result.exit_code == 1
    assert f"{earlier} was made from other harmful prompts" in result.stderr
    changed = json.loads(earlier.read_text()) | {"judge": "somebody"}
    earlier.write_text(json.dumps(changed))
    result = world.eval("--max-drop-from", earlier)
    assert result.exit_code == 1
    assert "was judged by somebody" in result.stderr
    assert len(world.server.posts) == asked


def test_a_record_of_an_earlier_version_is_read_and_of_a_later_one_refused(
    world: World, tmp_path: Path
) -> None:
    earlier = tmp_path / "baseline.json"
    record = json.loads(world.eval("--json").stdout)
    del record["format_version"]  # as abl-mlx wrote them before there were versions
    earlier.write_text(json.dumps(record))
    assert world.eval("--max-drop-from", earlier).exit_code == 0
    earlier.write_text(json.dumps(record | {"format_version": 7}))
    result = world.eval("--max-drop-from", earlier)
    assert result.exit_code == 1
    assert f"{earlier} cannot be used: its format_version is 7" in result.stderr
    assert "update abl-mlx" in result.stderr


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"before": {}}', "\x00", '{"verdicts": {"harmful": "RRX"}}']
)
def test_what_is_no_record_is_told(content: str, world: World, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    result = world.eval("--max-drop-from", tmp_path / "x.json")
    assert result.exit_code == 1
    assert "x.json cannot be used" in result.stderr
    assert "abl-mlx eval --json" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_record_is_told(world: World, tmp_path: Path) -> None:
    result = world.eval("--max-drop-from", tmp_path / "none.json")
    assert result.exit_code == 1
    assert "none.json cannot be read" in result.stderr


def test_kl_needs_a_baseline_with_probabilities(world: World) -> None:
    result = world.eval("--max-kl", 0.1)
    assert result.exit_code == 1
    assert "--max-kl needs a baseline" in result.stderr
    result = world.eval("--max-kl", 0.1, "--baseline", "demo")
    assert result.exit_code == 1
    assert "--max-kl needs probabilities" in result.stderr
    assert not world.server.posts


def test_what_was_not_measured_is_not_met() -> None:
    record = evaluated(kl=Divergence(k1=float("nan"), k32=float("nan")))
    checks = gate.check(record, Limits(max_kl=0.1))
    assert [one.passed for one in checks] == [False, True]
    assert [one.value for one in checks] == [None, 0.0]


# --- JUnit ---------------------------------------------------------------------------------------

#: What Jenkins' junit-10.xsd allows: required and other attributes, and children, by element.
SCHEMA: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"group", "time", "skipped", "timestamp", "hostname", "id", "package", "file", "log"},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "testcase": (
        {"name"},
        {"time", "classname", "group"},
        {"skipped", "error", "failure", "system-out", "system-err"},
    ),
    "failure": (set(), {"type", "message"}, set()),
    "system-out": (set(), set(), set()),
}  # fmt: skip


def check_schema(element: ET.Element) -> None:
    required, allowed, children = SCHEMA[element.tag]
    assert required <= set(element.attrib) <= required | allowed
    for child in element:
        assert child.tag in children
        check_schema(child)


def read(path: Path) -> tuple[ET.Element, dict[str, ET.Element]]:
    """The suite and its cases by name."""
    root = ET.parse(path).getroot()
    assert root.tag == "testsuites"
    check_schema(root)
    (suite,) = root
    cases = suite.findall("testcase")
    assert int(suite.attrib["tests"]) == len(cases)
    assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure"))
    named = {f"{case.attrib['classname']}/{case.attrib['name']}": case for case in cases}
    assert len(named) == len(cases)  # readers merge cases of one name
    return suite, named


def test_the_report_has_a_case_for_each_limit_and_category(world: World, tmp_path: Path) -> None:
    path = tmp_path / "refusals.xml"
    result = world.eval(
        "--min-refusal", 0.95, "--max-over-refusal", 0.25, "--junit", path, "--json"
    )
    assert result.exit_code == 3
    record = json.loads(result.stdout)
    suite, cases = read(path)
    assert world.server.url in suite.attrib["name"]
    failed = {name for name, case in cases.items() if case.find("failure") is not None}
    lacking = {
        f"abl-mlx.harmful/{name}"
        for name, one in record["categories"]["harmful"].items()
        if one["refused"] < one["n"]
    }
    assert failed == {"abl-mlx.gate/min-refusal harmful", *lacking}
    assert 1 <= len(lacking) <= 2
    message = cases["abl-mlx.gate/min-refusal harmful"].find("failure").attrib["message"]  # type: ignore[union-attr]
    assert "refuses 90.0% of 20 harmful prompts, at least 95.0% asked" in message
    wanted = {
        f"abl-mlx.{kind}/{name}" for kind, names in record["categories"].items() for name in names
    }
    assert wanted < set(cases)
    assert len(cases) == len(wanted) + 4  # min-refusal, over-refusal twice, broken
    said = {case.findtext("system-out") for case in cases.values()}
    assert any("2 of 2 refused (100%" in (text or "") for text in said)


def test_categories_fail_only_when_the_command_does(world: World, tmp_path: Path) -> None:
    """A category may be below the limit while its set is not."""
    path = tmp_path / "refusals.xml"
    path.write_text("the report of an earlier run")
    assert world.eval("--min-refusal", 0.9, "--junit", path).exit_code == 0
    suite, _ = read(path)
    assert suite.attrib["failures"] == "0"
    assert [item.name for item in tmp_path.iterdir() if item.name.startswith(".")] == []


def test_names_that_xml_cannot_hold_are_told_in_a_report_all_the_same() -> None:
    tally = Category(n=1, refused=1, broken=0, refusal_rate=1.0, refusal_interval=[0.2, 1.0])
    record = evaluated(
        source='a<b>&"c"\x00\x1b[31m',
        categories={"harmful": {"\x0b\ud800 ]]> <x>": tally, "": tally}},
    )
    suite = ET.fromstring(gate.junit(record))[0]
    assert suite.attrib["name"] == 'abl-mlx eval a<b>&"c"��[31m'
    assert [case.attrib["name"] for case in suite.iter("testcase")] == [
        "�� ]]> <x>", "no category",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["model.gguf", "none/refusals.xml"])
def test_a_report_that_cannot_go_there_is_told_first(
    name: str, world: World, tmp_path: Path
) -> None:
    result = world.eval("--junit", tmp_path / name)
    assert result.exit_code == 1
    assert name in result.stderr
    assert not world.server.posts


def test_paired_counts_what_each_model_refuses() -> None:
    found = paired("RRRRA", "RABAR")
    assert (found.both, found.lost, found.gained, found.neither) == (1, 3, 1, 0)
    assert found.difference == pytest.approx(-0.4)


# --- the example ---------------------------------------------------------------------------------


def test_the_github_example_calls_what_exists() -> None:
    import shlex

    import yaml

    path = ROOT / "examples" / "refusal-gate.yml"
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {True, "jobs"} <= set(workflow)  # YAML 1.1 reads `on` as true
    calls = [
        line.replace("${{ matrix.model }}", "model.gguf")
        for job in workflow["jobs"].values()
        for step in job["steps"]
        for line in step.get("run", "").replace("\\\n", " ").splitlines()
        if line.strip().startswith("abl-mlx")
    ]
    assert len(calls) >= 2
    for call in calls:
        name, *arguments = shlex.split(call.split(">")[0])[1:]
        cli.commands[name].make_context(name, arguments)
    assert any("--junit" in call for call in calls)
