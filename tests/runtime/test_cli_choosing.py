"""Which processes a command is about, and what becomes of many: pids, the standard input, filters, exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from prunus.persistence.persister import Record
from prunus.runtime import display
from tests.runtime.shell import PROJECT, Shell, daemon_in, said_by


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A shell in a folder whose daemon runs, with one worker."""
    with daemon_in(tmp_path_factory.mktemp("live")) as shell:
        yield shell


def waiting(live: Shell, *words: str) -> str:
    """The pid of a new process that waits."""
    pid = live.launch("Ask", *words)
    live.until(pid, lambda facts: facts["state"] == "waiting")
    return pid


def listed(live: Shell, *words: str) -> set[str]:
    return set(live("list", "-q", *words).stdout.split())


def test_pids_come_from_the_standard_input(live: Shell) -> None:
    """What `list -q` prints is what `-` takes; nothing at all is no error."""
    pids = {waiting(live, "--tag", "piped") for _ in range(3)}
    text = live("list", "-q", "--tag", "piped").stdout
    assert set(text.splitlines()) == pids
    assert set(live("pause", "-", typed=text).stdout.split()) == {"paused", *pids}
    assert listed(live, "--tag", "piped", "--paused") == pids
    assert listed(live, "--tag", "piped", "--state", "paused") == pids
    ended = live("play", "-", typed="")
    assert (ended.stdout, ended.stderr) == ("", "")
    assert json.loads(live("show", "--json", "-", typed=min(pids)).stdout)["pid"] == min(pids)
    assert live("kill", "--tag", "piped").stderr.endswith("killed: 3 processes\n")


def test_one_that_is_missing_does_not_keep_the_others_from_it(live: Shell) -> None:
    """Those that exist are paused, the other one is said, and the exit code is 1; a near miss is suggested."""
    pid = waiting(live, "--pid", "copper-4")
    ended = live("pause", pid, "coper-4", code=1)
    assert ended.stdout == f"paused {pid}\n"
    assert "there is no process coper-4; did you mean copper-4 (Ask, waiting)?" in ended.stderr
    assert ended.stderr.endswith("paused: 1 process, 1 could not\n")
    assert "there is no process zzz; `prunus list --all`" in live.error("show", "zzz")
    live("kill", pid)


def test_every_filter_holds(live: Shell) -> None:
    """Class by either name, each of the tags, parent, queue, key, age, roots; more of them choose fewer."""
    one = waiting(live, "--tag", "filtered", "--tag", "red", "--process-key", "filtered-1")
    other = waiting(live, "--tag", "filtered", "--priority", "7")
    family = live.launch("Fan", "count=2", "--tag", "filtered")
    live("watch", family)
    children = set(live.record(family)["children"])
    assert listed(live, "--tag", "filtered") == {one, other}
    assert listed(live, "--tag", "filtered", "--tag", "red") == {one}
    assert listed(live, "--tag", "filtered", "--class", "Ask") == {one, other}
    assert listed(live, "--tag", "filtered", "--class", "tests.runtime.workflows:Ask") == {one, other}
    assert listed(live, "--tag", "filtered", "--class", "Add") == set()
    assert listed(live, "--process-key", "filtered-1") == {one}
    assert listed(live, "--parent", family[-8:], "--all") == children
    assert listed(live, "--parent", family[-8:], "--all", "--roots") == set()
    assert listed(live, "--tag", "filtered", "--all", "--state", "finished") == {family}
    assert listed(live, "--tag", "filtered", "--older-than", "1h") == set()
    assert listed(live, "--tag", "filtered", "--older-than", "0s") == {one, other}
    assert listed(live, "--tag", "filtered", "--queue", "default") == {one, other}
    assert listed(live, "--tag", "filtered", "--queue", "gpu") == set()
    assert "is no duration" in live.error("list", "--older-than", "2 weeks", code=2)
    assert re.search(r"^pid +class +state +priority +step", live("list", "--tag", "filtered").stdout)
    assert "priority" not in live("list", "--tag", "red").stdout
    wide = live("list", "--tag", "filtered", "--wide").stdout
    assert re.search(
        rf"^{one} +tests.runtime.workflows:Ask +waiting +default +- .* filtered, red +filtered-1 ", wide, re.MULTILINE
    )
    assert (
        live("list", "--tag", "filtered", "--sort", "priority", "-n", "9").stdout.splitlines()[1].startswith(other[-8:])
    )
    assert live("kill", "--tag", "filtered", "--class", "Ask").stderr == "killed: 2 processes\n"


