"""`prunus export`, `import` and `prune` as people use them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runtime.shell import Shell, daemon_in
from tests.runtime.terminal import terminal


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A shell in a folder whose daemon runs, with one worker."""
    with daemon_in(tmp_path_factory.mktemp("live")) as shell:
        yield shell


def ended(live: Shell, *words: str) -> str:
    """The pid of a process that has finished."""
    pid = live.launch("Add", "a=1", *words)
    live.until(pid, lambda facts: facts["state"] == "finished")
    return pid


def waiting(live: Shell, *words: str) -> str:
    """The pid of a process that waits for somebody."""
    pid = live.launch("Ask", *words)
    live.until(pid, lambda facts: facts["state"] == "waiting" and not facts["owner"])
    return pid


def test_a_process_leaves_in_a_file_and_comes_back(live: Shell) -> None:
    """The way that the page on looking after it describes; what is there already is not overwritten by either."""
    asks, adds = waiting(live), ended(live)
    live("pause", asks)
    told = live("export", asks[-8:], adds, "out.prunus").stdout
    assert told.startswith("out.prunus: 2 processes, ")
    assert "--force replaces it" in live.error("export", asks, "out.prunus")
    assert live("export", asks, adds, "out.prunus", "--force").stdout.startswith("out.prunus: 2 processes, ")
    assert "nothing was imported" in live.error("import", "out.prunus")
    live("kill", asks, "-m", "moved")
    live("delete", asks, adds)

    listed = live("import", "out.prunus", "--dry-run")
    assert [line.split() for line in listed.stdout.splitlines()[1:]] == [
        [asks, "Ask", "waiting"],
        [adds, "Add", "finished"],
    ]
    assert "2 processes, exported" in listed.stderr
    assert live("list", "-a", "-q").stdout == ""

    brought = live("import", "out.prunus")
    assert brought.stdout.splitlines() == [f"imported {asks}", f"imported {adds}"]
    assert "imported: 2 processes\n1 of them had not ended, and wait for `prunus play`\n" in brought.stderr
    assert "outputs\nsum: 2" in live("show", adds).stdout
    again = live("import", "out.prunus", "--skip-existing")
    assert (again.stdout, again.stderr.count("it is here already")) == ("", 2)
    live("play", asks)
    live("resume", asks, "hello")
    assert "answer: hello" in live("show", asks).stdout
    live("delete", asks, adds)


def test_a_file_that_is_none_is_refused(live: Shell) -> None:
    """With one sentence that names it."""
    (live.folder / "odd").write_text("hello")
    for words in (["import", "odd"], ["import", "odd", "--dry-run"]):
        assert "odd is no archive of processes, or damaged" in live.error(*words)
    assert "does not exist" in live.error("import", "nowhere", code=2)
    assert "there is no process zzz" in live.error("export", "zzz", "new")
    assert not (live.folder / "new").exists()


def test_with_play_they_go_on_at_once(live: Shell) -> None:
    """Nobody has to play them."""
    pid = waiting(live)
    live("export", pid, "going")
    live("kill", pid)
    live("delete", pid)
    assert "play" not in live("import", "going", "--play").stderr
    live("resume", pid)
    live.until(pid, lambda facts: facts["state"] == "finished")
    live("delete", pid)


def test_prune_forgets_what_ended_long_ago(live: Shell) -> None:
    """By age, state, class and tag; and says what it would do."""
    old, tagged, living = ended(live), ended(live, "--tag", "t"), waiting(live)
    assert live("prune", "--older-than", "1h", "-y").stderr == "Nothing to forget.\n"
    for words in (["-s", "killed"], ["--class", "Nobody"], ["--tag", "other"]):
        assert live("prune", "--all", "-y", *words).stderr == "Nothing to forget.\n"
    assert live("prune", "--all", "-n").stderr == "would forget: 2 processes\n"
    assert live("prune", "--all", "-n", "--class", "Add", "--tag", "t").stderr == "would forget: 1 process\n"
    assert live("prune", "--older-than", "0s", "-y", "--class", "Add", "--tag", "t").stderr == "forgotten: 1 process\n"
    assert live("list", "-a", "-q").stdout.split() == [living, old]
    assert live("prune", "--all", "-y", "-s", "finished").stderr == "forgotten: 1 process\n"
    assert live("list", "-a", "-q").stdout.split() == [living]
    assert f"no process {tagged}" in live.error("show", tagged)
    live("kill", living)
    live("prune", "--all", "-y")


def test_prune_keeps_what_somebody_needs(live: Shell) -> None:
    """A parent whose child has not ended, and says so."""
    parent = live("launch", "tests.runtime.test_archive:Orphaned").stdout.strip()
    live.until(parent, lambda facts: facts["state"] == "finished")
    told = live("prune", "--all", "-y").stderr
    assert told == "forgotten: 0 processes\nkept: 1 process that others wait for, or whose children have not ended\n"
    live("kill", "--all", "-y")
    assert live("prune", "--all", "-y").stderr == "forgotten: 2 processes\n"


def test_prune_asks(live: Shell) -> None:
    """On a terminal; elsewhere it wants to be told that it need not."""
    pid = ended(live)
    assert "say --older-than AGE, or --all" in live.error("prune", "-y", code=2)
    assert "say --older-than AGE, or --all" in live.error("prune", "-y", "--all", "--older-than", "1d", code=2)
    assert "--older-than" in live.error("prune", "-y", "--older-than", "soon", code=2)
    assert "add --yes" in live.error("prune", "--all", code=2)
    with terminal(live, "prune", "--all") as shown:
        shown.until("Forget 1 process, with their histories, logs and results, for good")
        shown.type("n\n")
        shown.end(1)
    with terminal(live, "prune", "--all") as shown:
        shown.until("for good")
        shown.type("y\n")
        assert "forgotten: 1 process" in shown.end()
    assert f"no process {pid}" in live.error("show", pid)