def test_a_command_takes_those_that_it_applies_to(live: Shell) -> None:
    """Unless states are asked for: then those, and what can't be done is said."""
    paused, playing = waiting(live, "--tag", "some"), waiting(live, "--tag", "some")
    live("pause", paused)
    assert live("play", "--tag", "some").stdout == f"playing {paused}\n"
    assert live("retry", "--tag", "some").stderr == "continued: 0 processes\n"
    assert live("kill", "--tag", "some", "--state", "finished").stdout == ""
    assert "add --yes" in live.error("delete", "--tag", "some", code=2)
    assert live("delete", "--tag", "some", "-y").stderr == "deleted: 0 processes\n"
    live("kill", playing)
    assert live("delete", "--tag", "some", "-y").stdout == f"deleted {playing}\n"
    ended = live("delete", paused, code=1)
    assert ended.stderr.startswith(f"Error: {paused[-8:]}: ")
    live("kill", paused)
    assert live("delete", paused[-8:]).stdout == f"deleted {paused}\n"
    assert f"there is no process {paused}" in live.error("show", paused)
    for words in (["kill"], ["retry"], ["delete"], ["kill", "x", "--state", "running"]):
        assert "say which processes" in live.error(*words, code=2)


def test_retry_of_all_takes_the_excepted_ones(live: Shell) -> None:
    """Once the cause is gone."""
    file = live.folder / "cause"
    pids = {live.launch("Heal", f"file={file}", "--tag", "sick") for _ in range(2)}
    for pid in pids:
        live.until(pid, lambda facts: facts["state"] == "excepted")
    file.touch()
    assert set(live("retry", "--tag", "sick").stdout.split()) == {"continued", *pids}
    for pid in pids:
        live.until(pid, lambda facts: facts["outputs"] == {"healed": True})


def test_a_launch_with_a_key_is_done_once(live: Shell) -> None:
    """The second one prints the pid of the first; the options of a launch are kept."""
    words = ("--process-key", "once", "--priority", "4", "--json")
    first = json.loads(live("launch", "tests.runtime.workflows:Ask", *words).stdout)
    assert json.loads(live("launch", "tests.runtime.workflows:Ask", *words).stdout) == first
    facts = live.until(first["pid"], lambda facts: facts["state"] == "waiting")
    assert (facts["key"], facts["priority"], facts["queue"]) == ("once", 4, "default")
    text = live("show", first["pid"]).stdout
    assert re.search(r"^queue +default, priority 4$", text, re.MULTILINE)
    assert re.search(r"^key +once$", text, re.MULTILINE)
    live("kill", first["pid"])
    for wrong in (["--resource", "licence=x"], ["--resource", "a=1", "--resource", "a=2"], ["--priority", "10"]):
        live.error("launch", "tests.runtime.workflows:Ask", *wrong, code=2)


def test_a_launch_that_is_waited_for_answers_in_json(live: Shell) -> None:
    """With what it gave, or why it failed; the exit code is the same."""
    done = json.loads(live("launch", "tests.runtime.workflows:Add", "a=2", "--wait", "--json").stdout)
    assert (done["state"], done["outputs"], done["failure"]) == ("finished", {"sum": 3}, None)
    failed = json.loads(live("launch", "tests.runtime.workflows:Boom", "--wait", "--json", code=1).stdout)
    assert (failed["state"], failed["failure"]["message"]) == ("excepted", "no good")


def test_a_process_of_another_queue_and_with_resources(live: Shell) -> None:
    """A resource that nobody has configured is refused with what to do; a queue that nobody serves is waited in."""
    assert "licence" in live.error("launch", "tests.runtime.workflows:Ask", "--resource", "licence=2")
    live("broker", "resource", "licence", "2")
    pid = live.launch("Ask", "--resource", "licence", "--queue", "gpu")
    assert listed(live, "--queue", "gpu") == {pid}
    facts = live.record(pid)
    assert (facts["state"], facts["queue"], facts["resources"]) == ("created", "gpu", {"licence": 1})
    assert re.search(r"^pid +class +state +queue +step", live("list", "--queue", "gpu").stdout)
    assert re.search(r"^resources +1 licence$", live("show", pid).stdout, re.MULTILINE)
    live("kill", pid)


def test_a_list_says_how_many_there_are(live: Shell) -> None:
    """The newest are shown, and of how many, if they are not all."""
    pids = [waiting(live, "--tag", "counted") for _ in range(3)]
    ended = live("list", "--tag", "counted", "-n", "2")
    assert [line[:8] for line in ended.stdout.splitlines()[1:]] == [pid[-8:] for pid in reversed(pids[1:])]
    assert ended.stderr == "2 of 3 processes; --limit shows more.\n"
    assert live("list", "--tag", "counted", "-n", "3").stderr == ""
    assert re.fullmatch(r"1 of \d+ processes; --limit shows more.\n", live("list", "-n", "1").stderr)
    live("kill", "--tag", "counted")


def test_a_tree_of_what_is_there(live: Shell) -> None:
    """Of one process also after its end, with its children; without a pid of all that live; nested for programs."""
    pid = live.launch_feature("SumOfSquares", "count=20")
    live("watch", pid)
    text = live("tree", pid[-8:]).stdout
    assert re.match(rf"✓ SumOfSquares {pid[-8:]}  finished  20 of 20 ended  ", text)
    assert "20 more finished" in text
    assert live("tree", "--all", pid).stdout.count("Square ") == 20
    [nested] = json.loads(live("tree", "--json", pid).stdout)
    assert {child["parent"] for child in nested["children"]} == {pid}
    assert len(nested["children"]) == 20
    assert "prunus tree PID" in live("tree").stderr
    lives = waiting(live)
    assert live("tree").stdout.startswith(f"◌ Ask {lives[-8:]}  waiting")
    live("kill", lives)


def test_the_logs_of_a_whole_family(live: Shell) -> None:
    """In the order of their times, each line with who said it, also while nothing happens to the parent; as JSON."""
    pid = live("launch", "flow:Hall").stdout.strip()
    [child] = live.until(pid, lambda facts: len(facts["children"]) == 1)["children"]
    with live.begin("logs", "-f", "--tree", pid) as following:
        assert following.stdout
        for text in ("hello", "again", "the end"):
            live("send", child, "say", text)
            line = next(following.stdout)
            assert re.search(rf"  {child[-8:]} Speaker  REPORT  \[say\]  {text}$", line)
        out, error = said_by(following)
    assert (following.returncode, error) == (0, "")
    assert re.search(rf"  {pid[-8:]} Hall  REPORT  \[end\]  silence\n$", out)
    lines = [json.loads(line) for line in live("logs", "--tree", "--json", pid).stdout.splitlines()]
    assert [line["text"] for line in lines] == ["hello", "again", "the end", "silence"]
    assert [line["pid"] for line in lines] == [child, child, child, pid]
    assert live("logs", "--tree", pid, "-n", "1").stdout.endswith("silence\n")
    assert len(live("logs", pid).stdout.splitlines()) == 1


def test_show_tells_the_steps_and_the_context(live: Shell) -> None:
    """Which step took how long and what came of it, what stands in the context, and what it gave so far."""
    pid = live("launch", "flow:Stubborn").stdout.strip()
    live.until(pid, lambda facts: facts["state"] == "waiting")
    [step] = live.record(pid)["steps"]
    assert (step["step"], step["outcome"], step["attempt"], step["by"]) == ("run", "failed", 1, "worker-1")
    assert step["note"].startswith("attempt 1 of 3 failed")
    text = live("show", pid).stdout
    assert re.search(r"^step +began +took +waited +by +outcome\nrun .* attempt 1 of 3 failed \(C", text, re.MULTILINE)
    live("kill", pid)
    file = live.folder / "there"
    file.touch()
    chain = live("launch", "flow:Family", f"file={file}").stdout.strip()
    live("watch", chain)
    facts = live.record(chain)
    assert facts["context"]["begun"] == [1, 2]
    assert facts["context"]["first"]["value"] == "done"
    assert [step["step"] for step in facts["steps"]] == ["begin", "end"]
    assert re.search(r"^context\nbegun: \[1, 2\]\nfirst:\n  pid: ", live("show", chain).stdout, re.MULTILINE)


def test_the_documented_keys_are_those_of_json(live: Shell) -> None:
    """The page on commands names every key of `list` and of `show`, and no other."""
    page = (PROJECT / "docs" / "commands.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| key \| value \|\n\|---\|---\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    named = [re.findall(r"`(\w+)`", "".join(re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE))) for table in tables]
    row = Record(pid="x", class_id="m:C", state="created", play="playing", created_at=0, updated_at=0, epoch=0, seq=0)
    assert sorted(named[0]) == sorted(display.record_as_data(row))
    shown = live.record(live.launch("Add", "a=1"))
    assert sorted(named[0] + named[1]) == sorted(shown)
